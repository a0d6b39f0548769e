"""Measures what a report shows: the bench on held-out tokens, and samples of them for the curve and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.blocks import experts_of
from neuralink_cli.bench.bench import BenchedBlocks, BenchOptions, BenchReport, BenchRow, bench_contenders
from neuralink_cli.bench.contenders import Contender, TokenRange, choose_tokens, device_made_for, first_tokens
from neuralink_cli.bench.dram_curve import DramCurve, dram_curve
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.placement.placement import FREQUENCY, ORIGINAL
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.report.pictures import BlockPictures, block_pictures
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import DEFAULT_POLICY, NO_CACHE

# So that a report of a 7B model takes about a minute, no more tokens are replayed than about so many neurons fire at.
# The curve replays each in some thirty ways.
_MOST_FIRING = 50_000_000
_CURVE_TOKENS, _CURVE_FIRING = 2048, 5_000_000


@dataclass(frozen=True)
class ReportOptions:
    """What to measure.

    Attributes:
        device: Device model to replay on; None for the device the layout was made for.
        dram: DRAM for cached and pinned bundles and resident rows, as for the bench.
        policy: Name of the cache's policy.
        tokens: Replay at most this many; None for as many as take about half a minute.
    """

    device: DeviceModel | None = None
    dram: DramBudget = field(default_factory=lambda: DramBudget(fraction=0.05))
    policy: str = DEFAULT_POLICY
    tokens: int | None = None


@dataclass(frozen=True)
class LayerFigures:
    """A layer: a block, or the experts of one.

    Attributes:
        gain: As `BenchRow.gain`, of this layer alone; 1 if it reads nothing.
        gain_over_naive: As `BenchRow.gain_over_naive`.
        active_ratio: Share of the neurons that fire at a token that the block runs on.
    """

    name: str
    blocks: int
    gain: float
    gain_over_naive: float
    active_ratio: float


@dataclass(frozen=True)
class Measurements:
    """Everything that a report shows of a layout, except where it came from.

    Attributes:
        stored: The row of the layout, read with access collapse and with the cache there is.
        original: That of the original order, read the same way.
        naive: That of the original order without access collapse.
        pictures: Of the block whose gain is the median.
        neurons: Of all blocks.
        held_out: Tokens of the trace that made no order.
    """

    bench: BenchReport
    device: DeviceModel
    stored: BenchRow
    original: BenchRow
    naive: BenchRow
    layers: tuple[LayerFigures, ...]
    curve: DramCurve
    pictures: BlockPictures

    neurons: int
    held_out: int

    @property
    def tokens(self) -> int:
        """Tokens that the gains are measured on: the first of the tokens that made no order, of each source."""
        return sum(part.tokens for part in self.bench.tokens)


def measure(
    trace: Trace, contender: Contender, options: ReportOptions, *, progress: Progress = no_progress
) -> Measurements:
    """Measure a layout on the tokens of a trace that made none of its orders.

    Raises:
        OptionError: Every token made the order, or the DRAM does not hold what the layout keeps in it.
    """
    device = options.device or device_made_for(contender)
    held_out = choose_tokens(trace, [contender], None, None)
    # How many fire is taken from the tokens that made the order.
    firing = max(sum(float(block.frequency.sum()) for block in contender.blocks), 1.0)
    tokens = first_tokens(held_out, options.tokens or max(int(_MOST_FIRING / firing), 1))
    bench = BenchOptions(
        devices=(device,), dram=options.dram, policy=options.policy, baselines=(ORIGINAL, FREQUENCY), uncached=False
    )
    benched = bench_contenders(trace, [contender], tokens, bench, progress=progress)
    rows = benched.report.rows
    stored = next(k for k in reversed(range(len(rows))) if rows[k].way.layout is not None and rows[k].way.collapse)
    ways = [row.way for row in rows]
    original, naive = ways.index(ways[stored].baseline), ways.index(ways[stored].naive)
    sample = max(min(_CURVE_TOKENS, int(_CURVE_FIRING / firing)), 1)
    policy = DEFAULT_POLICY if options.policy == NO_CACHE else options.policy
    curve = dram_curve(trace, contender, device, policy, first_tokens(tokens, sample), progress=progress)
    return Measurements(
        bench=benched.report,
        device=device,
        stored=rows[stored],
        original=rows[original],
        naive=rows[naive],
        layers=_layers(trace, tokens, benched, stored, original, naive),
        curve=curve,
        pictures=_pictures(trace, contender, tokens, benched, stored, original),
        neurons=sum(block.neurons for block in contender.blocks),
        held_out=sum(part.tokens for part in held_out),
    )


def _layers(
    trace: Trace, tokens: Sequence[TokenRange], benched: BenchedBlocks, stored: int, original: int, naive: int
) -> tuple[LayerFigures, ...]:
    groups: dict[str, list[int]] = {}
    for index, block in enumerate(trace.info.blocks):
        groups.setdefault(experts_of(block.id) or block.id, []).append(index)
    found = []
    for name, members in groups.items():
        times = benched.block_seconds[:, members].sum(axis=1)
        ran = [
            sum(trace.tokens_of(trace.info.blocks[k], part.start, part.stop).size for part in tokens) for k in members
        ]
        possible = sum(trace.info.blocks[k].neurons * count for k, count in zip(members, ran, strict=True))
        found.append(
            LayerFigures(
                name=name,
                blocks=len(members),
                gain=_ratio(times[original], times[stored]),
                gain_over_naive=_ratio(times[naive], times[stored]),
                active_ratio=int(benched.block_active[members].sum()) / possible if possible else 0.0,
            )
        )
    return tuple(found)


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom > 0 else 1.0


def _pictures(
    trace: Trace,
    contender: Contender,
    tokens: Sequence[TokenRange],
    benched: BenchedBlocks,
    stored: int,
    original: int,
) -> BlockPictures:
    """Of the block whose gain is the median: neither the best nor the worst that there is to see."""
    fires = np.flatnonzero(benched.block_active)
    candidates = fires if fires.size else np.arange(len(contender.blocks))
    gains = [_ratio(benched.block_seconds[original, k], benched.block_seconds[stored, k]) for k in candidates]
    median = int(candidates[np.argsort(gains, kind="stable")[(len(gains) - 1) // 2]])
    return block_pictures(trace, median, contender.blocks[median], tokens)
