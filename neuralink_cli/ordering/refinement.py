"""Refinement: lowers the exact device cost of an order by moving neurons and reversing stretches of the order.

Linking joins neighbours by pairs and ignores gaps. On a device that reads across gaps of several slots it also matters
which neurons lie within that reach of each other. Refinement moves a neuron beside one of its co-activation partners
or, where no neuron may move, reverses a stretch so that partners meet at its end. It computes the cost of each move
exactly (see `refinement_kernels`). It anneals: early sweeps also accept moves that raise the cost a little, later ones
fewer and fewer, and the last sweep none. The hotter the search, the fewer tokens suffice to steer it, so only its last
quarter looks at all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.devices.cost import order_cost
from neuralink_cli.ordering.refinement_kernels import BLOCK, GROUP, plane_count
from neuralink_cli.ordering.refinement_moves import Search, anneal_sweep
from neuralink_cli.placement.bits import Bits

EFFORTS = {"fast": 15, "normal": 70, "max": 500}
"""Sweeps by effort; each visits as many places as the block has neurons."""

PARTNERS = 48
"""How many partners of a neuron to offer: with fewer the search gets stuck, more cost time and find little."""

# Orders that are good at this ratio are good above it, and the time of a sweep grows with the ratio.
_LARGEST_RATIO = 64
# At a ratio of 1 there is little to gain, and a third of the sweeps find it.
_FEWER_AT_ONE = 3
# A move is dropped when its loss so far is this many times its usual error above the allowance: so few of these moves
# are worth making that computing the rest of their cost does not pay.
_DOUBT = 2.0
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
    """Moves made, including moves undone later; 0 if nothing was gained and `order` is the starting order."""


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

    The search rounds `ratio` to a whole number, at least 1 (below 1 the cost depends on the order in the same way as at
    1) and at most 64. Costs are reported, and compared with the starting order, at the exact ratio.

    Args:
        bits: uint64[n, words], neuron-major bit vectors over the tokens to refine on.
        order: Integers [n], the order to start from: a permutation.
        partners: int32[n, k], the neurons beside which to try each neuron, from `partners.likely_partners`; -1 for
            none. By raw counts, the few neurons that fire most would be everyone's partners, and moves gain nothing.
        ratio: Time of a read operation / time of a bundle, finite and >= 0.
        sweeps: Number of sweeps, see `EFFORTS`; 0 returns the starting order.
        on_sweep: Called after each sweep, for progress.

    Returns:
        The refined order, or the starting order if the search did not lower its cost.

    Raises:
        ValueError: `order` is not a permutation, `partners` does not fit it, or `ratio` is not a valid price.
    """
    start = np.ascontiguousarray(order, dtype=np.int32)
    _check(bits, start, partners)
    before = order_cost(bits, start, ratio)
    n = start.size
    if n < 2 or ratio == 0 or before == 0:
        return Refinement(start, before, before, 0)

    whole = max(int(min(ratio, _LARGEST_RATIO) + 0.5), 1)
    search = _search(bits, start, partners, whole)
    per_neuron = order_cost(bits, start, whole) / n
    if whole == 1:
        sweeps = -(-sweeps // _FEWER_AT_ONE)
    moves = 0
    for sweep in range(sweeps):
        heat = 1 - (sweep + 1) / sweeps
        shares = _shares(bits.shape[1], heat)
        # The loss on some tokens is a sum over a sample: its error grows with the root of their number, then falls as
        # the sample approaches all tokens.
        slack = _DOUBT * np.sqrt(per_neuron * shares * (1 - shares / shares[-1]))
        _, moved = anneal_sweep(search, _hottest(whole) * per_neuron * heat, shares, slack)
        moves += moved
        if on_sweep is not None:
            on_sweep()
    refined = search.order
    after = order_cost(bits, refined, ratio)
    if after >= before:
        return Refinement(start, before, before, 0)
    return Refinement(refined, before, after, moves)


def _hottest(ratio: int) -> float:
    """The starting temperature, as a share of the cost per neuron: measured on traces of ReLU models.

    At a ratio of 1 linked orders can hardly be improved, and more heat than this only destroys them; the more slots a
    read can reach across, the more there is to gain by leaving the starting order.
    """
    return min(0.003 * ratio * ratio, 0.04)


def _shares(words: int, heat: float) -> npt.NDArray[np.float64]:
    """The share of all tokens up to each of the blocks to look at; `heat` falls to 0 in the last sweep."""
    blocks = -(-words // BLOCK)
    looked_at = math.ceil(blocks * (0.3 if heat >= 0.6 else 0.6 if heat >= 0.25 else 1))
    ends = np.minimum(np.arange(1, looked_at + 1) * BLOCK, words)
    shares: npt.NDArray[np.float64] = ends / words
    return shares


def _check(bits: Bits, order: npt.NDArray[np.int32], partners: npt.NDArray[np.int32]) -> None:
    n = bits.shape[0]
    if order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"the order must be a permutation of {n} neurons")
    if partners.ndim != 2 or partners.shape[0] != n:
        raise ValueError(f"there must be partners for {n} neurons, not an array of {list(partners.shape)}")
    if partners.size and (partners.min() < -1 or partners.max() >= n):
        raise ValueError(f"partners must be neurons, 0 to {n - 1}, or -1")


def _search(bits: Bits, order: npt.NDArray[np.int32], partners: npt.NDArray[np.int32], ratio: int) -> Search:
    """Lay out everything the kernels need, once."""
    n = order.size
    rows = _padded_rows(bits)
    blocks = rows.shape[1] // BLOCK
    position = np.empty(n, dtype=np.int32)
    position[order] = np.arange(n, dtype=np.int32)
    friends, friends_start = _friends(partners)
    planes = plane_count(ratio) * BLOCK
    return Search(
        flat=rows.ravel(),
        words=rows.shape[1],
        used=bits.shape[1],
        ratio=ratio,
        order=order.copy(),
        position=position,
        saving=np.full((n, blocks), -1, dtype=np.int32),
        friends=friends,
        friends_start=friends_start,
        random=np.array([_SEED], dtype=np.uint64),
        planes=np.zeros(blocks * planes, dtype=np.uint64),
        other_planes=np.zeros(planes, dtype=np.uint64),
        offsets=np.zeros(4 * (ratio + GROUP), dtype=np.uint64),
        other_offsets=np.zeros(2 * (ratio + GROUP), dtype=np.uint64),
        scratch=np.zeros((ratio + 3) * BLOCK, dtype=np.uint64),
    )


def _padded_rows(bits: Bits) -> Bits:
    """Copy the bit vectors in the form the kernels need, then a row of zeros and a row of ones.

    Rows are padded to whole blocks and their words shuffled, so that every block has tokens from all over the trace.
    """
    n, words = bits.shape
    blocks = -(-words // BLOCK)
    rows = np.zeros((n + 2, blocks * BLOCK), dtype=np.uint64)
    rows[:n, :words] = bits[:, np.argsort(np.arange(words) % max(blocks, 1), kind="stable")]
    rows[n + 1] = ~np.uint64(0)
    return rows


def _friends(partners: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Invert the partner lists: from the neurons to try i beside, to the neurons to try beside i (as CSR)."""
    n, k = partners.shape
    flat = partners.ravel()
    listed = np.flatnonzero(flat >= 0)
    by_partner = listed[np.argsort(flat[listed], kind="stable")]
    start = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(flat[listed], minlength=n), out=start[1:])
    return (by_partner // max(k, 1)).astype(np.int32), start
