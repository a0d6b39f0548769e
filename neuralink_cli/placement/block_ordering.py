"""Orders one block of a trace: makes orders on some tokens, measures them on held-out tokens, picks one to store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import Trace, TraceBlock
from neuralink_cli.arrays import Neurons
from neuralink_cli.devices.cost import order_cost
from neuralink_cli.placement.baselines import frequency_order, original_order
from neuralink_cli.placement.bits import Bits, activation_counts, transpose_bits
from neuralink_cli.placement.held_out import Range, TokenSplit, read_statistics
from neuralink_cli.placement.orders import NeuronOrder, OrderingTask, make_orders, pinned_first
from neuralink_cli.placement.placement import COMPARED_ORDERS, ORIGINAL, REFINED, HeldOutReads, OrderCost, PlacedBlock


@dataclass(frozen=True)
class BlockOptions:
    """How to order a block.

    Attributes:
        order: Name of the order to store.
        pinned: How many of the hottest neurons live in DRAM and are left out of the ordering.
        operation_in_bundles: What a read operation costs on the device, in bundles.
        effort: Effort of the refinement.
        fewest_tokens: An expert that saw fewer tokens keeps its original order.
    """

    order: str
    pinned: int
    operation_in_bundles: float
    effort: str
    fewest_tokens: int = 0


@dataclass(frozen=True, eq=False)
class OrderedBlock:
    """The order to store, its name, how many tokens made it, and the held-out figures of all compared orders."""

    placed: PlacedBlock
    chosen: str
    tokens: int
    held_out: tuple[HeldOutReads, ...]


def order_block(
    trace: Trace,
    block: TraceBlock,
    split: TokenSplit,
    source_names: Sequence[str],
    options: BlockOptions,
    between_sweeps: Callable[[], object] | None = None,
) -> OrderedBlock:
    """Order one block on the tokens of the ordering and measure every order on the held-out tokens.

    An expert with too few routed tokens keeps its original order. Any other block gets the order asked for, unless the
    original order costs less on the held-out tokens; if the refined order is asked for, the cheapest compared order. An
    exception from `between_sweeps` stops the work.
    """
    bits = block_bits(trace, block, split.ordering)
    counts = activation_counts(bits)
    pinned = frequency_order(counts)[: options.pinned]
    rest = np.setdiff1d(np.arange(block.neurons, dtype=np.int32), pinned)
    task = OrderingTask(
        bits[rest] if pinned.size else bits, options.operation_in_bundles, options.effort, between_sweeps
    )
    tokens = int(sum(trace.tokens_of(block, *ordering).size for ordering in split.ordering))
    compared = {*COMPARED_ORDERS, options.order}
    too_few = block.routed is not None and tokens < options.fewest_tokens
    made = dict.fromkeys(compared, _unchanged(rest.size)) if too_few else make_orders(task, compared)
    orders = {name: _whole(name, order, pinned, rest, block.neurons) for name, order in made.items()}
    held_out = tuple(
        _measure(trace, block, held, name, orders, pinned, options)
        for held, name in zip(split.held_out, source_names, strict=True)
    )
    chosen = ORIGINAL if too_few else _choose(options.order, held_out)
    order = orders[chosen]
    all_tokens = sum(stop - start for start, stop in split.ordering)
    frequency = (counts[order.order] / max(all_tokens, 1)).astype(np.float32)
    return OrderedBlock(PlacedBlock(order.order, frequency, order.links), chosen, tokens, held_out)


def block_bits(trace: Trace, block: TraceBlock, ranges: Sequence[Range]) -> Bits:
    """Bit vectors of a block over the tokens in some ranges that it ran on: uint64 `[neurons, words]`."""
    fired = [trace.fired(block, start, stop) for start, stop in ranges]
    return transpose_bits(fired[0] if len(fired) == 1 else np.concatenate(fired), block.neurons)


def _whole(name: str, order: NeuronOrder, pinned: Neurons, rest: Neurons, neurons: int) -> NeuronOrder:
    """An order of the whole block: the original order unchanged, any other with the pinned neurons first."""
    if name == ORIGINAL:
        return _unchanged(neurons)
    return pinned_first(pinned, rest, order)


def _unchanged(neurons: int) -> NeuronOrder:
    as_it_was = original_order(neurons)
    return NeuronOrder(as_it_was, as_it_was)


def _measure(
    trace: Trace,
    block: TraceBlock,
    held_out: Range,
    source: str,
    orders: Mapping[str, NeuronOrder],
    pinned: Neurons,
    options: BlockOptions,
) -> HeldOutReads:
    tokens = held_out[1] - held_out[0]
    routed = trace.tokens_of(block, *held_out).size
    bits = block_bits(trace, block, [held_out])
    # Pinned neurons are never read from flash, wherever an order puts them.
    bits[pinned] = 0
    figures = {name: _cost(bits, order.order, routed, options.operation_in_bundles) for name, order in orders.items()}
    active = int(activation_counts(bits).sum())
    return HeldOutReads(source=source, tokens=tokens, routed=routed, active=active, orders=figures)


def _cost(bits: Bits, order: npt.NDArray[np.int32], tokens: int, operation_in_bundles: float) -> OrderCost:
    return OrderCost(
        reads=read_statistics(bits, order, tokens).reads, cost=order_cost(bits, order, operation_in_bundles)
    )


def _choose(wanted: str, held_out: Sequence[HeldOutReads]) -> str:
    costs = {name: sum(part.orders[name].cost for part in held_out) for name in held_out[0].orders}
    candidates = (wanted, *COMPARED_ORDERS) if wanted == REFINED else (wanted, ORIGINAL)
    return min(dict.fromkeys(candidates), key=lambda name: costs[name])
