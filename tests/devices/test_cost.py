"""The cost of an order against a token-by-token oracle that decides every gap on its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuralink_cli.devices.cost import collapse_gap, gap_terms, order_cost, token_costs

TraceAndOrder = tuple[NDArray[np.bool_], NDArray[np.int32]]


def pack(fired: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Packs bool [tokens, n] into uint64 [n, words], independently of the project's own transposition."""
    tokens, n = fired.shape
    padded = np.zeros((n, -(-max(tokens, 1) // 64) * 64), dtype=bool)
    padded[:, :tokens] = fired.T
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)


def cost_token_by_token(fired: NDArray[np.bool_], order: NDArray[np.int32], ratio: float) -> float:
    total = 0.0
    for token in fired[:, order]:
        slots = np.flatnonzero(token)
        if slots.size:
            total += slots.size + ratio + sum(min(int(gap), ratio) for gap in np.diff(slots) - 1)
    return total


@st.composite
def traces(draw: st.DrawFn) -> TraceAndOrder:
    tokens = draw(st.integers(0, 150))
    n = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    fired = rng.random((tokens, n)) < draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
    return fired, rng.permutation(n).astype(np.int32)


@settings(deadline=None)
@given(traces(), st.one_of(st.integers(0, 30).map(float), st.floats(0, 40)))
def test_cost_equals_the_sum_over_tokens_and_gaps(trace: TraceAndOrder, ratio: float) -> None:
    fired, order = trace
    assert order_cost(pack(fired), order, ratio) == pytest.approx(cost_token_by_token(fired, order, ratio))


@settings(deadline=None)
@given(traces(), st.floats(0, 10))
def test_an_order_costs_the_same_backwards(trace: TraceAndOrder, ratio: float) -> None:
    fired, order = trace
    bits = pack(fired)
    assert order_cost(bits, order[::-1], ratio) == pytest.approx(order_cost(bits, order, ratio))


@settings(deadline=None)
@given(traces(), st.integers(0, 40))
def test_terms_count_the_gaps_of_at_least_j_slots(trace: TraceAndOrder, limit: int) -> None:
    fired, order = trace
    terms = gap_terms(pack(fired), order, limit)
    gaps = [np.diff(np.flatnonzero(token), prepend=-limit - 2) - 1 for token in fired[:, order] if token.any()]
    assert terms.tolist() == [sum(int((gap >= j).sum()) for gap in gaps) for j in range(1, limit + 1)]


def test_the_first_term_is_the_number_of_runs() -> None:
    fired = np.array([[1, 1, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]], dtype=bool)
    assert gap_terms(pack(fired), np.arange(8), 1).tolist() == [4]


def test_a_ratio_beyond_the_block_prices_one_operation_per_token() -> None:
    fired = np.array([[1, 0, 1], [0, 1, 0]], dtype=bool)
    assert order_cost(pack(fired), np.arange(3), 1e12) == pytest.approx(3 + 1 + 2e12)


@pytest.mark.parametrize(("ratio", "gap"), [(0.0, 0), (0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (4.0, 3), (4.25, 4)])
def test_the_longest_gap_worth_reading_across(ratio: float, gap: int) -> None:
    assert collapse_gap(ratio) == gap


@pytest.mark.parametrize("ratio", [-1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_no_price_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        order_cost(np.zeros((2, 1), dtype=np.uint64), np.arange(2), ratio)


@settings(deadline=None)
@given(traces(), st.one_of(st.integers(0, 30).map(float), st.floats(0, 40)))
def test_tokens_cost_what_the_oracle_says_one_by_one(trace: TraceAndOrder, ratio: float) -> None:
    fired, order = trace
    tokens = fired.shape[0]
    collapsed, apart = token_costs(pack(fired), order, ratio, tokens)
    assert collapsed.shape == apart.shape == (tokens,)
    for token in range(tokens):
        assert collapsed[token] == pytest.approx(cost_token_by_token(fired[token : token + 1], order, ratio))
        slots = np.flatnonzero(fired[token, order])
        runs = 1 + np.count_nonzero(np.diff(slots) > 1) if slots.size else 0
        assert apart[token] == pytest.approx(slots.size + ratio * runs)
