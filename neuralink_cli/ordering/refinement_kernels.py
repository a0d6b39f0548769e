"""Compiled loops of the refinement: the cost of a neuron at a place, and the savings where two stretches meet.

Let G be the price of a read operation in bundles, a whole number. For a place between two slots and a token, let l and
r be the numbers of inactive slots from there to the nearest active slot on either side, counted up to G. A gap of l + r
slots costs min(l + r, G), and a neuron put into it changes that, with e = l + r - G,

    if it fires, by      min(l, G) + min(r, G) - min(l + r, G) = max(e, 0)       it splits the gap,
    if it does not, by   min(l + r + 1, G) - min(l + r, G)     = 1 if e < 0      it widens the gap.

As e does not depend on the neuron, it is worked out once per place, as *planes*, bit vectors over tokens: the binary
digits of max(e, 0), and the sign of e. The cost of any neuron there then takes a few population counts. Taking a neuron
out saves what it would cost to put it back, so the cost of a relocation is exact without touching other slots.

Reversing a stretch of at least G slots keeps l and r at its ends, but they meet other values. The cost there is the sum
of l + r - max(e, 0), so only the sums of max(e, 0) matter, the *overlaps*: if L_k marks the tokens for which the k
nearest slots on the left are inactive, and R_k those on the right, an overlap is the sum over k = 1..G of
|L_k & R_(G+1-k)|.

All work is done in blocks of tokens: a move that is bad on some tokens is not computed on the rest. The last block, of
few tokens the only one, is not full.

All indices in the inner loops are unsigned: numba lets negative ones count from the end, and the test for it would keep
LLVM from using vector instructions. Costs are compared as integers, so that every machine makes the same decisions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from neuralink_cli.kernels import kernel, popcount

BLOCK = 64  # words worked on at a time; rows are padded to a multiple of it
LANES = 8  # words of the longest vector instructions
GROUP = 4  # rows looked at together on either side of a place
_WIDTH = np.uint64(BLOCK)
_TWICE = np.uint64(2 * BLOCK)
_THRICE = np.uint64(3 * BLOCK)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_NONE = np.uint64(0)


@kernel
def block_width(used: int, word: Any) -> Any:
    """Returns how many words from `word` on are in its block: whole vectors, and at most `BLOCK`.

    Args:
        used: Words of a row that have tokens.
        word: uint64, first word of the block.
    """
    left = np.uint64((used + LANES - 1) // LANES * LANES) - word
    return left if left < _WIDTH else _WIDTH


@kernel
def find_neighbours(order: Any, words: int, slot: Any, without: Any, ratio: int, offsets: Any) -> None:
    """Finds the rows of the slots on either side of the place before `slot`, as if `without` were not in the order.

    Args:
        order: int32 `[n]`, `order[slot] = neuron`.
        words: Words of a row, a multiple of `BLOCK`. After the rows of the neurons come one of zeros and one of ones.
        slot: 0..n.
        without: A neuron, or -1.
        ratio: G >= 1.
        offsets: uint64 `[2 * (ratio + GROUP)]`, written: first words of the rows, nearest first, left then right, in
            whole groups.
    """
    n = order.size
    whole = (ratio + GROUP - 1) // GROUP * GROUP
    for side in range(2):
        at = slot - 1 if side == 0 else slot
        found = side * whole
        full = found + ratio
        while found < full:
            neuron = n  # nothing is active beyond the ends of the order, as in the row of zeros
            if 0 <= at < n:
                neuron = order[at]
                at += 2 * side - 1
                if neuron == without:
                    continue
            offsets[found] = np.uint64(neuron * words)
            found += 1
        while found % GROUP:  # the row of ones ends the count of inactive slots
            offsets[found] = np.uint64((n + 1) * words)
            found += 1


@kernel
def work_out_planes(
    flat: Any, offsets: Any, word: Any, width: Any, ratio: int, scratch: Any, planes: Any, at: Any
) -> None:
    """Works out the planes of a place for the block of tokens that starts with `word`.

    Args:
        flat: uint64, the rows.
        offsets: From `find_neighbours`.
        word: uint64.
        width: Words of the block, from `block_width`.
        ratio: G >= 1.
        scratch: uint64 `[3 * BLOCK]`.
        planes: uint64, written from `at` on, `plane_count(ratio)` times `BLOCK`: the digits of max(e, 0), lowest first,
            and e < 0.
        at: uint64.
    """
    groups = (ratio + GROUP - 1) // GROUP
    count = plane_count(ratio)
    _count_nearest(flat, offsets, groups * GROUP, word, width, scratch, planes, at)
    for k in range(4, count):
        place = at + np.uint64(k) * _WIDTH
        for w in range(width):
            planes[place + w] = _NONE
    for group in range(1, groups):
        _count_further(flat, offsets, group * GROUP, word, width, scratch, _NONE, planes, at, count)
        _count_further(flat, offsets, (groups + group) * GROUP, word, width, scratch, _WIDTH, planes, at, count)
    if count == 4:
        _subtract_from_four(width, ratio, planes, at)
    else:
        _subtract(width, ratio, scratch, planes, at, count)


@kernel
def plane_count(ratio: int) -> int:
    """Returns how many planes a place has: enough for the signed number 2 * `ratio`, and at least four."""
    digits = 3
    while ratio >> digits:
        digits += 1
    return digits + 1


@kernel
def _count_nearest(flat: Any, offsets: Any, right: int, word: Any, width: Any, scratch: Any, out: Any, at: Any) -> None:
    """Writes how many of the nearest four slots on either side are inactive, up to an active one, as 4 digits."""
    a, b, c, d = offsets[0] + word, offsets[1] + word, offsets[2] + word, offsets[3] + word
    e, f, g, h = offsets[right] + word, offsets[right + 1] + word, offsets[right + 2] + word, offsets[right + 3] + word
    for w in range(width):
        # Inactive so far: l1 contains l2 contains l3 contains l4, so their number in binary takes three operations.
        l1 = ~flat[a + w]
        l2 = l1 & ~flat[b + w]
        l3 = l2 & ~flat[c + w]
        l4 = l3 & ~flat[d + w]
        r1 = ~flat[e + w]
        r2 = r1 & ~flat[f + w]
        r3 = r2 & ~flat[g + w]
        r4 = r3 & ~flat[h + w]
        scratch[w] = l4
        scratch[_WIDTH + w] = r4
        ones_l, ones_r = (l1 & ~l2) | (l3 & ~l4), (r1 & ~r2) | (r3 & ~r4)
        twos_l, twos_r = l2 & ~l4, r2 & ~r4
        carry = ones_l & ones_r
        half = twos_l ^ twos_r
        out[at + w] = ones_l ^ ones_r
        out[at + _WIDTH + w] = half ^ carry
        carry = (twos_l & twos_r) | (half & carry)
        half = l4 ^ r4
        out[at + _TWICE + w] = half ^ carry
        out[at + _THRICE + w] = (l4 & r4) | (half & carry)


@kernel
def _count_further(
    flat: Any,
    offsets: Any,
    first: int,
    word: Any,
    width: Any,
    scratch: Any,
    side: Any,
    out: Any,
    at: Any,
    digits: int,
) -> None:
    """Adds the inactive slots among the next four of one side, if all before were inactive."""
    a, b, c, d = (
        offsets[first] + word,
        offsets[first + 1] + word,
        offsets[first + 2] + word,
        offsets[first + 3] + word,
    )
    for w in range(width):
        s1 = scratch[side + w] & ~flat[a + w]
        s2 = s1 & ~flat[b + w]
        s3 = s2 & ~flat[c + w]
        s4 = s3 & ~flat[d + w]
        scratch[side + w] = s4
        digit = out[at + w]
        ones = (s1 & ~s2) | (s3 & ~s4)
        out[at + w] = digit ^ ones
        carry = digit & ones
        digit = out[at + _WIDTH + w]
        twos = s2 & ~s4
        out[at + _WIDTH + w] = digit ^ twos ^ carry
        carry = (digit & twos) | ((digit ^ twos) & carry)
        digit = out[at + _TWICE + w]
        out[at + _TWICE + w] = digit ^ s4 ^ carry
        scratch[_TWICE + w] = (digit & s4) | ((digit ^ s4) & carry)
    for k in range(3, digits):
        place = at + np.uint64(k) * _WIDTH
        for w in range(width):
            digit = out[place + w]
            carry = scratch[_TWICE + w]
            out[place + w] = digit ^ carry
            scratch[_TWICE + w] = digit & carry


@kernel
def _subtract_from_four(width: Any, ratio: int, out: Any, at: Any) -> None:
    """Does what `_subtract` does, for four digits, without going through memory for each."""
    m0, m1 = _NONE - np.uint64(-ratio & 1), _NONE - np.uint64(-ratio >> 1 & 1)
    m2, m3 = _NONE - np.uint64(-ratio >> 2 & 1), _NONE - np.uint64(-ratio >> 3 & 1)
    for w in range(width):
        d0, d1, d2, d3 = out[at + w], out[at + _WIDTH + w], out[at + _TWICE + w], out[at + _THRICE + w]
        carry = d0 & m0
        half = d1 ^ m1
        e1 = half ^ carry
        carry = (d1 & m1) | (half & carry)
        half = d2 ^ m2
        e2 = half ^ carry
        carry = (d2 & m2) | (half & carry)
        negative = d3 ^ m3 ^ carry
        out[at + w] = (d0 ^ m0) & ~negative
        out[at + _WIDTH + w] = e1 & ~negative
        out[at + _TWICE + w] = e2 & ~negative
        out[at + _THRICE + w] = negative


@kernel
def _subtract(width: Any, ratio: int, scratch: Any, out: Any, at: Any, digits: int) -> None:
    """Turns the digits of l + r into those of e = l + r - ratio, and drops the digits where e is negative."""
    for w in range(width):
        scratch[w] = _NONE
    for k in range(digits):
        # Adding -ratio in two's complement: its digits are the same for all tokens.
        constant = _ALL if (-ratio >> k) & 1 else _NONE
        place = at + np.uint64(k) * _WIDTH
        for w in range(width):
            digit = out[place + w]
            carry = scratch[w]
            out[place + w] = digit ^ constant ^ carry
            scratch[w] = (digit & constant) | ((digit ^ constant) & carry)
    negative = at + np.uint64(digits - 1) * _WIDTH
    for k in range(digits - 1):
        place = at + np.uint64(k) * _WIDTH
        for w in range(width):
            out[place + w] &= ~out[negative + w]


@kernel
def insertion_cost(flat: Any, start: Any, width: Any, ratio: int, planes: Any, at: Any) -> Any:
    """Returns the cost of a neuron at the place whose planes start at `at`, in bundles over the tokens of their block.

    The neuron's `width` words of this block start at `start`.
    """
    negative = at + np.uint64(plane_count(ratio) - 1) * _WIDTH
    cost = _NONE
    for w in range(width):
        cost += popcount(~flat[start + w] & planes[negative + w])
    k = 0
    while ratio >> k:
        digit = at + np.uint64(k) * _WIDTH
        count = _NONE
        for w in range(width):
            count += popcount(flat[start + w] & planes[digit + w])
        cost += count << np.uint64(k)
        k += 1
    return np.int64(cost)


@kernel
def find_stretch(order: Any, words: int, slot: Any, up: bool, ratio: int, offsets: Any, first: int) -> None:
    """Writes the rows of `ratio` slots, from `slot` on up or down, to `offsets` from `first` on."""
    n = order.size
    for k in range(ratio):
        neuron = order[slot] if 0 <= slot < n else n
        offsets[first + k] = np.uint64(neuron * words)
        slot += 1 if up else -1


@kernel
def find_quiet(flat: Any, offsets: Any, stretch: int, word: Any, width: Any, ratio: int, quiet: Any) -> None:
    """Works out where the nearest slots of a stretch are all inactive, for a block of tokens.

    Args:
        flat: uint64, the rows.
        offsets: From `find_stretch`.
        stretch: Where the stretch starts in `offsets`.
        word: uint64, first word of the block.
        width: Words of the block, from `block_width`.
        ratio: G >= 1.
        quiet: uint64 `[(ratio + 1) * BLOCK]`, written: vectors for the nearest slot, the nearest two, up to G.
    """
    row = offsets[stretch] + word
    for w in range(width):
        quiet[w] = ~flat[row + w]
    for k in range(1, ratio):
        row = offsets[stretch + k] + word
        at = np.uint64(k) * _WIDTH
        for w in range(width):
            quiet[at + w] = quiet[at - _WIDTH + w] & ~flat[row + w]


@kernel
def overlap(flat: Any, offsets: Any, stretch: int, word: Any, width: Any, ratio: int, quiet: Any) -> Any:
    """Sums max(e, 0) over a block of tokens, where a stretch meets the stretch that `find_quiet` was called for.

    The last `BLOCK` words of `quiet` serve as scratch.
    """
    own = np.uint64(ratio) * _WIDTH
    for w in range(width):
        quiet[own + w] = _ALL
    total = _NONE
    for k in range(ratio):
        row = offsets[stretch + k] + word
        at = np.uint64(ratio - 1 - k) * _WIDTH
        for w in range(width):
            inactive = quiet[own + w] & ~flat[row + w]
            quiet[own + w] = inactive
            total += popcount(inactive & quiet[at + w])
    return np.int64(total)
