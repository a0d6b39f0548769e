"""Trace in, placement out: blocks are ordered side by side, and the result does not depend on how many at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.errors import OptionError
from neuralink_cli.files.durable import require_free
from neuralink_cli.kernels import available_cpus
from neuralink_cli.placement.block_ordering import BlockOptions, OrderedBlock, order_block
from neuralink_cli.placement.held_out import split_tokens
from neuralink_cli.placement.placement import (
    DEFAULT_ORDER,
    ORDER_NAMES,
    PlacementBlock,
    PlacementHeader,
    write_placement,
)
from neuralink_cli.progress import Progress, no_progress


@dataclass(frozen=True)
class ClusterOptions:
    """How to order.

    Attributes:
        device: What reads cost where the layout will be read.
        order: Which order to store; see `order_block`.
        held_out: Share of each source's tokens that measures the order instead of making it.
        bundle_bytes: Bytes of a bundle, if not those of the traced checkpoint (a quantised copy, say).
        resident: "gate" if the rows that decide firing will be kept out of the bundles.
        pin_hot: Share of the neurons of each block that will live in DRAM.
        effort: Of the refinement: "fast", "normal" or "max".
        fewest_tokens: An expert that fewer tokens of the ordering were routed to keeps its original order.
        jobs: Blocks at a time; all CPUs by default.
    """

    device: DeviceModel
    order: str = DEFAULT_ORDER
    held_out: float = 0.2
    bundle_bytes: int | None = None
    resident: str = "none"
    pin_hot: float = 0.0
    effort: str = "normal"
    fewest_tokens: int = 128
    jobs: int | None = None


@dataclass(frozen=True)
class ClusterSummary:
    """The placement that was written: what it says, held-out figures included, and its digest."""

    header: PlacementHeader
    content_sha256: str


def cluster(
    trace: Path, output: Path, options: ClusterOptions, *, overwrite: bool = False, progress: Progress = no_progress
) -> ClusterSummary:
    """Order the neurons of every block of a trace by co-activation, and write the placement.

    Raises:
        OptionError: An unknown order, or a share that leaves nothing to order.
        InputError: The trace is damaged or malformed.
        OutputError: The output exists or cannot be written.
    """
    _check_options(options)
    require_free(output, overwrite)
    with Trace(trace) as opened:
        opened.check_content()
        ordered = _order_blocks(opened, options, progress)
        header = _header(opened, ordered, options)
    placed = {block.id: result.placed for block, result in zip(header.blocks, ordered, strict=True)}
    return ClusterSummary(header, write_placement(output, header, placed, overwrite=overwrite))


def _check_options(options: ClusterOptions) -> None:
    if options.order not in ORDER_NAMES:
        raise OptionError(f"order {options.order!r} is not one of {', '.join(ORDER_NAMES)}")
    if not 0 <= options.held_out <= 0.9:
        raise OptionError(f"--held-out {options.held_out} is not between 0 and 0.9")
    if not 0 <= options.pin_hot <= 0.9:
        raise OptionError(f"--pin-hot {options.pin_hot} is not between 0 and 0.9")


def _order_blocks(trace: Trace, options: ClusterOptions, progress: Progress) -> list[OrderedBlock]:
    split = split_tokens(trace.source_ranges(), trace.source_sequence_lengths(), options.held_out)
    names = [source.name for source in trace.info.sources]
    stop = threading.Event()

    def stop_if_told() -> None:
        if stop.is_set():
            raise CancelledError

    with progress("cluster", len(trace.info.blocks), "block") as advance:

        def order(block: TraceBlock) -> OrderedBlock:
            result = order_block(trace, block, split, names, _block_options(block, options), stop_if_told)
            advance(1)
            return result

        with ThreadPoolExecutor(options.jobs or available_cpus()) as pool:
            running = [pool.submit(order, block) for block in trace.info.blocks]
            try:
                return [task.result() for task in running]
            except BaseException:
                # Ctrl-C reaches this thread only: the others are told, or they would go on for minutes.
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def _block_options(block: TraceBlock, options: ClusterOptions) -> BlockOptions:
    return BlockOptions(
        order=options.order,
        pinned=int(block.neurons * options.pin_hot),
        operation_in_bundles=options.device.operation_in_bundles(_bundle_bytes(block, options)),
        effort=options.effort,
        fewest_tokens=options.fewest_tokens,
    )


def _bundle_bytes(block: TraceBlock, options: ClusterOptions) -> int:
    if options.bundle_bytes is not None:
        return options.bundle_bytes
    firing = "gate" if "gate" in block.part_bytes else "up"
    kept = firing if options.resident == "gate" else None
    return sum(size for role, size in block.part_bytes.items() if role != kept)


def _header(trace: Trace, ordered: list[OrderedBlock], options: ClusterOptions) -> PlacementHeader:
    info = trace.info
    sources = [
        {
            "name": source.name,
            "revision": source.parameters.get("revision"),
            "sha256": source.sha256,
            "tokens": source.tokens,
        }
        for source in info.sources
    ]
    return PlacementHeader(
        model=info.model,
        origin=info.origin,
        trace={"content_sha256": trace.content_sha256, "sources": sources},
        signal=info.signal,
        calibration=info.calibration,
        parameters=_parameters(options),
        coverage=info.coverage,
        blocks=tuple(
            _placement_block(block, result, options) for block, result in zip(info.blocks, ordered, strict=True)
        ),
    )


def _parameters(options: ClusterOptions) -> Mapping[str, Any]:
    """What decides the result; the number of jobs does not."""
    device = options.device
    return {
        "order": options.order,
        "held_out": options.held_out,
        "device": {
            "name": device.name,
            "queue_depth": device.queue_depth,
            "operation_seconds": device.operation_seconds,
            "bytes_per_second": device.bytes_per_second,
        },
        "bundle_bytes": options.bundle_bytes,
        "resident": options.resident,
        "pin_hot": options.pin_hot,
        "effort": options.effort,
        "fewest_tokens": options.fewest_tokens,
    }


def _placement_block(block: TraceBlock, result: OrderedBlock, options: ClusterOptions) -> PlacementBlock:
    chosen = _block_options(block, options)
    return PlacementBlock(
        id=block.id,
        neurons=block.neurons,
        activation=block.activation,
        threshold=block.threshold,
        tokens=result.tokens,
        order=result.chosen,
        pinned=chosen.pinned,
        bundle_bytes=_bundle_bytes(block, options),
        operation_in_bundles=chosen.operation_in_bundles,
        collapse_gap=collapse_gap(chosen.operation_in_bundles),
        held_out=result.held_out,
    )
