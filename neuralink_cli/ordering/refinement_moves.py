"""Compiled annealing of the refinement: moves one neuron, or reverses a stretch of the order, if the cost allows it.

A move is allowed if it raises the cost by no more than a random allowance, exponentially distributed: a Metropolis
step, whose threshold is drawn before the cost is known. The loss is summed block by block over the tokens, each block
a fair sample of them. Once it is well above the allowance for these tokens, the move is dropped: most are dropped after
the first block. The data of a block is only computed when the first candidate gets there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuralink_cli.kernels import kernel
from neuralink_cli.ordering.refinement_kernels import (
    BLOCK,
    block_width,
    find_neighbours,
    find_quiet,
    find_stretch,
    insertion_cost,
    overlap,
    plane_count,
    work_out_planes,
)

REVERSALS = 8  # stretches tried at a place where no neuron moved
_WIDTH = np.uint64(BLOCK)
_NONE = np.uint64(0)
_NOBODY = np.int64(-1)
_DROPPED = np.int64(2**62)


class Search(NamedTuple):
    """The data of a search; the kernels index it without bounds checks."""

    flat: npt.NDArray[np.uint64]
    """uint64[(n + 2) * words], bit vectors of the neurons, then a row of zeros and one of ones."""
    words: int
    """Words of a row, a multiple of `BLOCK`."""
    used: int
    """Words of a row that have tokens; the rest are zeros."""
    ratio: int
    """G >= 1."""
    order: npt.NDArray[np.int32]
    """int32[n], changed in place."""
    position: npt.NDArray[np.int32]
    """int32[n], the inverse of `order`, kept up to date."""
    saving: npt.NDArray[np.int32]
    """int32[n, blocks], what taking a neuron out saves, or -1 if not known; kept up to date."""
    friends: npt.NDArray[np.int32]
    """int32[links], neurons to try beside neuron i from `friends_start[i]` to `friends_start[i + 1]`."""
    friends_start: npt.NDArray[np.int64]
    """int64[n + 1]."""
    random: npt.NDArray[np.uint64]
    """uint64[1], state of the generator, not 0."""
    planes: npt.NDArray[np.uint64]
    """uint64[blocks * plane_count(G) * BLOCK]: scratch, like the rest."""
    other_planes: npt.NDArray[np.uint64]
    """uint64[plane_count(G) * BLOCK]."""
    offsets: npt.NDArray[np.uint64]
    """uint64[4 * (G + GROUP)]."""
    other_offsets: npt.NDArray[np.uint64]
    """uint64[2 * (G + GROUP)]."""
    scratch: npt.NDArray[np.uint64]
    """uint64[(G + 3) * BLOCK]."""


@kernel
def anneal_sweep(search: Any, temperature: float, shares: Any, slack: Any) -> Any:
    """Visits as many random places as there are neurons, and at each makes the first move that is allowed, if any.

    Args:
        search: The `Search`.
        temperature: The median allowance of a move, in bundles over all tokens; 0: only moves that save.
        shares: float64 `[blocks]`: the share of all tokens in this block and those before it. If it
            lists only some of the blocks, moves are judged on these.
        slack: float64 `[blocks]`: how much the loss may be above its share of the allowance; 0 in the last block.

    Returns:
        (cost change on the tokens looked at, moves made).
    """
    n = search.order.size
    change, moves = 0, 0
    for _ in range(n):
        slot = np.int64(_draw(search.random) % np.uint64(n + 1))
        loss = _try_relocations(search, slot, temperature, shares, slack)
        if loss == _DROPPED:
            loss = _try_reversals(search, slot, temperature, shares, slack)
        if loss != _DROPPED:
            change += loss
            moves += 1
    return change, moves


@kernel
def _try_relocations(search: Any, slot: Any, temperature: float, shares: Any, slack: Any) -> Any:
    """Moves the first allowed friend of the neurons on either side to before `slot`; returns the loss or _DROPPED."""
    ratio, order, saving = search.ratio, search.order, search.saving
    left, lefts, right, rights = _friends_beside(search, slot)
    if lefts + rights == 0:
        return _DROPPED
    step = np.uint64(plane_count(ratio)) * _WIDTH
    first = np.int64(_draw(search.random) % np.uint64(lefts + rights))
    known = -1  # blocks with planes of this place, -1: not even its neighbours are known
    for k in range(lefts + rights):
        pick = (first + k) % (lefts + rights)
        neuron = np.int64(search.friends[left + pick] if pick < lefts else search.friends[right + pick - lefts])
        old = np.int64(search.position[neuron])
        if old == slot or old == slot - 1:
            continue
        allowed = _allowance(search.random, temperature)
        near = slot - 1 - ratio <= old <= slot + ratio  # the place does not look the same without the neuron
        if near or known < 0:
            find_neighbours(order, search.words, slot, neuron if near else _NOBODY, ratio, search.offsets)
            known = 0
        lacking = True
        row = np.uint64(neuron) * np.uint64(search.words)
        word, at = _NONE, _NONE
        loss = np.int64(0)
        for block in range(shares.size):
            width = block_width(search.used, word)
            if block >= known:
                work_out_planes(search.flat, search.offsets, word, width, ratio, search.scratch, search.planes, at)
                known = block + 1
            if saving[neuron, block] < 0:
                if lacking:
                    find_neighbours(order, search.words, old, neuron, ratio, search.other_offsets)
                    lacking = False
                work_out_planes(
                    search.flat, search.other_offsets, word, width, ratio, search.scratch, search.other_planes, _NONE
                )
                saving[neuron, block] = insertion_cost(
                    search.flat, row + word, width, ratio, search.other_planes, _NONE
                )
            loss += insertion_cost(search.flat, row + word, width, ratio, search.planes, at) - saving[neuron, block]
            if loss > allowed * shares[block] + slack[block]:
                loss = _DROPPED
                break
            word += _WIDTH
            at += step
        if loss != _DROPPED:
            _forget(saving, order, old - ratio, old + ratio)
            new = _relocate(order, search.position, old, slot)
            _forget(saving, order, new - ratio, new + ratio)
            return loss
        if near:
            known = -1
    return _DROPPED


@kernel
def _try_reversals(search: Any, slot: Any, temperature: float, shares: Any, slack: Any) -> Any:
    """Reverses the first allowed stretch, so that friends meet at `slot`; returns the loss or _DROPPED."""
    left, lefts, right, rights = _friends_beside(search, slot)
    if lefts + rights == 0:
        return _DROPPED
    for _ in range(REVERSALS):
        pick = np.int64(_draw(search.random) % np.uint64(lefts + rights))
        allowed = _allowance(search.random, temperature)
        if pick < lefts:
            at = np.int64(search.position[search.friends[left + pick]])
            first, last = (slot, at) if at >= slot else (at + 1, slot - 1)
        else:
            at = np.int64(search.position[search.friends[right + pick - lefts]])
            first, last = (at, slot - 1) if at < slot else (slot, at - 1)
        # Each end of a shorter stretch would see the slots beyond the other end.
        if last - first + 1 < max(search.ratio, 2):
            continue
        loss = reversal_loss(search, first, last, allowed, shares, slack)
        if loss != _DROPPED:
            _forget(search.saving, search.order, first - search.ratio, first + search.ratio - 1)
            _forget(search.saving, search.order, last + 1 - search.ratio, last + search.ratio)
            _reverse(search.order, search.position, first, last)
            return loss
    return _DROPPED


@kernel
def reversal_loss(search: Any, first: Any, last: Any, allowed: Any, shares: Any, slack: Any) -> Any:
    """Returns the loss of reversing slots `first` to `last`, at least G slots; 2**62 once it is too high."""
    ratio, flat, offsets, quiet = search.ratio, search.flat, search.offsets, search.scratch
    before, head, tail, after = 0 * ratio, ratio, 2 * ratio, 3 * ratio
    find_stretch(search.order, search.words, first - 1, False, ratio, offsets, before)
    find_stretch(search.order, search.words, first, True, ratio, offsets, head)
    find_stretch(search.order, search.words, last, False, ratio, offsets, tail)
    find_stretch(search.order, search.words, last + 1, True, ratio, offsets, after)
    loss = np.int64(0)
    word = _NONE
    for block in range(shares.size):
        width = block_width(search.used, word)
        find_quiet(flat, offsets, before, word, width, ratio, quiet)
        loss += overlap(flat, offsets, head, word, width, ratio, quiet)
        loss -= overlap(flat, offsets, tail, word, width, ratio, quiet)
        find_quiet(flat, offsets, after, word, width, ratio, quiet)
        loss += overlap(flat, offsets, tail, word, width, ratio, quiet)
        loss -= overlap(flat, offsets, head, word, width, ratio, quiet)
        if loss > allowed * shares[block] + slack[block]:
            return _DROPPED
        word += _WIDTH
    return loss


@kernel
def _friends_beside(search: Any, slot: Any) -> Any:
    """Finds the friends of the neurons before and in `slot`: where they start and how many there are, for each."""
    left, lefts, right, rights = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    if slot > 0:
        neuron = search.order[slot - 1]
        left = search.friends_start[neuron]
        lefts = search.friends_start[neuron + 1] - left
    if slot < search.order.size:
        neuron = search.order[slot]
        right = search.friends_start[neuron]
        rights = search.friends_start[neuron + 1] - right
    return left, lefts, right, rights


@kernel
def _forget(saving: Any, order: Any, first: Any, last: Any) -> None:
    """Marks what taking out the neurons in slots `first` to `last` saves as not known."""
    for slot in range(max(0, first), min(order.size, last + 1)):
        neuron = order[slot]
        for block in range(saving.shape[1]):
            saving[neuron, block] = -1


@kernel
def _relocate(order: Any, position: Any, old: Any, slot: Any) -> Any:
    """Moves the neuron in slot `old` to before the one in `slot`, and returns its new slot."""
    neuron = order[old]
    new = slot - 1 if slot > old else slot
    step = 1 if new > old else -1
    for s in range(old, new, step):
        order[s] = order[s + step]
        position[order[s]] = s
    order[new] = neuron
    position[neuron] = new
    return new


@kernel
def _reverse(order: Any, position: Any, first: Any, last: Any) -> None:
    """Reverses slots `first` to `last`."""
    while first < last:
        a, b = order[first], order[last]
        order[first], order[last] = b, a
        position[b], position[a] = first, last
        first += 1
        last -= 1


@kernel
def _draw(random: Any) -> Any:
    """Draws 53 random bits: xorshift64*, the same on every machine and in every version of numba."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return x * np.uint64(0x2545F4914F6CDD1D) >> np.uint64(11)


@kernel
def _allowance(random: Any, temperature: float) -> Any:
    """Draws an exponentially distributed number of median `temperature`, rounded down; -1 if that is 0.

    The number of tosses until heads plus a fraction interpolates the logarithm linearly between powers of two: close
    enough, and unlike a library's logarithm equal to the last bit everywhere.
    """
    if temperature == 0:
        return np.int64(-1)
    bits = _draw(random)
    tosses = 0
    while bits & np.uint64(1) and tosses < 20:
        bits >>= np.uint64(1)
        tosses += 1
    return np.int64(temperature * (tosses + np.float64(bits >> np.uint64(21)) / 2.0**32))
