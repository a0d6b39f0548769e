"""Measures layouts: replays held-out tokens against them and against the published baselines.

Every row is a way to store the neurons and to read them. The baselines come from the same trace and have the same
DRAM: each matrix on its own in original order (as llama.cpp stores it: a neuron is a row of each matrix, a run of
neurons a read per matrix; the down projection counts as transposed), bundles in original order (LLM in a flash),
bundles by frequency. Pinned neurons live in the cache of every row that has one, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import (
    Contender,
    ContenderBlock,
    TokenRange,
    choose_tokens,
    device_made_for,
    read_contender,
    tell_of_differences,
)
from neuralink_cli.bench.dram import block_capacities, dram_bytes, resident_bytes
from neuralink_cli.bench.figures import Figures, summarise
from neuralink_cli.bench.preflight import tell_needs
from neuralink_cli.bench.replay import BlockCache, BlockReads, TokenFigures, firing_slots, read_prices, replay_block
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio, bootstrap_ratios
from neuralink_cli.errors import OptionError, VerificationError
from neuralink_cli.kernels import available_cpus
from neuralink_cli.placement.bundle_sizes import bundle_bytes_of
from neuralink_cli.placement.held_out import sequence_starts_in
from neuralink_cli.placement.placement import FREQUENCY, ORIGINAL
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.cache import cache_policy
from neuralink_cli.storage.policies import DEFAULT_POLICY, NO_CACHE

if TYPE_CHECKING:
    from neuralink_cli.storage.reader import FlashReader

REAL = "real"
REAL_TOKENS = 256


# Each matrix stored on its own, as in a checkpoint.
UNBUNDLED = "unbundled"


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        devices: Device models to replay on; by default the one the first layout was made for.
        dram: DRAM for cached and pinned bundles and resident rows; a share is of the bundles alone.
        policy: Name of the cache's policy.
        held_out: Share of tokens to replay; by default the share that the layouts held out. 1 for all.
        tokens: Replay at most this many.
        real: Read from the storage that the layouts lie on, instead of modelling it.
        bundle_bytes: Sizes of a bundle to model; by default those of the layouts.
        weights: Formats as `relayout --weights` takes them, whose bundle sizes to model too.
    """

    devices: tuple[DeviceModel, ...] = ()
    dram: DramBudget = field(default_factory=lambda: DramBudget(fraction=0.05))
    policy: str = DEFAULT_POLICY
    held_out: float | None = None
    tokens: int | None = None
    real: bool = False
    bundle_bytes: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """A way to store and read neurons.

    Attributes:
        name: Name of the order: "unbundled", "original", "frequency", or that of a layout.
        layout: Path of the layout the order is from; None for a baseline.
        collapse: Whether gaps are read across where that is cheaper.
        cache: Name of the cache policy.
        device: Name of the device.
        bundle_bytes: Bundle size that the layout was scaled to; None if not scaled.
    """

    name: str
    layout: str | None
    collapse: bool
    cache: str
    device: str
    bundle_bytes: int | None

    @property
    def baseline(self) -> Way:
        """What its gain is over: bundles in original order, read the same way, with the same cache and device."""
        return replace(self, name=ORIGINAL, layout=None)

    @property
    def naive(self) -> Way:
        """What its gain over naive reading is over: bundles in original order, no gap read across, the same cache."""
        return replace(self, name=ORIGINAL, layout=None, collapse=False)


@dataclass(frozen=True)
class BenchRow:
    """Figures of one way.

    Attributes:
        capacity: Neurons that the cache has room for, over all blocks.
        dram_bytes: What they take, and the rows that the layout keeps resident.
        gain: The mean I/O time of `way.baseline` over its own: what the order is worth.
        gain_over_naive: That of `way.naive` over its own: what order and access collapse are worth together.
    """

    way: Way
    capacity: int
    dram_bytes: int
    figures: Figures
    by_source: tuple[Figures, ...]
    gain: Ratio
    gain_over_naive: Ratio


@dataclass(frozen=True)
class BenchReport:
    """All rows, and what was replayed; `coverage` as in the trace."""

    trace: str
    tokens: tuple[TokenRange, ...]
    real: bool
    direct: bool | None
    rows: tuple[BenchRow, ...]
    coverage: Mapping[str, int] | None

    def as_document(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "trace": self.trace,
            "real": self.real,
            "direct": self.direct,
            "tokens": [asdict(part) for part in self.tokens],
            "coverage": None if self.coverage is None else dict(self.coverage),
            "rows": [
                {**asdict(row), "baseline": asdict(row.way.baseline), "naive": asdict(row.way.naive)}
                for row in self.rows
            ],
        }

    def check_gain(self, least: float | None, least_over_naive: float | None = None) -> None:
        """Require a gain of every layout, read with collapse and with the cache there is.

        The lower end of its interval counts: less may be chance.

        Args:
            least: Of `gain`; None for any.
            least_over_naive: Of `gain_over_naive`; None for any.

        Raises:
            VerificationError: A layout gains less.
        """
        for row in self.rows:
            way = row.way
            best_cache = way.cache != NO_CACHE or not any(other.way.cache != NO_CACHE for other in self.rows)
            if way.layout is None or not way.collapse or not best_cache:
                continue
            for name, gain, wanted in (
                ("gain", row.gain, least),
                ("gain over naive reading", row.gain_over_naive, least_over_naive),
            ):
                if wanted is not None and gain.low < wanted:
                    raise VerificationError(
                        f"{name} {gain} is not surely {wanted:g} on {way.device}: the interval begins below",
                        where=way.layout,
                    )


@dataclass(frozen=True, eq=False)
class _Task:
    """A way, with what replaying it needs besides the order."""

    way: Way
    contender: Contender
    device: DeviceModel
    capacities: tuple[int, ...]

    def bundle_bytes(self, block: ContenderBlock) -> int:
        return self.way.bundle_bytes or block.stride

    def parts(self, block: ContenderBlock) -> int:
        return block.parts if self.way.name == UNBUNDLED else 1

    def order(self, block: ContenderBlock) -> npt.NDArray[np.int32]:
        if self.way.layout is not None:
            return block.order
        if self.way.name == FREQUENCY:
            # By descending frequency, ties by neuron: the stored frequencies are by slot.
            by_neuron = np.empty(block.neurons, dtype=np.float32)
            by_neuron[block.order] = block.frequency
            return np.argsort(-by_neuron, kind="stable").astype(np.int32)
        return np.arange(block.neurons, dtype=np.int32)


def bench_layouts(
    layouts: Sequence[Path],
    trace: Path,
    options: BenchOptions = BenchOptions(),
    *,
    progress: Progress = no_progress,
) -> BenchReport:
    """Replay the held-out tokens of a trace against layouts, or placement files, and against baselines.

    Raises:
        OptionError: Options that make no sense for these layouts.
        InputError: A layout, or the trace, is missing or malformed.
        MismatchError: A layout and the trace are of different models.
    """
    with Trace(trace) as opened, ExitStack() as stack:
        opened.check_content()
        contenders = [read_contender(path, opened) for path in layouts]
        options = _with_sizes_of_weights(options, opened, contenders[0])
        _check(contenders, options)
        tell_of_differences(contenders, devices=not options.devices)
        most = options.tokens or (REAL_TOKENS if options.real else None)
        tokens = choose_tokens(opened, contenders, options.held_out, most)
        readers = _open_readers(contenders, stack) if options.real else {}
        tasks = list(_tasks(contenders, options, readers))
        count = sum(part.tokens for part in tokens)
        tell_needs(opened, contenders, count, len(tasks), record=options.real)
        figures = [TokenFigures.empty(count) for _ in tasks]
        recorded: list[list[BlockReads]] = [[] for _ in tasks]
        with progress("bench", len(opened.info.blocks) * len(tasks), "row") as advance:
            for index in range(len(opened.info.blocks)):
                _replay_block_of_all(opened, index, tokens, tasks, figures, recorded, options.real, advance)
        direct = None
        if options.real:
            direct = _read_for_real(tasks, readers, figures, recorded, count, progress)
        starts = _sequence_starts(opened, tokens)
        coverage = opened.info.coverage
    return BenchReport(str(trace), tokens, options.real, direct, _rows(tasks, figures, tokens, starts), coverage)


def _with_sizes_of_weights(options: BenchOptions, trace: Trace, first: Contender) -> BenchOptions:
    """The options with the bundle sizes that follow from weight formats."""
    resident = "gate" if first.resident_bytes else "none"
    sizes = list(options.bundle_bytes)
    for weights in options.weights:
        found = {bundle_bytes_of(block, weights, resident=resident) for block in trace.info.blocks}
        if len(found) > 1:
            raise OptionError("blocks differ in the size of their bundles: pass --bundle-bytes instead of --weights")
        sizes += found
    return replace(options, bundle_bytes=tuple(dict.fromkeys(sizes)))


def _check(contenders: Sequence[Contender], options: BenchOptions) -> None:
    cache_policy(options.policy)
    if not options.real:
        return
    if options.bundle_bytes:
        raise OptionError("--bundle-bytes and --weights scale modelled reads, so they cannot be combined with --real")
    if len(options.devices) > 1:
        raise OptionError("--real reads from one device, so it takes at most one --device, to plan reads for")
    for contender in contenders:
        if not contender.bundled:
            raise OptionError(f"{contender.path} is not a bundled layout, so --real cannot read from it")


def _tasks(
    contenders: Sequence[Contender], options: BenchOptions, readers: Mapping[Path, FlashReader]
) -> Iterator[_Task]:
    devices = options.devices or (device_made_for(contenders[0]),)
    if readers:
        devices = (replace(devices[0], page_bytes=readers[contenders[0].path].block_bytes),)
    for device in devices:
        for size in options.bundle_bytes or (None,):
            dram = dram_bytes(contenders, options.dram if options.policy != NO_CACHE else DramBudget(bytes=0), size)
            caches = [NO_CACHE, options.policy] if dram else [NO_CACHE]
            for cache in dict.fromkeys(caches):
                for name, contender in _stored(contenders):
                    for collapse in (False, True):
                        layout = str(contender.path) if name is None else None
                        label = REAL if options.real else device.name
                        way = Way(name or contender.order, layout, collapse, cache, label, size)
                        room = dram if cache != NO_CACHE else 0
                        yield _Task(way, contender, device, block_capacities(contender, room, size))


def _stored(contenders: Sequence[Contender]) -> Iterator[tuple[str | None, Contender]]:
    """The baselines, made from the first contender, then the contenders themselves."""
    for name in (UNBUNDLED, ORIGINAL, FREQUENCY):
        yield name, contenders[0]
    for contender in contenders:
        yield None, contender


def _replay_block_of_all(
    trace: Trace,
    index: int,
    tokens: Sequence[TokenRange],
    tasks: Sequence[_Task],
    figures: Sequence[TokenFigures],
    recorded: Sequence[list[BlockReads]],
    record: bool,
    advance: Callable[[int], object],
) -> None:
    """Replay one block in every way, as many ways at a time as there are CPUs."""
    block = trace.info.blocks[index]
    fired = np.concatenate([trace.fired_by_token(block, part.start, part.stop) for part in tokens])
    orders = {task.order(task.contender.blocks[index]).tobytes() for task in tasks}
    firing = {key: firing_slots(fired, np.frombuffer(key, dtype=np.int32)) for key in orders}

    def replay(k: int) -> None:
        task = tasks[k]
        stored = task.contender.blocks[index]
        order, parts, size = task.order(stored), task.parts(stored), task.bundle_bytes(stored)
        pinned = np.flatnonzero(np.isin(order, stored.order[: stored.pinned])).astype(np.int32)
        capacity = task.capacities[index]
        cache = BlockCache(cache_policy(task.way.cache), capacity, pinned if capacity else pinned[:0])
        prices = read_prices(task.device, stored.neurons, size, parts=parts, collapse=task.way.collapse)
        reads = replay_block(firing[order.tobytes()], prices, cache, size, figures[k], parts=parts, record=record)
        if reads is not None:
            recorded[k].append(reads)
        advance(1)

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(replay, range(len(tasks))))


def _open_readers(contenders: Sequence[Contender], stack: ExitStack) -> dict[Path, FlashReader]:
    """Every layout, open for reading until the stack is closed."""
    from neuralink_cli.storage.reader import FlashReader

    paths = sorted({contender.path for contender in contenders})
    return {path: stack.enter_context(FlashReader(path)) for path in paths}


def _read_for_real(
    tasks: Sequence[_Task],
    readers: Mapping[Path, FlashReader],
    figures: Sequence[TokenFigures],
    recorded: Sequence[Sequence[BlockReads]],
    tokens: int,
    progress: Progress,
) -> bool:
    """Replace modelled times with measured ones; return whether all reads went past the page cache."""
    from neuralink_cli.bench.real_reads import token_seconds

    with progress("read", tokens, "token") as advance:
        # Read all rows in turn for each token, so that other load on the device affects them equally.
        for token in range(tokens):
            for task, figure, reads in zip(tasks, figures, recorded, strict=True):
                blocks = task.contender.blocks
                parts = [task.parts(block) for block in blocks]
                reader = readers[task.contender.path]
                figure.seconds[token] = token_seconds(reader, blocks, reads, parts, token)
            advance(1)
    return all(reader.direct for reader in readers.values())


def _sequence_starts(trace: Trace, tokens: Sequence[TokenRange]) -> npt.NDArray[np.int64]:
    """Where sequences start among the replayed tokens, which are strung together: int64, ascending from 0."""
    starts, before = [], 0
    for part in tokens:
        starts.append(sequence_starts_in(trace, [(part.start, part.stop)]) - part.start + before)
        before += part.tokens
    return np.concatenate(starts)


def _source_spans(tokens: Sequence[TokenRange]) -> Iterator[tuple[str, int, int]]:
    """Each source with where its tokens start and end among the replayed ones."""
    end = 0
    for name, parts in groupby(tokens, lambda part: part.source):
        start, end = end, end + sum(part.tokens for part in parts)
        yield name, start, end


def _rows(
    tasks: Sequence[_Task],
    figures: Sequence[TokenFigures],
    tokens: Sequence[TokenRange],
    starts: npt.NDArray[np.int64],
) -> tuple[BenchRow, ...]:
    times = {task.way: np.add.reduceat(figure.seconds, starts) for task, figure in zip(tasks, figures, strict=True)}
    pairs = [(times[other], times[task.way]) for task in tasks for other in (task.way.baseline, task.way.naive)]
    ratios = bootstrap_ratios(pairs)
    spans = list(_source_spans(tokens))
    rows = []
    for k, (task, figure) in enumerate(zip(tasks, figures, strict=True)):
        parts = tuple(summarise(figure, *span) for span in spans)
        whole = summarise(figure, "total", 0, spans[-1][2])
        sizes = [task.bundle_bytes(block) for block in task.contender.blocks]
        cached = sum(capacity * size for capacity, size in zip(task.capacities, sizes, strict=True))
        dram = cached + resident_bytes(task.contender, task.way.bundle_bytes)
        rows.append(BenchRow(task.way, sum(task.capacities), dram, whole, parts, ratios[2 * k], ratios[2 * k + 1]))
    return tuple(rows)
