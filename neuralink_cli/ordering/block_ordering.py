"""Orders one block of a trace: makes orders on some tokens, measures them on held-out tokens, picks one to store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import FiredTokens, TraceBlock
from neuralink_cli.arrays import Neurons
from neuralink_cli.devices.cost import order_cost, token_costs
from neuralink_cli.ordering.baselines import frequency_order, original_order
from neuralink_cli.ordering.orders import NeuronOrder, OrderingTask, make_orders, pinned_first
from neuralink_cli.ordering.own_orders import OwnOrder
from neuralink_cli.placement.bits import WORD, Bits, activation_counts, empty_bits, transpose_into
from neuralink_cli.placement.held_out import Range, TokenSplit, read_statistics, sequence_starts_in
from neuralink_cli.placement.placement import COMPARED_ORDERS, ORIGINAL, REFINED, HeldOutReads, OrderCost, PlacedBlock

STRETCH = 8192
"""Tokens whose rows are in memory at a time while bit vectors are made from them: a multiple of 64."""


@dataclass(frozen=True)
class BlockOptions:
    """How to order a block.

    Attributes:
        order: Name of the order to store.
        pinned: How many of the hottest neurons live in DRAM and are left out of the ordering.
        operation_in_bundles: What a read operation costs on the device, in bundles.
        effort: Effort of the refinement.
        fewest_tokens: An expert that saw fewer tokens keeps its original order.
        own: Orders that the user brings, all of them compared.
        threads: How many threads count; None for one on each CPU. Does not change the result.
    """

    order: str
    pinned: int
    operation_in_bundles: float
    effort: str
    fewest_tokens: int = 0
    own: tuple[OwnOrder, ...] = ()
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class SequenceCosts:
    """What held-out sequences cost in a block, in bundles: float64 `[sequences]`, those of all sources in turn.

    Attributes:
        collapsed: By order, read with access collapse.
        naive: The original order, read without.
    """

    collapsed: Mapping[str, npt.NDArray[np.float64]]
    naive: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OrderedBlock:
    """An ordered block.

    Attributes:
        placed: The order that is stored.
        chosen: Its name.
        tokens: How many tokens made it.
        pinned: How many slots, from 0 on, hold the hottest neurons.
        held_out: Figures of all orders compared, each as it would be stored.
        costs: The same by sequence, see `SequenceCosts`.
    """

    placed: PlacedBlock
    chosen: str
    tokens: int
    pinned: int
    held_out: tuple[HeldOutReads, ...]
    costs: SequenceCosts


def order_block(
    trace: FiredTokens,
    block: TraceBlock,
    split: TokenSplit,
    source_names: Sequence[str],
    options: BlockOptions,
    between_sweeps: Callable[[], object] | None = None,
) -> OrderedBlock:
    """Order one block on the tokens of the ordering and measure every order on the held-out tokens.

    An expert that too few tokens were routed to is not ordered, and pins nothing. Every other order, the original one
    included, has the pinned neurons first. Of the others the order asked for is stored unless the
    original order costs less on the held-out tokens; if the refined order is asked for, the cheapest of those compared.
    What `between_sweeps` raises ends the work.
    """
    bits = block_bits(trace, block, split.ordering)
    counts = activation_counts(bits)
    tokens = count_tokens(trace, block, split.ordering)
    too_few = block.routed is not None and tokens < options.fewest_tokens
    pinned = frequency_order(counts)[: 0 if too_few else options.pinned]
    rest = np.setdiff1d(np.arange(block.neurons, dtype=np.int32), pinned)
    task = OrderingTask(
        bits[rest] if pinned.size else bits,
        options.operation_in_bundles,
        options.effort,
        between_sweeps,
        {own.name: own.maker(block, rest) for own in options.own},
        options.threads,
    )
    compared = {*COMPARED_ORDERS, options.order, *task.own}
    made = dict.fromkeys(compared, _unchanged(rest.size)) if too_few else make_orders(task, compared)
    orders = {name: pinned_first(pinned, rest, order) for name, order in made.items()}
    measured = [
        _measure(trace, block, held, name, orders, pinned, options)
        for held, name in zip(split.held_out, source_names, strict=True)
    ]
    held_out = tuple(figures for figures, _ in measured)
    costs = SequenceCosts(
        {name: np.concatenate([cost.collapsed[name] for _, cost in measured]) for name in orders},
        np.concatenate([cost.naive for _, cost in measured]),
    )
    chosen = ORIGINAL if too_few else _choose(options.order, held_out)
    order = orders[chosen]
    all_tokens = sum(stop - start for start, stop in split.ordering)
    frequency = (counts[order.order] / max(all_tokens, 1)).astype(np.float32)
    return OrderedBlock(PlacedBlock(order.order, frequency, order.links), chosen, tokens, pinned.size, held_out, costs)


def count_tokens(trace: FiredTokens, block: TraceBlock, ranges: Sequence[Range]) -> int:
    """How many tokens of some ranges a block ran on."""
    rows = [trace.rows(block, *part) for part in ranges]
    return sum(last - first for first, last in rows)


def block_bits(trace: FiredTokens, block: TraceBlock, ranges: Sequence[Range]) -> Bits:
    """Bit vectors of a block over those tokens of some ranges that it ran on: uint64 `[neurons, words]`."""
    parts = [trace.rows(block, *part) for part in ranges]
    bits = empty_bits(block.neurons, sum(last - first for first, last in parts))
    rows = np.empty((STRETCH, block.row_bytes), dtype=np.uint8)
    filled = words = 0
    # In stretches of whole words, so that the rows are never in memory as a whole.
    for start, stop in parts:
        for first in range(start, stop, STRETCH):
            left = trace.read_rows(block, first, min(first + STRETCH, stop))
            while left.shape[0]:
                taken = left[: STRETCH - filled]
                rows[filled : filled + taken.shape[0]] = taken
                filled, left = filled + taken.shape[0], left[taken.shape[0] :]
                if filled == STRETCH:
                    transpose_into(rows, bits, words)
                    filled, words = 0, words + STRETCH // WORD
    transpose_into(rows[:filled], bits, words)
    return bits


def _unchanged(neurons: int) -> NeuronOrder:
    as_it_was = original_order(neurons)
    return NeuronOrder(as_it_was, as_it_was)


def _measure(
    trace: FiredTokens,
    block: TraceBlock,
    held_out: Sequence[Range],
    source: str,
    orders: Mapping[str, NeuronOrder],
    pinned: Neurons,
    options: BlockOptions,
) -> tuple[HeldOutReads, SequenceCosts]:
    tokens = sum(stop - start for start, stop in held_out)
    routed = count_tokens(trace, block, held_out)
    bits = block_bits(trace, block, held_out)
    # Pinned neurons are never read from flash, wherever an order has them.
    bits[pinned] = 0
    figures = {name: _cost(bits, order.order, routed, options.operation_in_bundles) for name, order in orders.items()}
    active = int(activation_counts(bits).sum())
    permutations = {name: order.order for name, order in orders.items()}
    costs = cost_sequences(trace, block, held_out, bits, permutations, options.operation_in_bundles)
    return HeldOutReads(source=source, tokens=tokens, routed=routed, active=active, orders=figures), costs


def cost_sequences(
    trace: FiredTokens,
    block: TraceBlock,
    ranges: Sequence[Range],
    bits: Bits,
    orders: Mapping[str, Neurons],
    operation_in_bundles: float,
) -> SequenceCosts:
    """What each sequence of some ranges of tokens costs in a block, in bundles.

    Args:
        ranges: Ascending.
        bits: From `block_bits` of these ranges, without the neurons that are not read from flash.
        orders: By name, each with all neurons of the block; one of them is the original order.
    """
    positions = np.concatenate([np.zeros(0, np.uint32), *(trace.tokens_of(block, *part) for part in ranges)])
    starts = sequence_starts_in(trace, ranges)
    collapsed = {name: np.zeros(starts.size) for name in orders}
    naive = np.zeros(starts.size)
    # In stretches: some numbers for every token are more than the bits of few neurons.
    for first in range(0, positions.size, STRETCH):
        tokens = positions[first : first + STRETCH]
        sequence = np.searchsorted(starts, tokens, side="right") - 1
        some = np.ascontiguousarray(bits[:, first // WORD : (first + STRETCH) // WORD])
        for name, order in orders.items():
            across, apart = token_costs(some, order, operation_in_bundles, tokens.size)
            # Token by token, so that the sums do not depend on the stretches.
            np.add.at(collapsed[name], sequence, across)
            if name == ORIGINAL:
                np.add.at(naive, sequence, apart)
    return SequenceCosts(collapsed, naive)


def _cost(bits: Bits, order: npt.NDArray[np.int32], tokens: int, operation_in_bundles: float) -> OrderCost:
    return OrderCost(
        reads=read_statistics(bits, order, tokens).reads, cost=order_cost(bits, order, operation_in_bundles)
    )


def _choose(wanted: str, held_out: Sequence[HeldOutReads]) -> str:
    costs = {name: sum(part.orders[name].cost for part in held_out) for name in held_out[0].orders}
    candidates = (wanted, *COMPARED_ORDERS) if wanted == REFINED else (wanted, ORIGINAL)
    return min(dict.fromkeys(candidates), key=lambda name: costs[name])
