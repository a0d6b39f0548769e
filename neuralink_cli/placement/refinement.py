"""Refinement: lowers the exact device cost of an order by moving neurons, one at a time.

Linking joins neighbours by pairs and knows nothing of gaps. On a device that reads across gaps of several slots it also
matters which neurons lie within that reach of each other. Refinement takes a neuron out and puts it beside one of its
co-activation partners, and costs this exactly, on all tokens (see `refinement_kernels`). It anneals: at first, moves
that raise the cost a little are made too, then ever fewer of them, and in the last sweep none. Where there is much to
gain, at ratios of 4 and more, that leads to about the same cost from any start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.placement.bits import Bits
from neuralink_cli.placement.cost import order_cost
from neuralink_cli.placement.refinement_kernels import BLOCK, GROUP, anneal_sweep

EFFORTS = {"fast": 10, "normal": 60, "max": 400}
"""Sweeps by effort; each visits as many places of the block as it has neurons."""

PARTNERS = 24
"""How many partners of a neuron to offer: with fewer the search gets stuck, more cost time and find little."""

# Orders that are good at this ratio are good beyond, and the time of a sweep grows with the ratio.
_LARGEST_RATIO = 64
_SEED = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Refinement:
    """A refined order, and what it costs on the tokens it was refined on."""

    order: npt.NDArray[np.int32]
    """int32[n], `order[slot]` = neuron."""
    cost_before: float
    """Cost of the order at the start, in bundles over all tokens, as `cost.order_cost` defines it."""
    cost_after: float
    """Cost of `order`; never above `cost_before`."""
    moves: int
    """Moves made on the way, back and forth; 0 if nothing was gained and `order` is that of the start."""


def refine(
    bits: Bits,
    order: npt.NDArray[Any],
    partners: npt.NDArray[np.int32],
    ratio: float,
    *,
    sweeps: int = EFFORTS["normal"],
    on_sweep: Callable[[], object] | None = None,
) -> Refinement:
    """Search for an order of lower cost. Deterministic: same arguments, same result, on any machine.

    The search itself takes `ratio` as a whole number, at least 1 (below 1 the cost depends on the order in the same way
    as at 1) and at most 64; costs are reported, and compared with the start, at the exact ratio.

    Args:
        bits: uint64[n, words], neuron-major bit vectors over the tokens to refine on.
        order: Integers [n], the order to start from: a permutation.
        partners: int32[n, k], the neurons beside which to try each neuron, from `partners.likely_partners`; -1 for
            none. By plain counts, the few neurons that fire most would be everyone's partners, and moves lead nowhere.
        ratio: Time of a read operation / time of a bundle, finite and >= 0.
        sweeps: Effort, see `EFFORTS`; 0 returns the start.
        on_sweep: Called after each sweep, for progress.

    Returns:
        The refined order, or the order of the start if the search did not lower its cost.

    Raises:
        ValueError: `order` is no permutation, `partners` does not fit to it, or `ratio` is no price.
    """
    start = np.ascontiguousarray(order, dtype=np.int32)
    _check(bits, start, partners)
    before = order_cost(bits, start, ratio)
    n = start.size
    if n < 2 or ratio == 0 or before == 0:
        return Refinement(start, before, before, 0)

    # The kernels index without bounds checks; everything they need is laid out here, once.
    whole = max(int(min(ratio, _LARGEST_RATIO) + 0.5), 1)
    refined = start.copy()
    position = np.empty(n, dtype=np.int32)
    position[refined] = np.arange(n, dtype=np.int32)
    rows = _padded_rows(bits)
    friends, friends_start = _friends(partners)
    saving = np.full(n, -1, dtype=np.int64)
    planes = np.zeros((rows.shape[1] // BLOCK, max(whole.bit_length(), 3) + 1, BLOCK), dtype=np.uint64)
    other_planes = np.zeros_like(planes)
    scratch = np.zeros(3 * BLOCK + 2 * (whole + GROUP), dtype=np.uint64)
    random = np.array([_SEED], dtype=np.uint64)

    hottest = _hottest(whole) * order_cost(bits, start, whole) / n
    moves = 0
    for sweep in range(sweeps):
        temperature = hottest * (1 - (sweep + 1) / sweeps)
        _, moved = anneal_sweep(
            rows,
            refined,
            position,
            saving,
            friends,
            friends_start,
            whole,
            temperature,
            random,
            scratch,
            planes,
            other_planes,
        )
        moves += moved
        if on_sweep is not None:
            on_sweep()
    after = order_cost(bits, refined, ratio)
    if after >= before:
        return Refinement(start, before, before, 0)
    return Refinement(refined, before, after, moves)


def _hottest(ratio: int) -> float:
    """The temperature to start with, as a share of the cost per neuron: measured on traces of ReLU models.

    At a ratio of 1 linked orders are nearly as good as it gets, and more heat than this only destroys them; the more
    slots a read can reach across, the more there is to gain by leaving the start.
    """
    return min(0.002 * ratio * ratio, 0.04)


def _check(bits: Bits, order: npt.NDArray[np.int32], partners: npt.NDArray[np.int32]) -> None:
    n = bits.shape[0]
    if order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"the order must be a permutation of {n} neurons")
    if partners.ndim != 2 or partners.shape[0] != n:
        raise ValueError(f"there must be partners for {n} neurons, not an array of {list(partners.shape)}")
    if partners.size and (partners.min() < -1 or partners.max() >= n):
        raise ValueError(f"partners must be neurons, 0 to {n - 1}, or -1")


def _padded_rows(bits: Bits) -> Bits:
    """Copy the bit vectors as the kernels want them: padded to whole blocks, then a row of zeros and one of ones."""
    n, words = bits.shape
    rows = np.zeros((n + 2, -(-words // BLOCK) * BLOCK), dtype=np.uint64)
    rows[:n, :words] = bits
    rows[n + 1] = ~np.uint64(0)
    return rows


def _friends(partners: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Turn the partners around: from the neurons to try i beside, to the neurons to try beside i (as CSR)."""
    n, k = partners.shape
    flat = partners.ravel()
    listed = np.flatnonzero(flat >= 0)
    by_partner = listed[np.argsort(flat[listed], kind="stable")]
    start = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(flat[listed], minlength=n), out=start[1:])
    return (by_partner // max(k, 1)).astype(np.int32), start
