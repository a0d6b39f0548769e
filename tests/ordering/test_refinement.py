"""Refinement: each move's cost against the cost of the whole order, and the promises of the search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuralink_cli.devices.cost import order_cost
from neuralink_cli.ordering.partners import likely_partners
from neuralink_cli.ordering.refinement import PARTNERS, _search, _shares, refine
from neuralink_cli.ordering.refinement_kernels import (
    BLOCK,
    block_width,
    find_neighbours,
    insertion_cost,
    work_out_planes,
)
from neuralink_cli.ordering.refinement_moves import Search, anneal_sweep, reversal_loss

ANYTHING = 2**62


def random_bits(rng: np.random.Generator, n: int, words: int, density: float) -> NDArray[np.uint64]:
    fired = rng.random((n, words * 64)) < density * rng.random((n, 1)) * 2
    return np.packbits(fired, axis=1, bitorder="little").view(np.uint64)


def all_partners(n: int) -> NDArray[np.int32]:
    return np.array([[j for j in range(n) if j != i] for i in range(n)], dtype=np.int32).reshape(n, n - 1)


def dirty_search(bits: NDArray[np.uint64], order: NDArray[np.int32], ratio: int, per_neuron: int = 3) -> Search:
    """A search whose scratch holds what an earlier one may have left there."""
    search = _search(bits, order, all_partners(order.size)[:, :per_neuron], ratio)
    for scratch in (search.planes, search.other_planes, search.offsets, search.other_offsets, search.scratch):
        scratch[:] = 7
    return search


def place_cost(search: Search, slot: int, neuron: int) -> int:
    find_neighbours(search.order, search.words, slot, neuron, search.ratio, search.offsets)
    cost = 0
    for word in map(np.uint64, range(0, search.words, BLOCK)):
        width = block_width(search.used, word)
        planes = search.planes, np.uint64(0)
        work_out_planes(search.flat, search.offsets, word, width, search.ratio, search.scratch, *planes)
        start = np.uint64(neuron * search.words) + word
        cost += insertion_cost(search.flat, start, width, search.ratio, *planes)
    return cost


def looked_at(bits: NDArray[np.uint64], search: Search, blocks: int) -> NDArray[np.uint64]:
    """The bits of the tokens in the first blocks of a search."""
    rows = search.flat.reshape(-1, search.words)[: bits.shape[0], : blocks * BLOCK]
    return np.ascontiguousarray(rows)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(1, 14),
    st.sampled_from([1, 3, 9, BLOCK, BLOCK + 3]),
    st.sampled_from([0.0, 0.03, 0.2, 0.6]),
    st.integers(1, 20),
)
def test_a_place_costs_a_neuron_what_it_adds_to_the_order(
    seed: int, n: int, words: int, density: float, ratio: int
) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, n, words, density)
    order = rng.permutation(n).astype(np.int32)
    neuron = int(rng.integers(n))
    rest = order[order != neuron]
    search = dirty_search(bits, order, ratio)
    for slot in range(n + 1):
        place = int((order[:slot] != neuron).sum())
        added = order_cost(bits, np.insert(rest, place, neuron), ratio) - order_cost(bits, rest, ratio)
        assert place_cost(search, slot, neuron) == added - np.bitwise_count(bits[neuron]).sum()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(2, 40),
    st.sampled_from([1, BLOCK + 3]),
    st.sampled_from([0.0, 0.03, 0.2, 0.6]),
    st.integers(1, 12),
)
def test_turning_a_stretch_around_loses_what_the_order_costs_more(
    seed: int, n: int, words: int, density: float, ratio: int
) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, n, words, density)
    order = rng.permutation(n).astype(np.int32)
    search = dirty_search(bits, order, ratio)
    shares = _shares(words, 0.0)
    before = order_cost(bits, order, ratio)
    for first in range(n - ratio + 1):
        last = int(rng.integers(first + ratio - 1, n))
        turned = order.copy()
        turned[first : last + 1] = turned[first : last + 1][::-1]
        loss = order_cost(bits, turned, ratio) - before
        assert reversal_loss(search, first, last, ANYTHING // 2, shares, np.zeros_like(shares)) == loss
        assert reversal_loss(search, first, last, int(loss), shares, np.full_like(shares, np.inf)) == loss
        assert reversal_loss(search, first, last, int(loss) - 1, shares, np.zeros_like(shares)) == ANYTHING


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(2, 40),
    st.sampled_from([1, 2, 2 * BLOCK + 5]),
    st.sampled_from([0.05, 0.3]),
    st.integers(1, 12),
    st.sampled_from([0, 40]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_sweep_knows_exactly_what_it_changed(
    seed: int, n: int, words: int, density: float, ratio: int, temperature: int, heat: float
) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(rng, n, words, density)
    order = rng.permutation(n).astype(np.int32)
    search = dirty_search(bits, order, ratio, 1 + seed % 6)
    search.random[0] = seed + 1
    shares = _shares(words, heat)
    seen = looked_at(bits, search, shares.size)
    slack = np.append(np.full(shares.size - 1, 5.0), 0.0)
    for _ in range(2):
        before = order_cost(seen, search.order, ratio)
        change, moves = anneal_sweep(search, float(temperature), shares, slack)
        assert sorted(search.order.tolist()) == list(range(n))
        assert search.position[search.order].tolist() == list(range(n))
        assert order_cost(seen, search.order, ratio) - before == change
        assert temperature > 0 or (change < 0 if moves else change == 0)
    for neuron, block in np.argwhere(search.saving >= 0):
        tokens = np.ascontiguousarray(looked_at(bits, search, block + 1)[:, block * BLOCK :])
        rest = search.order[search.order != neuron]
        without = order_cost(tokens, rest, ratio) + np.bitwise_count(tokens[neuron]).sum()
        assert search.saving[neuron, block] == order_cost(tokens, search.order, ratio) - without


def test_both_kinds_of_move_are_made() -> None:
    rng = np.random.default_rng(5)
    chain = rng.random((40, 40 * 64)) < 0
    for i in range(40):
        chain[max(i - 1, 0) : i + 1, i * 64 : (i + 1) * 64] = True
    bits = np.packbits(chain, axis=1, bitorder="little").view(np.uint64)
    turned = np.concatenate([np.arange(10), np.arange(29, 9, -1), np.arange(30, 40)])
    best = order_cost(bits, np.arange(40), 2)
    result = refine(bits, turned, likely_partners(bits, 3), 2.0, sweeps=1)
    assert result.cost_after == best < result.cost_before
    assert result.moves < 10


@pytest.mark.parametrize("words", [1, BLOCK, BLOCK + 1, 7 * BLOCK - 9])
def test_the_hotter_the_fewer_tokens_are_looked_at(words: int) -> None:
    assert _shares(words, 0.0)[-1] == 1
    assert 0 < _shares(words, 1.0)[-1] <= _shares(words, 0.5)[-1] <= 1
    assert (np.diff(_shares(words, 0.0)) > 0).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.sampled_from([0, 1, 2, 5 * BLOCK + 1]),
    st.one_of(st.integers(0, 9).map(float), st.floats(0, 100)),
    st.integers(0, 6),
)
def test_refining_never_raises_the_cost_and_repeats_itself(
    seed: int, n: int, words: int, ratio: float, sweeps: int
) -> None:
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
def test_neurons_of_one_topic_are_brought_together(ratio: float) -> None:
    rng = np.random.default_rng(3)
    topics, members, words = 10, 12, 16
    active = rng.random((topics, words * 64)) < 0.1
    fired = np.repeat(active, members, axis=0) & (rng.random((topics * members, words * 64)) < 0.8)
    bits = np.packbits(fired, axis=1, bitorder="little").view(np.uint64)
    planted = order_cost(bits, np.arange(topics * members), ratio)
    scattered = rng.permutation(topics * members)
    result = refine(bits, scattered, likely_partners(bits, PARTNERS), ratio)
    assert result.cost_after < 1.05 * planted < 0.8 * result.cost_before


def test_progress_is_told_after_every_sweep() -> None:
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
def test_arguments_that_do_not_fit_are_refused(
    order: list[int], partners: NDArray[np.float64], ratio: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refine(np.zeros((3, 1), dtype=np.uint64), np.array(order), partners.astype(np.int32), ratio)
