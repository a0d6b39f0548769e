"""Compiled loops of the refinement: what it costs to put a neuron into a place, and the annealing that moves neurons.

Let G be the whole price of a read operation in bundles. For a place between two slots and a token, let l and r be the
numbers of inactive slots from there to the nearest active slot on either side, none counted beyond G. A gap of l + r
slots costs min(l + r, G), and a neuron put into it changes that, with e = l + r - G,

    if it fires, by      min(l, G) + min(r, G) - min(l + r, G) = max(e, 0)       it splits the gap,
    if it does not, by   min(l + r + 1, G) - min(l + r, G)     = 1 if e < 0      it widens the gap.

As e does not depend on the neuron, it is worked out once per place, as *planes*, bit vectors over tokens: the binary
digits of max(e, 0), and the sign of e. What any neuron costs there is then a few population counts away. Taking a
neuron out saves what it would cost to put it back, so relocations are costed exactly without touching other slots.

All indices in the inner loops are unsigned: numba lets negative ones count from the end, and the test for it would keep
LLVM from using vector instructions. Costs are compared as integers, so that every machine takes the same decisions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from neuralink_cli.placement.popcount import kernel, popcount

BLOCK = 64  # words worked on at a time; rows are padded to a multiple of it
GROUP = 4  # rows looked at together on either side of a place
_WIDTH = np.uint64(BLOCK)
_TWICE = np.uint64(2 * BLOCK)
_THRICE = np.uint64(3 * BLOCK)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_NONE = np.uint64(0)
_UNBOUNDED = np.int64(2**62)


@kernel
def work_out_planes(rows: Any, order: Any, slot: Any, without: int, ratio: int, scratch: Any, planes: Any) -> None:
    """Works out the planes of the place before `slot`, as if neuron `without` were not in the order.

    Args:
        rows: uint64 `[n + 2, words]`, words a multiple of `BLOCK`: bit vectors, a row of zeros, a row of ones.
        order: int32 `[n]`, `order[slot] = neuron`.
        slot: 0..n.
        without: A neuron, or -1.
        ratio: G >= 1.
        scratch: uint64 `[3 * BLOCK + 2 * (ratio + GROUP)]`.
        planes: uint64 `[words / BLOCK, digits + 1, BLOCK]`, written: the digits of max(e, 0), lowest first, and e < 0;
            digits >= 3 and 2**digits > ratio.
    """
    n, words = order.size, rows.shape[1]
    groups = (ratio + GROUP - 1) // GROUP
    offsets = scratch[3 * BLOCK :]
    for side in range(2):
        at = slot - 1 if side == 0 else slot
        found = side * groups * GROUP
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
    flat, out = rows.ravel(), planes.ravel()
    at_block = _NONE
    for word in range(_NONE, np.uint64(words), _WIDTH):
        _count_nearest(flat, offsets, groups * GROUP, word, scratch, out, at_block)
        for k in range(4, planes.shape[1]):
            place = at_block + np.uint64(k) * _WIDTH
            for w in range(_WIDTH):
                out[place + w] = _NONE
        for group in range(1, groups):
            _count_further(flat, offsets, group * GROUP, word, scratch, _NONE, out, at_block, planes.shape[1])
            _count_further(
                flat, offsets, (groups + group) * GROUP, word, scratch, _WIDTH, out, at_block, planes.shape[1]
            )
        if planes.shape[1] == 4:
            _subtract_from_four(ratio, out, at_block)
        else:
            _subtract(ratio, scratch, out, at_block, planes.shape[1])
        at_block += np.uint64(planes.shape[1]) * _WIDTH


@kernel
def _count_nearest(flat: Any, offsets: Any, right: int, word: Any, scratch: Any, out: Any, at: Any) -> None:
    """Writes how many of the nearest four slots on either side are inactive, up to an active one, as 4 digits."""
    a, b, c, d = offsets[0] + word, offsets[1] + word, offsets[2] + word, offsets[3] + word
    e, f, g, h = offsets[right] + word, offsets[right + 1] + word, offsets[right + 2] + word, offsets[right + 3] + word
    for w in range(_WIDTH):
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
    flat: Any, offsets: Any, first: int, word: Any, scratch: Any, side: Any, out: Any, at: Any, digits: int
) -> None:
    """Adds the inactive slots among the next four of one side, if all before were inactive."""
    a, b, c, d = (
        offsets[first] + word,
        offsets[first + 1] + word,
        offsets[first + 2] + word,
        offsets[first + 3] + word,
    )
    for w in range(_WIDTH):
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
        for w in range(_WIDTH):
            digit = out[place + w]
            carry = scratch[_TWICE + w]
            out[place + w] = digit ^ carry
            scratch[_TWICE + w] = digit & carry


@kernel
def _subtract_from_four(ratio: int, out: Any, at: Any) -> None:
    """Does what `_subtract` does, for four digits, without going through memory for each."""
    m0, m1 = _NONE - np.uint64(-ratio & 1), _NONE - np.uint64(-ratio >> 1 & 1)
    m2, m3 = _NONE - np.uint64(-ratio >> 2 & 1), _NONE - np.uint64(-ratio >> 3 & 1)
    for w in range(_WIDTH):
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
def _subtract(ratio: int, scratch: Any, out: Any, at: Any, digits: int) -> None:
    """Turns the digits of l + r into those of e = l + r - ratio, and drops the digits where e is negative."""
    for w in range(_WIDTH):
        scratch[w] = _NONE
    for k in range(digits):
        # Adding -ratio in two's complement: its digits are the same for all tokens.
        constant = _ALL if (-ratio >> k) & 1 else _NONE
        place = at + np.uint64(k) * _WIDTH
        for w in range(_WIDTH):
            digit = out[place + w]
            carry = scratch[w]
            out[place + w] = digit ^ constant ^ carry
            scratch[w] = (digit & constant) | ((digit ^ constant) & carry)
    negative = at + np.uint64(digits - 1) * _WIDTH
    for k in range(digits - 1):
        place = at + np.uint64(k) * _WIDTH
        for w in range(_WIDTH):
            out[place + w] &= ~out[negative + w]


@kernel
def insertion_cost(rows: Any, neuron: int, planes: Any, digits: int, bound: Any) -> Any:
    """Costs a neuron in the place the planes are of, in bundles over all tokens; stops early once above `bound`.

    Args:
        rows: uint64 `[n + 2, words]` as in `work_out_planes`.
        neuron: Row.
        planes: uint64 `[words / BLOCK, 1 + most digits, BLOCK]` from `work_out_planes`.
        digits: How many of the digits can be set, ratio.bit_length().
        bound: The cost is exact if it does not exceed this, and else only known to exceed it.
    """
    flat, out = rows.ravel(), planes.ravel()
    words, places = np.uint64(rows.shape[1]), np.uint64(planes.shape[1])
    row = np.uint64(neuron) * words
    at = _NONE
    cost = np.int64(0)
    for word in range(_NONE, words, _WIDTH):
        start = row + word
        negative = at + (places - np.uint64(1)) * _WIDTH
        added = _NONE
        for w in range(_WIDTH):
            added += popcount(~flat[start + w] & out[negative + w])
        for k in range(digits):
            digit = at + np.uint64(k) * _WIDTH
            count = _NONE
            for w in range(_WIDTH):
                count += popcount(flat[start + w] & out[digit + w])
            added += count << np.uint64(k)
        cost += np.int64(added)
        if cost > bound:
            break
        at += places * _WIDTH
    return cost


@kernel
def anneal_sweep(
    rows: Any,
    order: Any,
    position: Any,
    saving: Any,
    friends: Any,
    friends_start: Any,
    ratio: int,
    temperature: float,
    random: Any,
    scratch: Any,
    planes: Any,
    other_planes: Any,
) -> Any:
    """Visits as many random places as there are neurons, and moves the first friend there that may move.

    The friends of a place are those of the neurons on either side of it. One may move if that raises the cost by no
    more than a random allowance, exponentially distributed: a Metropolis step, whose threshold is drawn before the
    cost is known, so that hopeless candidates are dropped after a few words.

    Args:
        rows: uint64 `[n + 2, words]` as in `work_out_planes`.
        order: int32 `[n]`, changed in place.
        position: int32 `[n]`, the inverse of `order`, kept so.
        saving: int64 `[n]`, what taking a neuron out saves, or -1 if not known; kept up to date.
        friends: int32 `[links]`, neurons to try beside neuron i from `friends_start[i]` to `friends_start[i + 1]`.
        friends_start: int64 `[n + 1]`.
        ratio: G >= 1.
        temperature: The allowance that one move in two exceeds, in bundles over all tokens; 0: only moves that save.
        random: uint64 `[1]`, state of the generator, not 0.
        scratch: As for `work_out_planes`.
        planes: As for `work_out_planes`.
        other_planes: As for `work_out_planes`.

    Returns:
        (cost change, moves made).
    """
    n = order.size
    digits = 0
    while ratio >> digits:
        digits += 1
    change, moves = 0, 0
    for _ in range(n):
        slot = np.int64(_draw(random) % np.uint64(n + 1))
        left, lefts, right, rights = 0, 0, 0, 0
        if slot > 0:
            left = friends_start[order[slot - 1]]
            lefts = friends_start[order[slot - 1] + 1] - left
        if slot < n:
            right = friends_start[order[slot]]
            rights = friends_start[order[slot] + 1] - right
        if lefts + rights == 0:
            continue
        known = False
        first = np.int64(_draw(random) % np.uint64(lefts + rights))
        for k in range(lefts + rights):
            pick = (first + k) % (lefts + rights)
            neuron = friends[left + pick] if pick < lefts else friends[right + pick - lefts]
            old = position[neuron]
            if old == slot or old == slot - 1:
                continue
            if saving[neuron] < 0:
                work_out_planes(rows, order, old, neuron, ratio, scratch, other_planes)
                saving[neuron] = insertion_cost(rows, neuron, other_planes, digits, _UNBOUNDED)
            bound = saving[neuron] - 1 if temperature == 0 else saving[neuron] + _allowance(random, temperature)
            if bound < 0:
                continue
            if slot - 1 - ratio <= old <= slot + ratio:  # the place does not look the same without the neuron
                work_out_planes(rows, order, slot, neuron, ratio, scratch, other_planes)
                cost = insertion_cost(rows, neuron, other_planes, digits, bound)
            else:
                if not known:
                    work_out_planes(rows, order, slot, -1, ratio, scratch, planes)
                    known = True
                cost = insertion_cost(rows, neuron, planes, digits, bound)
            if cost <= bound:
                change += cost - saving[neuron]
                moves += 1
                _forget(saving, order, old, ratio)
                new = _relocate(order, position, old, slot)
                _forget(saving, order, new, ratio)
                saving[neuron] = cost
                break
    return change, moves


@kernel
def _forget(saving: Any, order: Any, slot: Any, ratio: int) -> None:
    """Marks what depends on the neuron in `slot` as not known."""
    for s in range(max(0, slot - ratio), min(order.size, slot + ratio + 1)):
        saving[order[s]] = -1


@kernel
def _relocate(order: Any, position: Any, old: int, slot: Any) -> Any:
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
def _draw(random: Any) -> Any:
    """Draws 64 random bits: xorshift64*, the same on every machine and in every version of numba."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return x * np.uint64(0x2545F4914F6CDD1D) >> np.uint64(11)


@kernel
def _allowance(random: Any, temperature: float) -> Any:
    """Draws an exponentially distributed number of median `temperature`, rounded down.

    The number of tosses until heads plus a fraction interpolates the logarithm linearly between powers of two: close
    enough, and unlike a library's logarithm equal to the last bit everywhere.
    """
    bits = _draw(random)
    tosses = 0
    while bits & np.uint64(1) and tosses < 20:
        bits >>= np.uint64(1)
        tosses += 1
    return np.int64(temperature * (tosses + np.float64(bits >> np.uint64(21)) / 2.0**32))
