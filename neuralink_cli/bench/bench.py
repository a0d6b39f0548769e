"""Measures layouts: replays held-out tokens against them and against the published baselines.

Every row is a way to store the neurons and to read them. The baselines come from the same trace and have the same
DRAM: each matrix on its own in original order (as llama.cpp stores it: a neuron is a row of each matrix, a run of
neurons a read per matrix; the down projection counts as transposed), bundles in original order (LLM in a flash),
bundles by frequency. Pinned neurons live in the cache of every row that has one, whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    TokenRange,
    choose_tokens,
    device_made_for,
    read_contender,
    tell_of_differences,
)
from neuralink_cli.bench.dram import block_capacities, dram_bytes, resident_bytes
from neuralink_cli.bench.figures import Figures, summarise
from neuralink_cli.bench.preflight import tell_needs
from neuralink_cli.bench.replay import BlockReads, TokenFigures
from neuralink_cli.bench.ways import BASELINES, Task, Way, replay_ways
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio, bootstrap_ratios
from neuralink_cli.errors import OptionError, VerificationError
from neuralink_cli.placement.bundle_sizes import bundle_bytes_of
from neuralink_cli.placement.held_out import sequence_starts_in
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.cache import cache_policy
from neuralink_cli.storage.policies import DEFAULT_POLICY, NO_CACHE

if TYPE_CHECKING:
    from neuralink_cli.storage.reader import FlashReader

REAL = "real"
REAL_TOKENS = 256


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        devices: Device models to replay on; by default the one the first layout was made for.
        dram: DRAM for cached and pinned bundles and resident rows; a share is of the bundles alone.
        policy: Name of the cache's policy.
        held_out: Share of tokens to replay, 0 to 1; by default the share that the layouts held out.
        tokens: Replay at most this many.
        real: Time reads from the storage that the layouts lie on, instead of modelling them.
        bundle_bytes: Sizes of a bundle to model; by default those of the layouts.
        weights: Formats as `relayout --weights` takes them, whose bundle sizes to model too.
        baselines: Names of the orders to compare with; the original one, which gains are over, among them.
        uncached: Whether to replay without a cache, too, if there is DRAM for one.
    """

    devices: tuple[DeviceModel, ...] = ()
    dram: DramBudget = field(default_factory=lambda: DramBudget(fraction=0.05))
    policy: str = DEFAULT_POLICY
    held_out: float | None = None
    tokens: int | None = None
    real: bool = False
    bundle_bytes: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    baselines: tuple[str, ...] = BASELINES
    uncached: bool = True


@dataclass(frozen=True)
class BenchRow:
    """Figures of one way.

    Attributes:
        capacity: Neurons that the cache has room for, over all blocks.
        dram_bytes: What they take, and the rows that the layout keeps resident.
        gain: The mean I/O time of `way.baseline` over its own: what the order is worth.
        gain_over_naive: That of `way.naive` over its own: what order and access collapse are worth together.
        gains_by_source: `gain` of each source alone, as in `by_source`.
    """

    way: Way
    capacity: int
    dram_bytes: int
    figures: Figures
    by_source: tuple[Figures, ...]
    gain: Ratio
    gain_over_naive: Ratio
    gains_by_source: tuple[Ratio, ...]


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
                        f"{name} {gain} is not reliably {wanted:g} on {way.device}: its interval starts lower",
                        where=way.layout,
                    )


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
    with Trace(trace) as opened:
        opened.check_content()
        contenders = [read_contender(path, opened) for path in layouts]
        tell_of_differences(contenders, devices=not options.devices)
        most = options.tokens or (REAL_TOKENS if options.real else None)
        tokens = choose_tokens(opened, contenders, options.held_out, most)
        return bench_contenders(opened, contenders, tokens, options, progress=progress).report


@dataclass(frozen=True, eq=False)
class BenchedBlocks:
    """A bench with the modelled figures of every block.

    Attributes:
        block_seconds: float64 `[rows, blocks]`, the time of all tokens together.
        block_active: int64 `[blocks]`, how often neurons fired, over all tokens.
    """

    report: BenchReport
    block_seconds: npt.NDArray[np.float64]
    block_active: npt.NDArray[np.int64]


def bench_contenders(
    trace: Trace,
    contenders: Sequence[Contender],
    tokens: tuple[TokenRange, ...],
    options: BenchOptions = BenchOptions(),
    *,
    progress: Progress = no_progress,
) -> BenchedBlocks:
    """As `bench_layouts`, of an open trace and tokens that were chosen before.

    Raises:
        OptionError: As `bench_layouts`.
    """
    with ExitStack() as stack:
        options = _with_sizes_of_weights(options, trace, contenders[0])
        _check(contenders, options)
        readers = _open_readers(contenders, stack) if options.real else {}
        tasks = list(_tasks(contenders, options, readers))
        count = sum(part.tokens for part in tokens)
        tell_needs(trace, contenders, count, len(tasks), record=options.real)
        recorded: list[list[BlockReads]] = [[] for _ in tasks]
        recorders = {k: reads.append for k, reads in enumerate(recorded)} if options.real else {}
        with progress("bench", len(trace.info.blocks) * len(tasks), "row") as advance:
            replayed = replay_ways(trace, tokens, tasks, recorders, advance)
        direct = None
        if options.real:
            direct = _read_for_real(tasks, readers, replayed.figures, recorded, count, progress)
        rows = _rows(tasks, replayed.figures, tokens, sequence_starts(trace, tokens))
    report = BenchReport(str(trace.path), tokens, options.real, direct, rows, trace.info.coverage)
    return BenchedBlocks(report, replayed.block_seconds, replayed.block_active)


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
) -> Iterator[Task]:
    devices = options.devices or (device_made_for(contenders[0]),)
    if readers:
        devices = (replace(devices[0], page_bytes=readers[contenders[0].path].block_bytes),)
    for device in devices:
        for size in options.bundle_bytes or (None,):
            dram = dram_bytes(contenders, options.dram if options.policy != NO_CACHE else DramBudget(bytes=0), size)
            caches = [options.policy] if dram else [NO_CACHE]
            if options.uncached:
                caches.insert(0, NO_CACHE)
            for cache in dict.fromkeys(caches):
                for name, contender in _stored(contenders, options.baselines):
                    for collapse in (False, True):
                        layout = str(contender.path) if name is None else None
                        label = REAL if options.real else device.name
                        way = Way(name or contender.order, layout, collapse, cache, label, size)
                        room = dram if cache != NO_CACHE else 0
                        yield Task(way, contender, device, block_capacities(contender, room, size))


def _stored(contenders: Sequence[Contender], baselines: Sequence[str]) -> Iterator[tuple[str | None, Contender]]:
    """The baselines, made from the first contender, then the contenders themselves."""
    for name in baselines:
        yield name, contenders[0]
    for contender in contenders:
        yield None, contender


def _open_readers(contenders: Sequence[Contender], stack: ExitStack) -> dict[Path, FlashReader]:
    """Every layout, open for reading until the stack is closed."""
    from neuralink_cli.storage.reader import FlashReader

    paths = sorted({contender.path for contender in contenders})
    return {path: stack.enter_context(FlashReader(path)) for path in paths}


def _read_for_real(
    tasks: Sequence[Task],
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


def sequence_starts(trace: Trace, tokens: Sequence[TokenRange]) -> npt.NDArray[np.int64]:
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
    tasks: Sequence[Task],
    figures: Sequence[TokenFigures],
    tokens: Sequence[TokenRange],
    starts: npt.NDArray[np.int64],
) -> tuple[BenchRow, ...]:
    times = {task.way: np.add.reduceat(figure.seconds, starts) for task, figure in zip(tasks, figures, strict=True)}
    pairs = [(times[other], times[task.way]) for task in tasks for other in (task.way.baseline, task.way.naive)]
    ratios = bootstrap_ratios(pairs)
    spans = list(_source_spans(tokens))
    by_source = [_gains_within(times, tasks, starts, first, last) for _, first, last in spans]
    rows = []
    for k, (task, figure) in enumerate(zip(tasks, figures, strict=True)):
        parts = tuple(summarise(figure, *span) for span in spans)
        whole = summarise(figure, "total", 0, spans[-1][2])
        sizes = [task.bundle_bytes(block) for block in task.contender.blocks]
        cached = sum(capacity * size for capacity, size in zip(task.capacities, sizes, strict=True))
        dram = cached + resident_bytes(task.contender, task.way.bundle_bytes)
        gains = tuple(of_source[k] for of_source in by_source)
        room = sum(task.capacities)
        rows.append(BenchRow(task.way, room, dram, whole, parts, ratios[2 * k], ratios[2 * k + 1], gains))
    return tuple(rows)


def _gains_within(
    times: Mapping[Way, npt.NDArray[np.float64]],
    tasks: Sequence[Task],
    starts: npt.NDArray[np.int64],
    first: int,
    last: int,
) -> list[Ratio]:
    """The gain of every way over its baseline on the sequences that start from token `first` on and before `last`."""
    span = slice(*np.searchsorted(starts, [first, last]).tolist())
    return bootstrap_ratios([(times[task.way.baseline][span], times[task.way][span]) for task in tasks])
