"""Trace in, placement out. Blocks are ordered in parallel; how many at a time does not change the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.clustering.dask_cluster import DaskOptions, require_dask
from neuralink_cli.clustering.dask_tasks import on_dask
from neuralink_cli.clustering.ordered_spool import OrderedSpool, SpooledBlock
from neuralink_cli.clustering.ordering_work import OrderingWork, Workers, in_threads, order_blocks
from neuralink_cli.clustering.preflight import disk_bytes, tell_needs, tell_worker_needs
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel, device_record
from neuralink_cli.devices.ratio import bootstrap_ratios
from neuralink_cli.errors import OptionError
from neuralink_cli.files.durable import require_space
from neuralink_cli.files.stage_file import require_stage_output
from neuralink_cli.ordering.block_ordering import BlockOptions
from neuralink_cli.ordering.own_orders import IMPORTED, OwnOrder, load_order, read_orders
from neuralink_cli.placement.bundle_sizes import bundle_bytes_of
from neuralink_cli.placement.held_out import TokenSplit, digests_in, sequence_starts_in, split_tokens
from neuralink_cli.placement.placement import (
    DEFAULT_ORDER,
    ORDER_NAMES,
    ORIGINAL,
    STORED,
    MeasuredGain,
    PlacementBlock,
    PlacementHeader,
    write_placement,
)
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.weight_formats.formats import SOURCE, parse_weight_formats

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterOptions:
    """Options of `cluster`.

    Attributes:
        device: Cost of reads on the storage that will hold the layout.
        order: Which order to store; see `order_block`. A built-in one, "imported", or one that an installed package
            adds to the entry points `neuralink.orders`.
        order_from: File with an order of every block, which is compared under the name "imported".
        held_out: Share of each source's tokens held out from the ordering to measure it.
        bundle_bytes: Bytes of a bundle, if different from the traced checkpoint's.
        weights: The format that `relayout --weights` will store weights in, which decides the bytes of a bundle.
        resident: "gate" if the rows that decide firing will be kept out of the bundles.
        pin_hot: Share of the neurons of each block that will live in DRAM.
        effort: Effort of the refinement: "fast", "normal" or "max".
        fewest_tokens: An expert with fewer routed tokens in the ordering keeps its original order.
        jobs: Blocks to order at a time; by default as many as CPUs. On Dask, threads that each worker counts with; by
            default one.
        dask: Workers of a Dask cluster that order the blocks; None for threads of this process.
    """

    device: DeviceModel
    order: str = DEFAULT_ORDER
    order_from: Path | None = None
    held_out: float = 0.2
    bundle_bytes: int | None = None
    weights: str = SOURCE
    resident: str = "none"
    pin_hot: float = 0.0
    effort: str = "normal"
    fewest_tokens: int = 128
    jobs: int | None = None
    dask: DaskOptions | None = None


@dataclass(frozen=True)
class ClusterSummary:
    """The placement that was written: its header, with the held-out figures, and its digest."""

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
    check_options(options)
    require_stage_output(output, overwrite, inputs=(trace, options.order_from))
    with Trace(trace) as opened:
        opened.check_content()
        own = _own_orders(opened, options)
        split = _split(opened, options)
        require_space(output, disk_bytes(opened, split))
        workers = _workers(opened, split, options)
        work = OrderingWork(opened, split, lambda block: _block_options(block, options, own))
        with OrderedSpool(output, [block.id for block in opened.info.blocks]) as spool:
            with closing(order_blocks(work, workers, progress)) as ordered:
                for index, block in ordered:
                    spool.put(index, block)
            header = _header(opened, split, spool, options, own)
            seen = np.unique(np.concatenate([digests_in(opened, made) for made in split.ordering]), axis=0)
            return ClusterSummary(header, write_placement(output, header, spool, seen, overwrite=overwrite))


def _workers(trace: Trace, split: TokenSplit, options: ClusterOptions) -> Workers:
    """Who orders the blocks; logs what that takes."""
    if options.dask is not None:
        require_dask()
        tell_worker_needs(trace, split, options.pin_hot, options.jobs or 1, options.dask.workers)
        return partial(on_dask, options=options.dask)
    tell_needs(trace, split, options.pin_hot, options.jobs)
    return partial(in_threads, jobs=options.jobs)


def check_options(options: ClusterOptions) -> None:
    """Check what can be checked without a trace.

    Raises:
        OptionError: An option is out of range, or options do not go together.
    """
    if options.order == IMPORTED and options.order_from is None:
        raise OptionError(f"--order {IMPORTED} needs --order-from FILE")
    parse_weight_formats(options.weights, "--weights")
    if options.bundle_bytes is not None and options.weights != SOURCE:
        raise OptionError("--weights decides the bytes of a bundle, so it cannot be combined with --bundle-bytes")
    if not 0 <= options.held_out <= 0.9:
        raise OptionError(f"--held-out {options.held_out} is not between 0 and 0.9")
    if not 0 <= options.pin_hot <= 0.9:
        raise OptionError(f"--pin-hot {options.pin_hot} is not between 0 and 0.9")


def _own_orders(trace: Trace, options: ClusterOptions) -> tuple[OwnOrder, ...]:
    own = []
    if options.order_from is not None:
        own.append(read_orders(options.order_from, trace.info.blocks))
    if options.order not in (*ORDER_NAMES, IMPORTED):
        own.append(load_order(options.order))
    return tuple(own)


def _split(trace: Trace, options: ClusterOptions) -> TokenSplit:
    split = split_tokens(trace, options.held_out)
    sources = zip(trace.info.sources, trace.source_ranges(), split.ordering, split.held_out, strict=True)
    for source, (_, stop), (_, cut), held_out in sources:
        repeated = stop - cut - sum(last - first for first, last in held_out)
        if repeated:
            logger.info(
                "%s: %s tokens are not held out: the order sees the same text, or the beginning of it",
                source.name,
                f"{repeated:,}",
            )
        elif options.held_out and not held_out:
            logger.info("%s: nothing is held out of a single sequence", source.name)
    return split


def _block_options(block: TraceBlock, options: ClusterOptions, own: tuple[OwnOrder, ...] = ()) -> BlockOptions:
    return BlockOptions(
        order=options.order,
        pinned=int(block.neurons * options.pin_hot),
        operation_in_bundles=options.device.operation_in_bundles(_bundle_bytes(block, options)),
        effort=options.effort,
        fewest_tokens=options.fewest_tokens,
        own=own,
        threads=None if options.dask is None else options.jobs or 1,
    )


def _bundle_bytes(block: TraceBlock, options: ClusterOptions) -> int:
    if options.bundle_bytes is not None:
        return options.bundle_bytes
    return bundle_bytes_of(block, options.weights, resident=options.resident)


def _header(
    trace: Trace,
    split: TokenSplit,
    spool: OrderedSpool,
    options: ClusterOptions,
    own: tuple[OwnOrder, ...],
) -> PlacementHeader:
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
        parameters=_parameters(options, own),
        coverage=info.coverage,
        blocks=tuple(
            _placement_block(block, result, options) for block, result in zip(info.blocks, spool.blocks, strict=True)
        ),
        gains=_gains(trace, split, spool, options, own),
    )


def _gains(
    trace: Trace,
    split: TokenSplit,
    spool: OrderedSpool,
    options: ClusterOptions,
    own: tuple[OwnOrder, ...],
) -> tuple[MeasuredGain, ...]:
    """What the orders gain in total and on each source, on the held-out sequences of all blocks together."""
    counts = [sequence_starts_in(trace, held).size for held in split.held_out]
    if not sum(counts):
        return ()
    known = [*ORDER_NAMES, *(order.name for order in own)]
    in_all = set(known).intersection(*(block.compared for block in spool.blocks))
    names = [*(name for name in known if name in in_all), STORED]
    # In the order of the trace, whatever was ready first: the sum of floating-point numbers depends on it.
    costs: dict[str, npt.NDArray[np.float64]] = {name: np.zeros(sum(counts)) for name in names}
    naive = np.zeros(sum(counts))
    for index, (block, spooled) in enumerate(zip(trace.info.blocks, spool.blocks, strict=True)):
        size, found = _bundle_bytes(block, options), spool.costs(index)
        for name in names:
            costs[name] += size * found.collapsed[spooled.chosen if name == STORED else name]
        naive += size * found.naive
    ends = np.cumsum(counts).tolist()
    parts: list[tuple[str | None, slice]] = [(None, slice(0, ends[-1]))]
    parts += [
        (source.name, slice(end - count, end))
        for source, end, count in zip(trace.info.sources, ends, counts, strict=True)
        if count
    ]
    gains = []
    for source, part in parts:
        original = costs[ORIGINAL][part]
        pairs = [(top, costs[name][part]) for name in names for top in (original, naive[part])]
        ratios = bootstrap_ratios(pairs)
        gains += [MeasuredGain(source, name, ratios[2 * k], ratios[2 * k + 1]) for k, name in enumerate(names)]
    return tuple(gains)


def _parameters(options: ClusterOptions, own: tuple[OwnOrder, ...]) -> Mapping[str, Any]:
    """The options that decide the result; the number of jobs does not."""
    return {
        "order": options.order,
        **({"own_orders": {order.name: order.origin for order in own}} if own else {}),
        "held_out": options.held_out,
        "device": device_record(options.device),
        "bundle_bytes": options.bundle_bytes,
        **({} if options.weights == SOURCE else {"weights": options.weights}),
        "resident": options.resident,
        "pin_hot": options.pin_hot,
        "effort": options.effort,
        "fewest_tokens": options.fewest_tokens,
    }


def _placement_block(block: TraceBlock, result: SpooledBlock, options: ClusterOptions) -> PlacementBlock:
    chosen = _block_options(block, options)
    return PlacementBlock(
        id=block.id,
        neurons=block.neurons,
        activation=block.activation,
        threshold=block.threshold,
        tokens=result.tokens,
        order=result.chosen,
        pinned=result.pinned,
        bundle_bytes=_bundle_bytes(block, options),
        operation_in_bundles=chosen.operation_in_bundles,
        collapse_gap=collapse_gap(chosen.operation_in_bundles),
        held_out=result.held_out,
    )
