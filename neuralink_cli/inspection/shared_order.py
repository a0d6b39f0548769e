"""How much of one order is in another: the neighbours that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.inspection.kinds import PLACEMENT, Found
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.placement.placement import Placement, inverse


@dataclass(frozen=True, eq=False)
class StoredOrders:
    """The orders of an artefact: int32 `[neurons]` by block id, and the digests of the sequences that made them."""

    orders: dict[str, Order]
    sequences: Bytes


def read_orders(found: Found) -> StoredOrders:
    """The orders of a placement or layout, checked to be permutations.

    Raises:
        InputError: It is damaged or malformed.
        VerificationError: Files of the layout do not fit each other.
    """
    if found.kind == PLACEMENT:
        with Placement(found.path) as placement:
            orders = {name: block.order for name, block in placement.blocks.items()}
            return StoredOrders(orders, placement.ordering_sequences)
    with open_layout(found.path) as layout:
        if layout.kind == "permuted":
            orders = {name: block.order for name, block in layout.placement.blocks.items()}
        else:
            orders = {block.id: layout.order(block.id) for block in layout.index.blocks}
        return StoredOrders(orders, layout.ordering_sequences)


def neighbours_kept(first: Order, second: Order) -> float:
    """Share of the pairs of neurons in adjacent slots of one order that are adjacent in the other too.

    Which of the two comes first does not matter, so an order read backwards keeps all neighbours. Two random orders of
    n neurons share about 2 / n of them.

    Args:
        first: int32 `[n]`, the neuron in each slot: a permutation.
        second: Another permutation of the same neurons.

    Returns:
        0 to 1; 1 for fewer than two neurons.
    """
    if first.size < 2:
        return 1.0
    slots = inverse(second)[first]
    return float((np.abs(np.diff(slots)) == 1).mean())
