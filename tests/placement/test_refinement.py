"""Refinement: each move's cost against the cost of the whole order, and the promises of the search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuralink_cli.placement.cost import order_cost
from neuralink_cli.placement.partners import likely_partners
from neuralink_cli.placement.refinement import PARTNERS, _friends, _padded_rows, refine
from neuralink_cli.placement.refinement_kernels import BLOCK, GROUP, anneal_sweep, insertion_cost, work_out_planes


def random_bits(rng: np.random.Generator, n: int, words: int, density: float) -> NDArray[np.uint64]:
    fired = rng.random((n, words * 64)) < density * rng.random((n, 1)) * 2
    return np.packbits(fired, axis=1, bitorder="little").view(np.uint64)


def all_partners(n: int) -> NDArray[np.int32]:
    return np.array([[j for j in range(n) if j != i] for i in range(n)], dtype=np.int32).reshape(n, n - 1)


def kernel_state(bits: NDArray[np.uint64], ratio: int) -> tuple[Any, Any, Any, Any]:
    rows = _padded_rows(bits)
    planes = np.full((rows.shape[1] // BLOCK, max(ratio.bit_length(), 3) + 1, BLOCK), 7, dtype=np.uint64)
    return rows, np.full(3 * BLOCK + 2 * (ratio + GROUP), 7, dtype=np.uint64), planes, planes.copy()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(1, 14),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.03, 0.2, 0.6]),
    st.integers(1, 20),
)
def test_a_place_costs_a_neuron_what_it_adds_to_the_order(seed, n, words, density, ratio):
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, n, words, density)
    order = rng.permutation(n).astype(np.int32)
    neuron = int(rng.integers(n))
    rest = order[order != neuron]
    rows, scratch, planes, _ = kernel_state(bits, ratio)
    for slot in range(n + 1):
        work_out_planes(rows, order, slot, neuron, ratio, scratch, planes)
        cost = insertion_cost(rows, neuron, planes, ratio.bit_length(), 2**62)
        place = int((order[:slot] != neuron).sum())
        added = order_cost(bits, np.insert(rest, place, neuron), ratio) - order_cost(bits, rest, ratio)
        assert cost == added - np.bitwise_count(bits[neuron]).sum()
        if cost:
            assert insertion_cost(rows, neuron, planes, ratio.bit_length(), cost - 1) > cost - 1


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32),
    st.integers(2, 40),
    st.sampled_from([0.05, 0.3]),
    st.integers(1, 12),
    st.sampled_from([0, 40]),
)
def test_a_sweep_knows_exactly_what_it_changed(seed, n, density, ratio, temperature):
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, n, 2, density)
    order = rng.permutation(n).astype(np.int32)
    position = np.argsort(order).astype(np.int32)
    rows, scratch, planes, other = kernel_state(bits, ratio)
    saving = np.full(n, -1, dtype=np.int64)
    friends, starts = _friends(all_partners(n)[:, : 1 + seed % 6])
    random = np.array([seed + 1], dtype=np.uint64)
    before = order_cost(bits, order, ratio)
    change, moves = anneal_sweep(
        rows, order, position, saving, friends, starts, ratio, float(temperature), random, scratch, planes, other
    )
    assert sorted(order.tolist()) == list(range(n))
    assert position[order].tolist() == list(range(n))
    assert order_cost(bits, order, ratio) - before == change
    assert temperature > 0 or (change < 0 if moves else change == 0)
    for neuron in np.flatnonzero(saving >= 0):
        rest = order[order != neuron]
        without = order_cost(bits, rest, ratio) + np.bitwise_count(bits[neuron]).sum()
        assert saving[neuron] == order_cost(bits, order, ratio) - without


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.integers(0, 2),
    st.one_of(st.integers(0, 9).map(float), st.floats(0, 100)),
    st.integers(0, 6),
)
def test_refining_never_raises_the_cost_and_repeats_itself(seed, n, words, ratio, sweeps):
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, n, words, 0.2)
    order = rng.permutation(n).astype(np.int32)
    start = order.copy()
    partners = likely_partners(bits, 5)
    result = refine(bits, order, partners, ratio, sweeps=sweeps)
    assert np.array_equal(order, start)
    assert sorted(result.order.tolist()) == list(range(n))
    assert result.cost_before == order_cost(bits, start, ratio)
    assert result.cost_after == order_cost(bits, result.order, ratio) <= result.cost_before
    if result.cost_after == result.cost_before:
        assert np.array_equal(result.order, start) and result.moves == 0
    again = refine(bits, order, partners, ratio, sweeps=sweeps)
    assert np.array_equal(again.order, result.order) and again.moves == result.moves


@pytest.mark.parametrize("ratio", [1, 2.5, 4, 8])
def test_neurons_of_one_topic_are_brought_together(ratio):
    rng = np.random.default_rng(3)
    topics, members, words = 10, 12, 16
    active = rng.random((topics, words * 64)) < 0.1
    fired = np.repeat(active, members, axis=0) & (rng.random((topics * members, words * 64)) < 0.8)
    bits = np.packbits(fired, axis=1, bitorder="little").view(np.uint64)
    planted = order_cost(bits, np.arange(topics * members), ratio)
    scattered = rng.permutation(topics * members)
    result = refine(bits, scattered, likely_partners(bits, PARTNERS), ratio)
    assert result.cost_after < 1.05 * planted < 0.8 * result.cost_before


def test_progress_is_told_after_every_sweep():
    bits = random_bits(np.random.default_rng(1), 20, 1, 0.3)
    told: list[int] = []
    refine(bits, np.arange(20), all_partners(20), 2.0, sweeps=7, on_sweep=lambda: told.append(1))
    assert len(told) == 7


@pytest.mark.parametrize(
    ("order", "partners", "ratio", "message"),
    [
        ([0, 1, 1], np.zeros((3, 1)), 1.0, "permutation"),
        ([0, 1], np.zeros((3, 1)), 1.0, "permutation"),
        ([0, 1, 2], np.zeros((2, 1)), 1.0, "partners"),
        ([0, 1, 2], np.full((3, 1), 3), 1.0, "partners"),
        ([0, 1, 2], np.full((3, 1), -2), 1.0, "partners"),
        ([0, 1, 2], np.zeros((3, 1)), float("nan"), "ratio"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(order, partners, ratio, message):
    with pytest.raises(ValueError, match=message):
        refine(np.zeros((3, 1), dtype=np.uint64), np.array(order), partners.astype(np.int32), ratio)
