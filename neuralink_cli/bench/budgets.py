"""What an order gains and reads with each of several budgets of DRAM, with the figures and intervals of the bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.bench import sequence_starts
from neuralink_cli.bench.contenders import Contender, TokenRange
from neuralink_cli.bench.dram import block_capacities, dram_bytes
from neuralink_cli.bench.figures import Figures, summarise
from neuralink_cli.bench.preflight import tell_needs
from neuralink_cli.bench.ways import Task, Way, replay_ways
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio, bootstrap_ratios
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import NO_CACHE

# The order, the original one read the same way, and that read naively.
_WAYS = 3


@dataclass(frozen=True)
class BudgetFigures:
    """What the stored order, read with access collapse, takes with one budget.

    Attributes:
        dram_bytes: What cached and pinned bundles take, and the rows that are kept resident.
        gain: As `BenchRow.gain`.
        gain_over_naive: As `BenchRow.gain_over_naive`.
    """

    budget: DramBudget
    dram_bytes: int
    figures: Figures
    gain: Ratio
    gain_over_naive: Ratio


def replay_budgets(
    trace: Trace,
    contender: Contender,
    device: DeviceModel,
    policy: str,
    tokens: tuple[TokenRange, ...],
    budgets: Sequence[DramBudget],
    *,
    progress: Progress = no_progress,
) -> tuple[BudgetFigures, ...]:
    """Replay tokens with every budget, each from an empty cache.

    Raises:
        OptionError: A budget does not hold what the contender keeps in DRAM.
    """
    path = str(contender.path)
    rooms, tasks = [], []
    for budget in budgets:
        room = dram_bytes([contender], budget, None)
        capacities = block_capacities(contender, room, None)
        rooms.append(sum(count * block.stride for count, block in zip(capacities, contender.blocks, strict=True)))
        stored = Way(contender.order, path, True, policy if room else NO_CACHE, device.name, None)
        tasks += [Task(way, contender, device, capacities) for way in (stored, stored.baseline, stored.naive)]
    count = sum(part.tokens for part in tokens)
    tell_needs(trace, [contender], count, len(tasks), record=False)
    with progress("replay", len(trace.info.blocks) * len(tasks), "row") as advance:
        figures = replay_ways(trace, tokens, tasks, {}, advance).figures
    starts = sequence_starts(trace, tokens)
    times = [np.add.reduceat(each.seconds, starts) for each in figures]
    firsts = range(0, len(tasks), _WAYS)
    ratios = bootstrap_ratios([(times[first + k], times[first]) for first in firsts for k in (1, 2)])
    return tuple(
        BudgetFigures(
            budget=budget,
            dram_bytes=rooms[k] + contender.resident_bytes,
            figures=summarise(figures[first], "total", 0, count),
            gain=ratios[2 * k],
            gain_over_naive=ratios[2 * k + 1],
        )
        for k, (budget, first) in enumerate(zip(budgets, firsts, strict=True))
    )
