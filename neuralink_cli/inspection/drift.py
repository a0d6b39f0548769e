"""Is a stored order still good on new traffic? Its gain when it was made, and its gain on the tokens of a new trace."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.bench.contenders import Contender, TokenRange, choose_tokens, device_made_for, read_contender
from neuralink_cli.clustering.ordering_work import OrderingWork, in_threads, order_blocks
from neuralink_cli.clustering.preflight import tell_needs
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio, bootstrap_ratios
from neuralink_cli.errors import InputError, OptionError, VerificationError
from neuralink_cli.inspection.costs import OrderCosts, measure_orders
from neuralink_cli.inspection.facts import Facts, read_facts
from neuralink_cli.inspection.kinds import PLACED_KINDS, recognise, with_article
from neuralink_cli.ordering.block_ordering import BlockOptions
from neuralink_cli.placement.bundle_sizes import bundle_bytes_of
from neuralink_cli.placement.held_out import TokenSplit, digests_in, sequence_starts_in, split_tokens, unseen_ranges
from neuralink_cli.placement.placement import DEFAULT_ORDER, EFFORT_NAMES, ORDER_NAMES
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.weight_formats.formats import SOURCE

_LOGGER = logging.getLogger(__name__)

FELL, ROSE, HOLDS, UNKNOWN = "fell", "rose", "holds", "unknown"
# Of each source, what measures a new order, if the old one held out none.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class BlockDrift:
    """One block.

    Attributes:
        gain: Cost of the original order over that of the stored one, both read with access collapse, on the new tokens.
        gain_then: The same when it was made; None where the artefact does not say it, as bundled layouts.
        active_ratio: Share of the neurons that fire on the new tokens.
        active_ratio_then: The same on the tokens that made the order.
        moved: Share of all firings that are at other neurons than when the order was made, 0 to 1. Chance moves some
            where there are few tokens.
    """

    id: str
    gain: float
    gain_then: float | None
    active_ratio: float
    active_ratio_then: float
    moved: float


@dataclass(frozen=True)
class SourceDrift:
    """The new tokens of one dataset; gains as in `DriftReport`."""

    source: str
    tokens: int
    gain: Ratio
    gain_over_naive: Ratio


@dataclass(frozen=True)
class Reordered:
    """What ordering again on the new trace gives, on tokens that it held out and that neither order has seen.

    Attributes:
        tokens: How many tokens these are.
        gain_before: Of the stored order on them, as `DriftReport.gain`.
        gain: Of the new order.
        saving: Cost of the stored order over that of the new one.
    """

    order: str
    effort: str
    tokens: int
    gain_before: Ratio
    gain: Ratio
    saving: Ratio


@dataclass(frozen=True)
class DriftReport:
    """A stored order on new traffic. All intervals are 95 % bootstrap intervals over sequences.

    Attributes:
        kind: Of the artefact, as in `kinds`.
        device: The device that the order was made for, which costs are modelled on.
        tokens: The tokens that were replayed; `left_out` more made the order.
        gain: Cost of the original order over that of the stored one, both read with access collapse.
        gain_over_naive: Cost of the original order without access collapse over that of the stored one with it.
        gain_then, gain_over_naive_then: The same on the tokens held out when the order was made; None if there were
            none.
        change: `fell` or `rose` if the intervals of `gain_then` and `gain` do not overlap, else `holds`; `unknown`
            without the former.
        active_ratio, active_ratio_then: As in `BlockDrift`, of all blocks together.
        calibrated_ratio: What the thresholds were calibrated to; None if they are 0.
        made_for_other_bundles: Whether the layout's bundles have another size than the order was made and measured
            for, so that gains then and now differ by that too.
        reordered: None if that was not asked for.
    """

    artefact: str
    kind: str
    trace: str
    device: str
    tokens: tuple[TokenRange, ...]
    left_out: int
    gain: Ratio
    gain_over_naive: Ratio
    gain_then: Ratio | None
    gain_over_naive_then: Ratio | None
    change: str
    active_ratio: float
    active_ratio_then: float
    calibrated_ratio: float | None
    made_for_other_bundles: bool
    sources: tuple[SourceDrift, ...]
    blocks: tuple[BlockDrift, ...]
    reordered: Reordered | None

    @property
    def moved_most(self) -> tuple[BlockDrift, ...]:
        """The blocks, those that moved most first."""
        return tuple(sorted(self.blocks, key=lambda block: -block.moved))

    def check_gain(self, least: float | None) -> None:
        """Require that the gain is not reliably below `least`: the upper end of its interval counts. None for any.

        Raises:
            VerificationError: It is.
        """
        if least is not None and self.gain.high < least:
            raise VerificationError(
                f"the gain has fallen to {self.gain}, reliably below {least:g}",
                where=self.artefact,
                fix="see what `neuralink drift --reorder` would give, then run `cluster` on the new trace",
            )


def drift(
    artefact: Path,
    trace: Path,
    *,
    reorder: bool = False,
    effort: str | None = None,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> DriftReport:
    """Measure the order of a layout or placement on a trace of new traffic, beside what it gained when it was made.

    Tokens that made the order are left out. Costs are modelled as by `cluster`, on the device that the order was made
    for, so that gains then and now can be compared.

    Args:
        reorder: Also order the blocks again on the new trace, as the stored order was made, and measure that.
        effort: How long to refine the new order; by default as for the stored one.
        jobs: Blocks to order at a time.

    Raises:
        OptionError: Every token of the trace made the order, or nothing of it can be held out to measure a new one.
        InputError: `artefact` is no layout or placement, or one of the two is damaged.
        VerificationError: Files of the layout do not fit each other.
        MismatchError: They are of different models.
    """
    found = recognise(artefact)
    if found.kind not in PLACED_KINDS:
        raise InputError(
            f"is {with_article(found.kind)}, but only layouts and placements can drift",
            where=artefact,
            fix="pass what `cluster` or `relayout` wrote, and the trace of new traffic with --trace",
        )
    facts = read_facts(found)
    with Trace(trace) as opened:
        opened.check_content()
        contender = read_contender(artefact, opened)
        tokens = choose_tokens(opened, [contender], None, None)
        device = device_made_for(contender)
        split = _split(opened, contender, facts) if reorder else None
        (costs,) = measure_orders(opened, [contender], tokens, device, progress=progress)
        made = None if split is None else _reorder(opened, contender, facts, split, device, effort, jobs, progress)
        replayed, neurons = sum(part.tokens for part in tokens), sum(block.neurons for block in contender.blocks)
        fired = sum(int(block.sum()) for block in costs.fired)
        gain, gain_over_naive = _gains(costs)
        then = facts.gain
        return DriftReport(
            artefact=str(artefact),
            kind=facts.kind,
            trace=str(trace),
            device=device.name,
            tokens=tokens,
            left_out=_left_out(opened, contender),
            gain=gain,
            gain_over_naive=gain_over_naive,
            gain_then=None if then is None else then.gain,
            gain_over_naive_then=None if then is None else then.gain_over_naive,
            change=UNKNOWN if then is None else _change(then.gain, gain),
            active_ratio=fired / (replayed * neurons),
            active_ratio_then=sum(float(block.frequency.sum()) for block in contender.blocks) / neurons,
            calibrated_ratio=None if facts.calibration is None else float(facts.calibration["active_ratio"]),
            made_for_other_bundles=_has_other_bundles(opened, contender),
            sources=_sources(opened, tokens, costs),
            blocks=_blocks(contender, facts, costs, replayed),
            reordered=made,
        )


def _gains(costs: OrderCosts, part: slice = slice(None)) -> list[Ratio]:
    """The gain over the original order, and that over naive reading, on some of the sequences."""
    stored, original, naive = (kind.sum(axis=0)[part] for kind in (costs.stored, costs.original, costs.naive))
    return bootstrap_ratios([(original, stored), (naive, stored)])


def _change(then: Ratio, now: Ratio) -> str:
    return FELL if now.high < then.low else ROSE if now.low > then.high else HOLDS


def _left_out(trace: Trace, contender: Contender) -> int:
    known = np.array([digest.tobytes() in contender.seen for digest in trace.sequence_digests], dtype=bool)
    return int(trace.sequence_lengths[known].sum(dtype=np.int64))


def _sources(trace: Trace, tokens: Sequence[TokenRange], costs: OrderCosts) -> tuple[SourceDrift, ...]:
    found, end = [], 0
    for name, group in groupby(tokens, lambda part: part.source):
        parts = list(group)
        start, end = end, end + sequence_starts_in(trace, [(part.start, part.stop) for part in parts]).size
        found.append(SourceDrift(name, sum(part.tokens for part in parts), *_gains(costs, slice(start, end))))
    return tuple(found)


def _blocks(contender: Contender, facts: Facts, costs: OrderCosts, tokens: int) -> tuple[BlockDrift, ...]:
    gains = {block.id: block.gain for block in facts.blocks}
    found = []
    for k, block in enumerate(contender.blocks):
        stored, original = float(costs.stored[k].sum()), float(costs.original[k].sum())
        then = np.empty(block.neurons)
        then[block.order] = block.frequency
        found.append(
            BlockDrift(
                id=block.id,
                gain=original / stored if stored else 1.0,
                gain_then=gains.get(block.id),
                active_ratio=int(costs.fired[k].sum()) / (tokens * block.neurons),
                active_ratio_then=float(then.mean()),
                moved=moved_share(then, costs.fired[k]),
            )
        )
    return tuple(found)


def moved_share(then: npt.NDArray[Any], now: npt.NDArray[Any]) -> float:
    """Share of firings that are at other neurons than before: half the summed difference of two distributions.

    Args:
        then: How often each neuron fired, `[neurons]`, in any unit.
        now: The same later.

    Returns:
        0 if all neurons have the share of firings that they had, 1 if none that fired fires now.
    """
    before, after = float(then.sum()), float(now.sum())
    if not (before and after):
        return float(before != after)
    return float(np.abs(then / before - now / after).sum() / 2)


def _has_other_bundles(trace: Trace, contender: Contender) -> bool:
    """Whether bundles have another size than the options of `cluster` made the order for."""
    asked = contender.parameters
    for block, stored in zip(trace.info.blocks, contender.blocks, strict=True):
        resident = asked.get("resident", "none")
        made_for = asked.get("bundle_bytes") or bundle_bytes_of(block, asked.get("weights", SOURCE), resident=resident)
        if made_for != stored.stride:
            return True
    return False


def _split(trace: Trace, contender: Contender, facts: Facts) -> TokenSplit:
    """What makes a new order, and what measures it beside the old one: tokens that neither has seen.

    Raises:
        OptionError: There are none of the latter.
    """
    made = split_tokens(trace, facts.options.get("held_out") or _HELD_OUT)
    seen = contender.seen | {digest.tobytes() for part in made.ordering for digest in digests_in(trace, part)}
    tails = zip(made.ordering, trace.source_ranges(), strict=True)
    held_out = tuple(unseen_ranges(trace, (cut, stop), seen) for (_, cut), (_, stop) in tails)
    if not any(held_out):
        raise OptionError(
            f"nothing of {trace.path} can be held out to measure a new order",
            fix="leave --reorder out, or profile more new text",
        )
    return TokenSplit(made.ordering, held_out)


def _reorder(
    trace: Trace,
    contender: Contender,
    facts: Facts,
    split: TokenSplit,
    device: DeviceModel,
    effort: str | None,
    jobs: int | None,
    progress: Progress,
) -> Reordered:
    """Order again as the stored order was made, with as many neurons pinned in each block."""
    order = facts.options.get("order", DEFAULT_ORDER)
    wanted = effort or facts.options.get("effort", "normal")
    if order not in ORDER_NAMES or wanted not in EFFORT_NAMES:
        raise InputError(f"was made with order {order!r} and effort {wanted!r}, which are not known", where=facts.path)
    stored = {block.id: block for block in contender.blocks}

    def options(block: TraceBlock) -> BlockOptions:
        old = stored[block.id]
        ratio = device.operation_in_bundles(old.stride)
        return BlockOptions(order, old.pinned, ratio, wanted, int(facts.options.get("fewest_tokens", 0)))

    tell_needs(trace, split, float(facts.options.get("pin_hot", 0)), jobs, stored=False)
    work = OrderingWork(trace, split, options)
    made = dict(order_blocks(work, partial(in_threads, jobs=jobs), progress))
    blocks = tuple(
        replace(old, order=made[index].placed.order, pinned=made[index].pinned)
        for index, old in enumerate(contender.blocks)
    )
    names = [source.name for source in trace.info.sources]
    held = tuple(TokenRange(name, *part) for name, ranges in zip(names, split.held_out, strict=True) for part in ranges)
    before, after = measure_orders(trace, [contender, replace(contender, blocks=blocks)], held, device)
    (saving,) = bootstrap_ratios([(before.stored.sum(axis=0), after.stored.sum(axis=0))])
    tokens = sum(part.tokens for part in held)
    return Reordered(order, wanted, tokens, _gains(before)[0], _gains(after)[0], saving)
