"""Trace in, placement out: every block is ordered on some tokens and measured on the ones held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.checkpoint.durable import require_free
from neuralink_cli.placement.baselines import frequency_order, original_order
from neuralink_cli.placement.bits import Bits, activation_counts, transpose_bits
from neuralink_cli.placement.linking import Linking
from neuralink_cli.placement.placement import (
    HeldOutReads,
    PlacedBlock,
    PlacementBlock,
    PlacementHeader,
    write_placement,
)
from neuralink_cli.placement.sparse_linking import link_tiled
from neuralink_cli.placement.split import Range, TokenSplit, split_tokens
from neuralink_cli.placement.statistics import read_statistics

Progress = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class ClusterOptions:
    """Which order to store, and the share of tokens held out from the ordering."""

    order: str = "linked"
    held_out: float = 0.2


@dataclass(frozen=True, eq=False)
class OrderedBlock:
    """What ordering a block gave: the order that is stored, and the held-out figures of all orders."""

    placed: PlacedBlock
    held_out: tuple[HeldOutReads, ...]


def cluster(
    trace_path: Path, output: Path, options: ClusterOptions, *, overwrite: bool = False, progress: Progress
) -> tuple[PlacementHeader, str]:
    """Order every block of a trace, write the placement, and return what it says and its `content_sha256`.

    Raises:
        InputError: The trace is damaged or malformed.
        OutputError: The output exists or cannot be written.
    """
    require_free(output, overwrite)
    with Trace(trace_path) as trace:
        trace.check_content()
        split = split_tokens(trace.source_ranges(), trace.source_sequence_lengths(), options.held_out)
        names = [source.name for source in trace.info.sources]
        ordered: dict[str, OrderedBlock] = {}
        with progress("cluster", len(trace.info.blocks), "block") as advance:
            for block in trace.info.blocks:
                ordered[block.id] = order_block(trace, block, split, names, options)
                advance(1)
        header = _header(trace, ordered, options)
    digest = write_placement(
        output, header, {name: block.placed for name, block in ordered.items()}, overwrite=overwrite
    )
    return header, digest


def order_block(
    trace: Trace, block: TraceBlock, split: TokenSplit, source_names: Sequence[str], options: ClusterOptions
) -> OrderedBlock:
    """Order one block on the tokens given to the ordering, and measure every order on those held out."""
    bits = _bits(trace, block, split.ordering)
    counts = activation_counts(bits)
    linking = link_tiled(bits, counts)
    orders = {
        "original": original_order(block.neurons),
        "frequency": frequency_order(counts),
        "linked": linking.order,
    }
    tokens = sum(stop - start for start, stop in split.ordering)
    order = orders[options.order]
    placed = PlacedBlock(
        order=order,
        frequency=(counts[order] / max(tokens, 1)).astype(np.float32),
        links=_links(options.order, linking, block.neurons),
    )
    held_out = tuple(
        _measure(trace, block, held, name, orders) for held, name in zip(split.held_out, source_names, strict=True)
    )
    return OrderedBlock(placed, held_out)


def _bits(trace: Trace, block: TraceBlock, ranges: Sequence[Range]) -> Bits:
    fired = [trace.fired(block, start, stop) for start, stop in ranges]
    return transpose_bits(fired[0] if len(fired) == 1 else np.concatenate(fired), block.neurons)


def _links(order: str, linking: Linking, neurons: int) -> npt.NDArray[np.int32]:
    """Where links start; an order that linked nothing has links of one neuron."""
    return linking.links if order == "linked" else np.arange(neurons, dtype=np.int32)


def _measure(
    trace: Trace, block: TraceBlock, held_out: Range, source: str, orders: Mapping[str, npt.NDArray[np.int32]]
) -> HeldOutReads:
    tokens = held_out[1] - held_out[0]
    bits = _bits(trace, block, [held_out])
    statistics = {name: read_statistics(bits, order, tokens) for name, order in orders.items()}
    return HeldOutReads(
        source=source,
        tokens=tokens,
        active=statistics["original"].active,
        reads={name: figures.reads for name, figures in statistics.items()},
    )


def _header(trace: Trace, ordered: Mapping[str, OrderedBlock], options: ClusterOptions) -> PlacementHeader:
    info = trace.info
    sources = [{"name": source.name, "sha256": source.sha256, "tokens": source.tokens} for source in info.sources]
    return PlacementHeader(
        model=info.model,
        trace={"content_sha256": trace.content_sha256, "sources": sources},
        signal=info.signal,
        calibration=info.calibration,
        parameters=asdict(options),
        blocks=tuple(
            PlacementBlock(
                id=block.id,
                neurons=block.neurons,
                activation=block.activation,
                threshold=block.threshold,
                order=options.order,
                held_out=ordered[block.id].held_out,
            )
            for block in info.blocks
        ),
    )
