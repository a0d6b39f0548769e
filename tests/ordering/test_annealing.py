"""The annealing of the refinement against a plain implementation that costs whole orders: move for move the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuralink_cli.devices.cost import order_cost
from neuralink_cli.ordering import refinement
from neuralink_cli.ordering.refinement import EFFORTS, _search, _shares, refine
from neuralink_cli.ordering.refinement_kernels import BLOCK
from neuralink_cli.ordering.refinement_moves import (
    REVERSALS,
    Search,
    _allowance,
    _draw,
    anneal_sweep,
    reversal_loss,
)

WORD = 2**64
DROPPED = 2**62


class Generator:
    """xorshift64* (Vigna, 2016), in whole numbers."""

    def __init__(self, state: int) -> None:
        self.state = state

    def draw(self) -> int:
        x = self.state
        x ^= x >> 12
        x ^= x << 25 & WORD - 1
        x ^= x >> 27
        self.state = x
        return x * 0x2545F4914F6CDD1D % WORD >> 11

    def allowance(self, temperature: float) -> int:
        if temperature == 0:
            return -1
        bits = self.draw()
        tosses = next((k for k in range(20) if not bits >> k & 1), 20)
        return int(temperature * (tosses + (bits >> tosses >> 21) / 2.0**32))


class PlainSearch:
    """What `anneal_sweep` does, by moving neurons in a list and costing every order as a whole."""

    def __init__(self, search: Search, partners: NDArray[np.int32], seed: int) -> None:
        self.order = search.order.tolist()
        self.ratio = search.ratio
        self.rows = search.flat.reshape(-1, search.words)[: search.order.size]
        self.random = Generator(seed)
        # Those that have a neuron among their partners are tried beside it.
        self.friends: list[list[int]] = [[] for _ in self.order]
        for neuron, its in enumerate(partners.tolist()):
            for partner in its:
                if partner >= 0:
                    self.friends[partner].append(neuron)

    def sweep(self, temperature: float, shares: NDArray[np.float64], slack: NDArray[np.float64]) -> tuple[int, int]:
        change = moves = 0
        for _ in self.order:
            slot = self.random.draw() % (len(self.order) + 1)
            for attempt in (self._relocate, self._reverse):
                loss = attempt(slot, temperature, shares, slack)
                if loss is not None:
                    change, moves = change + loss, moves + 1
                    break
        return change, moves

    def _beside(self, slot: int) -> tuple[list[int], list[int]]:
        left = self.friends[self.order[slot - 1]] if slot > 0 else []
        right = self.friends[self.order[slot]] if slot < len(self.order) else []
        return left, right

    def _relocate(self, slot: int, temperature: float, shares: Any, slack: Any) -> int | None:
        left, right = self._beside(slot)
        candidates = left + right
        if not candidates:
            return None
        first = self.random.draw() % len(candidates)
        for neuron in candidates[first:] + candidates[:first]:
            old = self.order.index(neuron)
            if old in (slot - 1, slot):
                continue
            allowed = self.random.allowance(temperature)
            rest = [other for other in self.order if other != neuron]
            at = slot - (old < slot)
            loss = self._try([*rest[:at], neuron, *rest[at:]], allowed, shares, slack)
            if loss is not None:
                return loss
        return None

    def _reverse(self, slot: int, temperature: float, shares: Any, slack: Any) -> int | None:
        left, right = self._beside(slot)
        if not left and not right:
            return None
        for _ in range(REVERSALS):
            pick = self.random.draw() % (len(left) + len(right))
            allowed = self.random.allowance(temperature)
            before = pick < len(left)
            at = self.order.index((left + right)[pick])
            # The friend is to meet the neuron before the slot, or the one in it.
            if before:
                first, stop = (slot, at + 1) if at >= slot else (at + 1, slot)
            else:
                first, stop = (at, slot) if at < slot else (slot, at)
            if stop - first < max(self.ratio, 2):
                continue
            loss = self._try(turned(self.order, first, stop), allowed, shares, slack)
            if loss is not None:
                return loss
        return None

    def _try(self, order: list[int], allowed: int, shares: Any, slack: Any) -> int | None:
        loss = cumulative_losses(self.rows, self.order, order, self.ratio, shares.size)
        if any(loss[block] > allowed * shares[block] + slack[block] for block in range(shares.size)):
            return None
        self.order = order
        return loss[-1]


def turned(order: list[int], first: int, stop: int) -> list[int]:
    return order[:first] + order[first:stop][::-1] + order[stop:]


def cumulative_losses(rows: NDArray[np.uint64], old: list[int], new: list[int], ratio: int, blocks: int) -> list[int]:
    """How much more the new order costs on the tokens of the first block, the first two, and so on."""
    ends = [np.ascontiguousarray(rows[:, : (block + 1) * BLOCK]) for block in range(blocks)]
    return [int(order_cost(tokens, np.array(new), ratio) - order_cost(tokens, np.array(old), ratio)) for tokens in ends]


def sparse_bits(rng: np.random.Generator, n: int, words: int, density: float) -> NDArray[np.uint64]:
    topic = rng.random((4, words * 64)) < density
    fired = topic[rng.integers(4, size=n)] ^ (rng.random((n, words * 64)) < density / 4)
    return np.packbits(fired, axis=1, bitorder="little").view(np.uint64)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 2**63),
    st.integers(1, 24),
    st.sampled_from([1, 2 * BLOCK + 5]),
    st.sampled_from([0.05, 0.3]),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.5, 40.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_sweep_makes_the_moves_of_a_plain_search(
    seed: int, n: int, words: int, density: float, ratio: int, temperature: float, heat: float
) -> None:
    rng = np.random.default_rng(seed)
    bits = sparse_bits(rng, n, words, density)
    partners = rng.integers(-1, n, (n, 1 + seed % 4)).astype(np.int32)
    search = _search(bits, rng.permutation(n).astype(np.int32), partners, ratio)
    plain = PlainSearch(search, partners, seed)
    search.random[0] = seed
    shares = _shares(words, heat)
    slack = np.append(rng.integers(0, 20, shares.size - 1).astype(float), 0.0)
    for _ in range(2):
        assert anneal_sweep(search, temperature, shares, slack) == plain.sweep(temperature, shares, slack)
        assert search.order.tolist() == plain.order
        assert int(search.random[0]) == plain.random.state


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(2, 30),
    st.sampled_from([BLOCK, 3 * BLOCK]),
    st.integers(1, 9),
    st.integers(-300, 300),
    st.sampled_from([0.0, 20.0]),
)
def test_turning_a_stretch_around_is_dropped_once_it_is_above_what_is_allowed(
    seed: int, n: int, words: int, ratio: int, allowed: int, leeway: float
) -> None:
    rng = np.random.default_rng(seed)
    bits = sparse_bits(rng, n, words, 0.1)
    order = rng.permutation(n).astype(np.int32)
    search = _search(bits, order, np.full((n, 1), -1, dtype=np.int32), ratio)
    shares = _shares(words, 0.0)
    slack = np.append(np.full(shares.size - 1, leeway), 0.0)
    rows = search.flat.reshape(-1, search.words)[:n]
    for first in range(n - ratio + 1):
        stop = int(rng.integers(first + ratio, n + 1))
        losses = cumulative_losses(rows, order.tolist(), turned(order.tolist(), first, stop), ratio, shares.size)
        dropped = any(loss > allowed * shares[block] + slack[block] for block, loss in enumerate(losses))
        assert reversal_loss(search, first, stop - 1, allowed, shares, slack) == (DROPPED if dropped else losses[-1])


@given(st.integers(1, WORD - 1))
def test_draws_are_those_of_xorshift64star(seed: int) -> None:
    random, plain = np.array([seed], dtype=np.uint64), Generator(seed)
    for _ in range(20):
        assert int(_draw(random)) == plain.draw()
        assert int(random[0]) == plain.state


@given(st.integers(1, WORD - 1), st.floats(0.01, 1e9))
def test_allowances_are_tosses_until_heads_and_a_fraction(seed: int, temperature: float) -> None:
    random, plain = np.array([seed], dtype=np.uint64), Generator(seed)
    assert [int(_allowance(random, temperature)) for _ in range(50)] == [
        plain.allowance(temperature) for _ in range(50)
    ]
    assert _allowance(random, 0.0) == -1
    assert int(random[0]) == plain.state


@pytest.fixture
def sweeps_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every sweep of a refinement."""
    seen: list[tuple[Any, ...]] = []

    def record(search: Search, temperature: float, shares: Any, slack: Any) -> Any:
        seen.append((search.ratio, temperature, shares.copy(), slack.copy()))
        return anneal_sweep(search, temperature, shares, slack)

    monkeypatch.setattr(refinement, "anneal_sweep", record)
    return seen


@pytest.mark.parametrize(
    ("ratio", "whole", "hottest"),
    [(0.2, 1, 0.003), (1.4, 1, 0.003), (1.6, 2, 0.012), (3.0, 3, 0.027), (4.0, 4, 0.04), (1000.0, 64, 0.04)],
)
def test_heat_falls_to_nothing_and_ever_more_tokens_are_looked_at(
    sweeps_seen: list[tuple[Any, ...]], ratio: float, whole: int, hottest: float
) -> None:
    rng = np.random.default_rng(0)
    bits = sparse_bits(rng, 30, 10 * BLOCK - 7, 0.2)
    refine(bits, np.arange(30), rng.integers(0, 30, (30, 4)).astype(np.int32), ratio, sweeps=20)
    # A third of the sweeps, rounded up, where there is little to gain.
    assert len(sweeps_seen) == (7 if whole == 1 else 20)
    assert {seen for seen, *_ in sweeps_seen} == {whole}
    per_neuron = order_cost(bits, np.arange(30), whole) / 30
    temperatures = [temperature for _, temperature, _, _ in sweeps_seen]
    steps = len(temperatures)
    expected = [hottest * per_neuron * (1 - (k + 1) / steps) for k in range(steps)]
    assert temperatures == pytest.approx(expected, rel=1e-9)
    assert temperatures[-1] == 0
    blocks = [shares.size for _, _, shares, _ in sweeps_seen]
    assert blocks == [
        3 if 1 - (k + 1) / steps >= 0.6 else 6 if 1 - (k + 1) / steps >= 0.25 else 10 for k in range(steps)
    ]
    for _, _, shares, slack in sweeps_seen:
        # Two standard errors of a sum over a sample of what is looked at.
        assert slack == pytest.approx(2 * np.sqrt(per_neuron * shares * (1 - shares / shares[-1])), rel=1e-9)
        assert slack[-1] == 0
        assert shares == pytest.approx([min(k * BLOCK / (10 * BLOCK - 7), 1) for k in range(1, shares.size + 1)])
    assert all(before <= after for before, after in pairwise(blocks))


@pytest.mark.parametrize(
    ("bits", "ratio"),
    [
        (np.full((1, 1), 7, dtype=np.uint64), 2.0),
        (np.full((3, 1), 7, dtype=np.uint64), 0.0),
        (np.zeros((3, 1), dtype=np.uint64), 2.0),
    ],
)
def test_where_no_order_is_better_nothing_is_searched(
    sweeps_seen: list[tuple[Any, ...]], bits: NDArray[np.uint64], ratio: float
) -> None:
    n = bits.shape[0]
    result = refine(bits, np.arange(n), np.zeros((n, 1), dtype=np.int32), ratio, sweeps=EFFORTS["fast"])
    assert result.order.tolist() == list(range(n))
    assert result.moves == 0
    assert sweeps_seen == []
