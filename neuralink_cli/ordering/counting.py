"""Co-activation counts f(i, j): for how many tokens two neurons of a block fired together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.errors import UnsupportedError
from neuralink_cli.kernels import available_cpus, kernel, popcount
from neuralink_cli.placement.bits import Bits, activation_counts

Counts = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""Co-activation counts as a matrix."""

# A stripe and a panel, 128 and 32 rows of 512 words of 8 bytes, stay in a second-level cache of 1 MiB.
STRIPE = 128  # rows counted by one task
PANEL = 32  # rows they are counted against at a time
DEPTH = 512  # words of every row at a time


def coactivation_counts(bits: Bits, *, workers: int | None = None) -> Counts:
    """Count exactly, for every pair of neurons, the tokens for which both fired.

    Args:
        bits: uint64[n, words], neuron-major.
        workers: Number of threads; by default as many as the process may use. Does not change the result.

    Returns:
        [n, n], the upper triangle: `counts[i, j]` for i <= j, the diagonal holding f(i); zero below the diagonal.
        uint16 if no neuron fired more than 65,535 times, else uint32.
    """
    n = bits.shape[0]
    counts = np.zeros((n, n), dtype=count_dtype(activation_counts(bits)))

    def count_stripe(first: int) -> None:
        last = min(first + STRIPE, n)
        stripe = counts[first:last, first:]
        count_together(bits, first, last, n, stripe)
        stripe[np.tril_indices(last - first, -1)] = 0

    run_tasks(count_stripe, range(0, n, STRIPE), workers)
    return counts


def count_together(bits: Bits, first: int, last: int, end: int, counts: Counts) -> None:
    """Add the co-activation counts of rows `first` to `last` with rows `first` to `end` of `bits` to `counts`.

    `counts` is [last - first, end - first] and holds the sums modulo its type.
    """
    _count(bits, first, last, first, end, counts)


def count_rows(bits: Bits, first: int, last: int, counts: Counts) -> None:
    """Add the co-activation counts of rows `first` to `last` with all rows to `counts` `[last - first, n]`."""
    _count(bits, first, last, 0, bits.shape[0], counts)


def count_dtype(activations: npt.NDArray[np.int64]) -> npt.DTypeLike:
    """The narrowest type that holds every co-activation count: none exceeds the largest activation count.

    Raises:
        UnsupportedError: A neuron fired more often than 32 bits count.
    """
    largest = int(activations.max()) if activations.size else 0
    if largest > np.iinfo(np.uint32).max:
        raise UnsupportedError(f"a neuron fired {largest:,} times, more than 32 bits count", fix="use fewer tokens")
    return np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32


def run_tasks(task: Callable[[int], Any], starts: range, workers: int | None) -> None:
    """Run `task` for all `starts` on threads; kernels release the GIL, so they run in parallel."""
    with ThreadPoolExecutor(workers or available_cpus()) as pool:
        for _ in pool.map(task, starts):
            pass


@kernel
def _count(bits: Bits, first: int, last: int, first_column: int, end: int, counts: Counts) -> None:
    """counts[i - first, j - first_column] += |b_i & b_j|, four rows against four at a time.

    The 16 sums live in vector registers and 8 loads serve 16 population counts, so that the loop is bound by
    arithmetic, not by loads. Rows past the end repeat the last row, and their sums are dropped.
    """
    words = bits.shape[1]
    zero = np.uint64(0)
    for start in range(0, words, DEPTH):
        stop = min(start + DEPTH, words)
        for panel in range(first_column, end, PANEL):
            panel_end = min(panel + PANEL, end)
            for i in range(first, last, 4):
                a0 = bits[i, start:stop]
                a1 = bits[min(i + 1, last - 1), start:stop]
                a2 = bits[min(i + 2, last - 1), start:stop]
                a3 = bits[min(i + 3, last - 1), start:stop]
                for j in range(panel, panel_end, 4):
                    b0 = bits[j, start:stop]
                    b1 = bits[min(j + 1, end - 1), start:stop]
                    b2 = bits[min(j + 2, end - 1), start:stop]
                    b3 = bits[min(j + 3, end - 1), start:stop]
                    c00, c01, c02, c03 = zero, zero, zero, zero
                    c10, c11, c12, c13 = zero, zero, zero, zero
                    c20, c21, c22, c23 = zero, zero, zero, zero
                    c30, c31, c32, c33 = zero, zero, zero, zero
                    for w in range(stop - start):
                        c00 += popcount(a0[w] & b0[w])
                        c01 += popcount(a0[w] & b1[w])
                        c02 += popcount(a0[w] & b2[w])
                        c03 += popcount(a0[w] & b3[w])
                        c10 += popcount(a1[w] & b0[w])
                        c11 += popcount(a1[w] & b1[w])
                        c12 += popcount(a1[w] & b2[w])
                        c13 += popcount(a1[w] & b3[w])
                        c20 += popcount(a2[w] & b0[w])
                        c21 += popcount(a2[w] & b1[w])
                        c22 += popcount(a2[w] & b2[w])
                        c23 += popcount(a2[w] & b3[w])
                        c30 += popcount(a3[w] & b0[w])
                        c31 += popcount(a3[w] & b1[w])
                        c32 += popcount(a3[w] & b2[w])
                        c33 += popcount(a3[w] & b3[w])
                    sums = (c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33)
                    for r in range(min(4, last - i)):
                        for c in range(min(4, panel_end - j)):
                            counts[i - first + r, j - first_column + c] += sums[4 * r + c]
