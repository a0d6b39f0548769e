"""What reading takes with more and more DRAM, and how long the runs of active slots are, in every order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import Contender, TokenRange
from neuralink_cli.bench.dram import block_capacities, dram_bytes
from neuralink_cli.bench.figures import summarise
from neuralink_cli.bench.preflight import tell_needs
from neuralink_cli.bench.replay import BlockReads
from neuralink_cli.bench.ways import Task, Way, replay_ways
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.errors import OptionError
from neuralink_cli.placement.placement import FREQUENCY, ORIGINAL
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import NO_CACHE

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class CurvePoint:
    """One budget.

    Attributes:
        share: DRAM as a share of all bundles.
        io_mean: Mean seconds of reading per token.
        hit_rate: Share of the active neurons that were in DRAM.
    """

    share: float
    io_mean: float
    hit_rate: float


@dataclass(frozen=True)
class CurveLine:
    """An order, read with access collapse or without, over budgets in ascending order."""

    order: str
    collapse: bool
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True, eq=False)
class RunLengths:
    """How often runs of active slots have each length, over all tokens and blocks: int64, by length from 0 on."""

    order: str
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class DramCurve:
    """What some tokens take over budgets of DRAM.

    Attributes:
        lines: The original order read naively, then original, frequency and stored order with access collapse.
        runs: Of these three orders, without DRAM.
    """

    tokens: int
    lines: tuple[CurveLine, ...]
    runs: tuple[RunLengths, ...]


class _RunCounter:
    """Counts the reads of each length; without access collapse and cache, these are the runs."""

    def __init__(self, most: int) -> None:
        self.counts = np.zeros(most + 1, dtype=np.int64)

    def __call__(self, reads: BlockReads) -> None:
        found = reads.count[: int(reads.ends[-1]) if reads.ends.size else 0]
        self.counts += np.bincount(found, minlength=self.counts.size)


def dram_curve(
    trace: Trace,
    contender: Contender,
    device: DeviceModel,
    policy: str,
    tokens: Sequence[TokenRange],
    *,
    progress: Progress = no_progress,
) -> DramCurve:
    """Replay tokens with every budget of `SHARES` that holds what the layout pins, each from an empty cache."""
    orders = ((ORIGINAL, None), (FREQUENCY, None), (contender.order, str(contender.path)))
    lines = [(orders[0], False), *((order, True) for order in orders)]
    rooms = [(share, room) for share in SHARES if (room := _capacities(contender, share)) is not None]

    def task(order: tuple[str, str | None], collapse: bool, room: tuple[int, ...]) -> Task:
        name, layout = order
        cache = policy if any(room) else NO_CACHE
        return Task(Way(name, layout, collapse, cache, device.name, None), contender, device, room)

    tasks = [task(order, collapse, room) for order, collapse in lines for _, room in rooms]
    empty = (0,) * len(contender.blocks)
    first_run = len(tasks)
    tasks += [task(order, False, empty) for order in orders]
    longest = max(block.neurons for block in contender.blocks)
    counters = [_RunCounter(longest) for _ in orders]
    count = sum(part.tokens for part in tokens)
    tell_needs(trace, [contender], count, len(tasks), record=False)
    with progress("DRAM", len(trace.info.blocks) * len(tasks), "row") as advance:
        replayed = replay_ways(trace, tokens, tasks, dict(enumerate(counters, first_run)), advance)
    figures = [summarise(each, "total", 0, count) for each in replayed.figures]
    found = []
    for k, ((name, _), collapse) in enumerate(lines):
        of_line = figures[k * len(rooms) : (k + 1) * len(rooms)]
        points = [
            CurvePoint(share, each.io_mean, each.hit_rate) for (share, _), each in zip(rooms, of_line, strict=True)
        ]
        found.append(CurveLine(name, collapse, tuple(points)))
    runs = [RunLengths(name, counter.counts) for (name, _), counter in zip(orders, counters, strict=True)]
    return DramCurve(count, tuple(found), tuple(runs))


def _capacities(contender: Contender, share: float) -> tuple[int, ...] | None:
    """Bundles in DRAM of each block; None if the share does not hold the pinned ones."""
    try:
        return block_capacities(contender, dram_bytes([contender], DramBudget(fraction=share), None), None)
    except OptionError:
        return None
