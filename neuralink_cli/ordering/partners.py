"""Finds the partners each neuron fires with: by how often, or by how much more often than by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neuralink_cli.errors import OptionError
from neuralink_cli.kernels import kernel
from neuralink_cli.ordering.counting import STRIPE, Counts, count_dtype, count_rows, run_tasks
from neuralink_cli.placement.bits import Bits, activation_counts

Links = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint32]]
"""A sparse list (i, j, count) of co-activation counts, ascending by (i, j), every pair once, i < j, no count 0."""


def strongest_links(bits: Bits, per_neuron: int, *, workers: int | None = None) -> Links:
    """Find the strongest co-activation partners of every neuron, holding only a stripe of the full matrix.

    A pair is listed if it is among the `per_neuron` strongest of either end; of partners with equal counts the
    smaller index is the stronger. Pairs that never fired together are not listed.

    Args:
        bits: uint64[n, words], neuron-major.
        per_neuron: Partners kept of each neuron, at least 1.
        workers: Number of threads; by default as many as the process may use. Does not change the result.

    Raises:
        OptionError: `per_neuron` is less than 1.
    """
    n = bits.shape[0]
    partners, strengths = _select_partners(bits, per_neuron, np.ones(n), workers)
    kept = partners >= 0
    row = np.nonzero(kept)[0]
    column = partners[kept].astype(np.int64)
    pair, where = np.unique(np.minimum(row, column) * n + np.maximum(row, column), return_index=True)
    i, j = np.divmod(pair, max(n, 1))
    return i.astype(np.int32), j.astype(np.int32), strengths[kept][where]


def likely_partners(bits: Bits, per_neuron: int, *, workers: int | None = None) -> npt.NDArray[np.int32]:
    """Find the partners j of each neuron i with the largest f(i, j)^2 / (f(i) f(j)), the squared cosine of their bits.

    Raw counts would make the hottest neurons everyone's partners. Of equal partners the smaller index comes first.

    Args:
        bits: uint64[n, words], neuron-major.
        per_neuron: Partners of each neuron, at least 1.
        workers: Number of threads; by default as many as the process may use. Does not change the result.

    Returns:
        int32[n, per_neuron], strongest first; -1 where no more neurons fired together with this one.

    Raises:
        OptionError: `per_neuron` is less than 1.
    """
    # The neuron's own activity scales all its scores equally, so it is left out.
    return _select_partners(bits, per_neuron, 1 / np.maximum(activation_counts(bits), 1), workers)[0]


def _select_partners(
    bits: Bits, per_neuron: int, weight: npt.NDArray[np.float64], workers: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """The partners j of each neuron with the largest f(i, j)^2 weight(j), and their counts f(i, j): both [n, k]."""
    if per_neuron < 1:
        raise OptionError(f"the number of links per neuron must be at least 1, not {per_neuron}")
    n = bits.shape[0]
    dtype = count_dtype(activation_counts(bits))
    partners = np.full((n, min(per_neuron, max(n - 1, 1))), -1, dtype=np.int32)
    strengths = np.zeros(partners.shape, dtype=np.uint32)

    def select_stripe(first: int) -> None:
        last = min(first + STRIPE, n)
        # Count both triangles: twice the work, but every row is complete at once and can then be dropped.
        stripe = np.zeros((last - first, n), dtype=dtype)
        count_rows(bits, first, last, stripe)
        _select(stripe, first, weight, partners[first:last], strengths[first:last])

    run_tasks(select_stripe, range(0, n, STRIPE), workers)
    return partners, strengths


@kernel
def _select(
    stripe: Counts,
    first: int,
    weight: npt.NDArray[np.float64],
    partners: npt.NDArray[np.int32],
    strengths: npt.NDArray[np.uint32],
) -> None:
    """Fill each row of `partners`, -1 before, and of `strengths` in descending order of count^2 weight."""
    rows, per_neuron = partners.shape
    scores = np.zeros(per_neuron)
    for row in range(rows):
        scores.fill(0)
        for j in range(stripe.shape[1]):
            count = np.float64(stripe[row, j])
            score = count * count * weight[j]
            # An earlier partner of equal score has a smaller index and stays ahead.
            if score > scores[per_neuron - 1] and j != first + row:
                place = per_neuron - 1
                while place > 0 and score > scores[place - 1]:
                    scores[place] = scores[place - 1]
                    strengths[row, place] = strengths[row, place - 1]
                    partners[row, place] = partners[row, place - 1]
                    place -= 1
                scores[place] = score
                strengths[row, place] = stripe[row, j]
                partners[row, place] = j
