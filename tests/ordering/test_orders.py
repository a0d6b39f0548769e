"""The orders by name: what each is made from, and the order of a whole block with some neurons pinned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuralink_cli.ordering.baselines import (
    frequency_order,
    reverse_cuthill_mckee_order,
    spectral_order,
)
from neuralink_cli.ordering.linking import link_tiled
from neuralink_cli.ordering.orders import ORDER_MAKERS, NeuronOrder, OrderingTask, make_orders, pinned_first
from neuralink_cli.ordering.partners import likely_partners, strongest_links
from neuralink_cli.ordering.refinement import EFFORTS, PARTNERS, refine
from neuralink_cli.placement.bits import activation_counts, transpose_bits
from tests.traces import clustered

RATIO = 4.0


@pytest.fixture(scope="module")
def bits() -> NDArray[np.uint64]:
    fired = clustered(300, 90, clusters=4, seed=1)
    return transpose_bits(np.packbits(fired, axis=1, bitorder="little"), 90)


@pytest.fixture(scope="module")
def expected(bits: NDArray[np.uint64]) -> dict[str, tuple[list[int], list[int]]]:
    """Each order and the starts of its links, put together from the modules that make them."""
    counts = activation_counts(bits)
    # Of the co-activation graph the graph orders see the 32 strongest links of each neuron.
    links = strongest_links(bits, 32)
    linking = link_tiled(bits, counts)
    partners = likely_partners(bits, PARTNERS)
    orders: dict[str, NDArray[np.integer[Any]]] = {
        "original": np.arange(90),
        "frequency": frequency_order(counts),
        "reverse-cuthill-mckee": reverse_cuthill_mckee_order(*links, counts),
        "spectral": spectral_order(*links, counts),
        "linked": linking.order,
        "refined": refine(bits, linking.order, partners, RATIO, sweeps=EFFORTS["fast"]).order,
    }
    return {
        name: (order.tolist(), linking.links.tolist() if name == "linked" else list(range(90)))
        for name, order in orders.items()
    }


@pytest.mark.parametrize("names", [*((name,) for name in ORDER_MAKERS), ("linked", "refined"), tuple(ORDER_MAKERS)])
def test_an_order_is_what_its_name_says_whatever_else_is_made(
    bits: NDArray[np.uint64], expected: dict[str, tuple[list[int], list[int]]], names: tuple[str, ...]
) -> None:
    made = make_orders(OrderingTask(bits, RATIO, "fast"), names)
    assert made.keys() == set(names)
    for name, order in made.items():
        assert order.order.dtype == order.links.dtype == np.int32
        assert (order.order.tolist(), order.links.tolist()) == expected[name]


def test_a_refinement_that_gains_nothing_keeps_the_links(
    bits: NDArray[np.uint64], expected: dict[str, tuple[list[int], list[int]]]
) -> None:
    # Without a price of an operation every order costs the same.
    made = make_orders(OrderingTask(bits, 0.0, "fast"), ["refined"])
    assert (made["refined"].order.tolist(), made["refined"].links.tolist()) == expected["linked"]


def test_between_sweeps_is_called_after_each(bits: NDArray[np.uint64]) -> None:
    told: list[int] = []
    make_orders(OrderingTask(bits, RATIO, "fast", lambda: told.append(1)), ["refined"])
    assert len(told) == EFFORTS["fast"]


@given(st.permutations(range(7)), st.integers(0, 7), st.data())
def test_pinned_neurons_are_a_link_of_their_own_before_the_others(
    neurons: list[int], pinned: int, data: st.DataObject
) -> None:
    hot, rest = np.array(neurons[:pinned], dtype=np.int32), np.array(sorted(neurons[pinned:]), dtype=np.int32)
    places = data.draw(st.permutations(range(rest.size)))
    starts = sorted(data.draw(st.sets(st.integers(0, rest.size - 1)).map(lambda some: some | {0}))) if rest.size else []
    order = NeuronOrder(np.array(places, dtype=np.int32), np.array(starts, dtype=np.int32))
    whole = pinned_first(hot, rest, order)
    assert whole.order.dtype == whole.links.dtype == np.int32
    assert whole.order.tolist() == neurons[:pinned] + [int(rest[place]) for place in places]
    assert whole.links.tolist() == [0][:pinned] + [start + pinned for start in starts]
