"""The exact cost of reading an order of neurons, on a device where each operation and each bundle takes a fixed time.

Reading b bundles in one operation takes ``operation + b * bundle`` seconds; ``ratio = operation / bundle`` is the
cost of an operation in bundles. Between two active slots of a token, a gap of k inactive slots is either read too
(k bundles) or skipped (one more operation), whichever is cheaper, so that a token costs, in bundles,

    active slots + ratio (the first read) + sum over its gaps of min(k, ratio).

With b_p the bit vector over tokens of the neuron in slot p, single tokens need not be looked at: the j-th *gap term*

    R_j = sum over p of |b_p & ~(b_(p-1) | ... | b_(p-j))|

counts the active slots without an active one among the j slots before them: the gaps of at least j slots plus, once
for every token that reads anything, the slot it starts with. So R_1 + ... + R_G is the sum of min(k, G) over gaps,
plus G per token. R_1 is the number of runs: the read operations of a device that never reads across a gap.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuralink_cli.kernels import kernel, popcount

# Words of a bit vector per step: the running AND of one slot then stays in the first-level cache.
_BLOCK = 64


def gap_terms(bits: NDArray[np.uint64], order: NDArray[Any], limit: int) -> NDArray[np.int64]:
    """Counts, for every j up to `limit`, the active slots with no active one among the j slots before them.

    Args:
        bits: uint64 `[n, words]`, bit t % 64 of word t // 64 of row i tells whether neuron i fired for token t.
        order: Integers `[slots]`, `order[slot] = neuron`: a permutation, or some of the neurons to cost only these.
        limit: How many terms to count, >= 0.

    Returns:
        int64 `[limit]`, non-increasing; element j - 1 is R_j of the module's description.
    """
    slots = np.ascontiguousarray(order, dtype=np.int32)
    # No gap is as long as the order: beyond it the terms stay at the number of tokens that read anything.
    counted = min(limit, slots.size)
    terms = np.zeros(limit, dtype=np.int64)
    if counted > 0:
        _count_gap_terms(bits, slots, terms[:counted])
        terms[counted:] = terms[counted - 1]
    return terms


def order_cost(bits: NDArray[np.uint64], order: NDArray[Any], ratio: float) -> float:
    """Costs an order in bundles: the exact reading time of all tokens divided by the time of one bundle.

    Gaps are whole numbers of slots and min(k, ratio) is linear in `ratio` between whole numbers, so a fractional
    `ratio` weights the last gap term by its fraction and the cost stays exact.

    Args:
        bits: uint64 `[n, words]` as in `gap_terms`.
        order: Integers `[slots]`, `order[slot] = neuron`.
        ratio: Time of a read operation / time of a bundle, finite and >= 0. 0 costs only the active bundles.

    Returns:
        The cost of all tokens together, in bundles.
    """
    check_ratio(ratio)
    slots = np.ascontiguousarray(order, dtype=np.int32)
    # The terms are constant beyond the order's length, so a huge ratio stays exact without an array of its length.
    whole = min(int(ratio), slots.size)
    terms = gap_terms(bits, slots, whole + 1)
    active = int(_count_active(bits, slots))
    return float(active + int(terms[:whole].sum()) + (ratio - whole) * int(terms[whole]))


def token_costs(
    bits: NDArray[np.uint64], order: NDArray[Any], ratio: float, tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Costs an order token by token, in bundles: with gaps read across where that is cheaper, and with none.

    The sums over tokens are `order_cost`, and the active neurons plus `ratio` times the runs.

    Args:
        bits: uint64 `[n, words]` as in `gap_terms`.
        order: Integers `[slots]`, `order[slot] = neuron`.
        ratio: Time of a read operation / time of a bundle, finite and >= 0.
        tokens: How many tokens the bits are of.

    Returns:
        float64 `[tokens]` each.
    """
    check_ratio(ratio)
    collapsed, apart = np.zeros(64 * bits.shape[1]), np.zeros(64 * bits.shape[1])
    _cost_tokens(bits, np.ascontiguousarray(order, dtype=np.int32), ratio, collapsed, apart)
    return collapsed[:tokens], apart[:tokens]


def collapse_gap(ratio: float) -> int:
    """Returns the longest gap, in slots, that is cheaper to read across than to skip: the largest whole k < `ratio`."""
    check_ratio(ratio)
    return max(math.ceil(ratio) - 1, 0)


def check_ratio(ratio: float) -> None:
    """Raises ValueError unless `ratio` is finite and >= 0; user input is checked where devices are read."""
    if not (math.isfinite(ratio) and ratio >= 0):
        raise ValueError(f"the ratio of operation cost to bundle cost must be finite and >= 0, not {ratio}")


# Not parallel: 11,008 neurons over 32,768 tokens take 0.03 s, less than a parallel kernel takes longer to compile.
@kernel
def _count_gap_terms(bits: Any, order: Any, terms: Any) -> None:
    """Adds the gap terms R_1.. of `order` to int64 `terms`."""
    words = bits.shape[1]
    alone = np.empty(_BLOCK, dtype=np.uint64)
    for p in range(order.size):
        for start in range(0, words, _BLOCK):
            width = min(_BLOCK, words - start)
            row = bits[order[p], start : start + width]
            for w in range(width):
                alone[w] = row[w]
            for j in range(1, terms.size + 1):
                if j <= p:
                    before = bits[order[p - j], start : start + width]
                    for w in range(width):
                        alone[w] &= ~before[w]
                remaining = np.uint64(0)
                for w in range(width):
                    remaining += popcount(alone[w])
                # An AND only loses bits, so all further terms of these words are 0 as well.
                if remaining == 0:
                    break
                terms[j - 1] += np.int64(remaining)


@kernel
def _count_active(bits: Any, order: Any) -> Any:
    """Counts the bits of the rows in `order`."""
    active = np.uint64(0)
    for p in range(order.size):
        row = bits[order[p]]
        for w in range(row.size):
            active += popcount(row[w])
    return active


@kernel
def _cost_tokens(bits: Any, order: Any, ratio: Any, collapsed: Any, apart: Any) -> None:
    """Adds what each token costs, slot by slot; `last` is the slot that each of 64 tokens read last."""
    last = np.empty(64, dtype=np.int64)
    one = np.uint64(1)
    for w in range(bits.shape[1]):
        last[:] = -1
        for p in range(order.size):
            word = bits[order[p], w]
            while word:
                low = word & (~word + one)
                bit = np.int64(popcount(low - one))
                token = 64 * w + bit
                gap = p - last[bit] - 1
                collapsed[token] += 1.0
                apart[token] += 1.0
                if last[bit] < 0:
                    collapsed[token] += ratio
                    apart[token] += ratio
                elif gap > 0:
                    collapsed[token] += min(np.float64(gap), ratio)
                    apart[token] += ratio
                last[bit] = p
                word ^= low
