"""Quantises blocks of ggml's formats on the way from the matrices of a checkpoint to bundles, and decodes them.

Blocks are converted in groups, side by side: weight j of the block in lane k is at `j * _LANES + k`. Loops over lanes
need no sums across a vector, and of a matrix whose neurons are columns, lines are taken as they are.

All arithmetic is IEEE float32 in a fixed order, and a product is rounded before it is added to something, so that the
bytes are the same on every machine. What decides them is all in this module: numba compiles a kernel again when its own
module has changed, not when another one has.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.kernels import kernel
from neuralink_cli.weight_formats.formats import BLOCK_WEIGHTS

# The levels of iq4_nl, as ggml has them.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# The scales that a search tries, as the level that they give to the weight of greatest magnitude. The first of equally
# good ones is taken. Chosen greedily, for the least error on Gaussian, Laplace, t and uniform weights together.
CANDIDATES = {
    "q8_0": (127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0),
    "q4_0": (-8.0, -8.5, -7.25, -7.75, -8.25, -7.0, -8.75, -7.5),
    "iq4_nl": (-127.0, -134.0, 113.0, -122.0, 122.0, -110.0, -131.0, 116.0),
}

# What numba compiles are numbers: of the formats, of the dtypes, and of what is wrong with a block.
FORMAT_NUMBERS = {name: number for number, name in enumerate(CANDIDATES)}
DTYPE_NUMBERS = {"F32": 0, "F16": 1, "BF16": 2}
_Q8_0, _Q4_0, _IQ4_NL = range(3)
_F32, _F16, _BF16 = range(3)
NOT_FINITE, _TOO_LARGE = range(2)

_LANES = 128
# Neurons of a tile of columns: a visit of a line reads some cache lines, and the bundles stay within reach of the TLB.
_TILE = 256

_LEVELS = np.array(IQ4_NL_LEVELS, np.float32)
# The distances of neighbouring levels, and twice the midpoints between them, which are whole numbers.
_STEPS = np.diff(IQ4_NL_LEVELS).astype(np.int16)
_DOUBLE_MIDDLES = np.array([low + high for low, high in itertools.pairwise(IQ4_NL_LEVELS)], np.int16)
_RATIOS = np.array(list(CANDIDATES.values()), np.float32)
_LARGEST = np.finfo(np.float32).max


def scratch_arrays() -> tuple[npt.NDArray[Any], ...]:
    """What a group of blocks is converted in: for one call at a time."""
    bits = np.zeros(BLOCK_WEIGHTS * _LANES, np.uint32)
    weights = np.ones(BLOCK_WEIGHTS * _LANES, np.float32)
    places = np.zeros(_LANES, np.int64)
    codes = np.zeros(BLOCK_WEIGHTS * _LANES, np.uint8)
    work = np.zeros((9, _LANES), np.uint32)
    halves = np.zeros((2, 4 * _LANES), np.int16)
    return bits, weights, places, codes, work, halves


@kernel
def gather_rows(
    source: Any, kind: int, pitch: int, line: int, blocks: int, how: Any, bundles: Any, scratch: Any
) -> int:
    """Quantise rows of `blocks` blocks: neuron by neuron, from line `line` of the source on.

    Args:
        source: uint16 or uint32 `[elements]`, from the first of the lines on, `pitch` elements from one to the next.
        kind: Number of its dtype.
        how: Number of the format, bytes of its blocks, whether to search for the scale, and float32 `[hidden]` how much
            errors count in that.
        bundles: uint8, bytes of one, where in it to write, int32 slots of the neurons, and the first neuron's number.
        scratch: `scratch_arrays()`.

    Returns:
        -1, or the first bad block: (neuron << 32 | block) * 2 + what is wrong.
    """
    number, block_bytes, searching, counts = how
    target, stride, offset, slots, neuron = bundles
    bits, weights, places = scratch[0], scratch[1], scratch[2]
    row = np.empty(_LANES * BLOCK_WEIGHTS, np.uint32)
    row_counts = np.empty(_LANES * BLOCK_WEIGHTS, np.float32)
    total = slots.size * blocks
    for begin in range(0, total, _LANES):
        lanes = min(_LANES, total - begin)
        lane = 0
        while lane < lanes:
            # As many blocks as are next to each other in the source.
            at, block = divmod(begin + lane, blocks)
            run = min(lanes - lane, blocks - block)
            weight, place, count = block * BLOCK_WEIGHTS, lane * BLOCK_WEIGHTS, run * BLOCK_WEIGHTS
            _widen(source, (line + at) * pitch + weight, count, kind, row, place)
            if searching:
                _copy(counts, weight, count, row_counts, place)
            for k in range(run):
                places[lane + k] = slots[at] * stride + offset + (block + k) * block_bytes
            lane += run
        _transpose(row, lanes, bits)
        if searching:
            _transpose(row_counts, lanes, weights)
        bad = _convert(scratch, lanes, number, searching, target)
        if bad >= 0:
            at, block = divmod(begin + bad // 2, blocks)
            return _index(neuron + at, block, bad % 2)
    return -1


@kernel
def gather_columns(
    source: Any, kind: int, pitch: int, first: int, lines: int, how: Any, bundles: Any, scratch: Any
) -> int:
    """Quantise columns from line `first` of the matrix on, with which the source starts. Else as `gather_rows`."""
    number, block_bytes, searching, counts = how
    target, stride, offset, slots, neuron = bundles
    bits, weights, places = scratch[0], scratch[1], scratch[2]
    staged = np.empty(BLOCK_WEIGHTS * _TILE, source.dtype)
    worst = -1
    for tile in range(0, slots.size, _TILE):
        end = min(tile + _TILE, slots.size)
        for line in range(0, lines, BLOCK_WEIGHTS):
            block = (first + line) // BLOCK_WEIGHTS
            if searching:
                _fill(counts, first + line, weights)
            # Together, so that many reads of lines that are far apart are under way.
            for j in range(BLOCK_WEIGHTS):
                _copy(source, (line + j) * pitch + neuron + tile, end - tile, staged, j * _TILE)
            for begin in range(tile, end, _LANES):
                lanes = min(_LANES, end - begin)
                for j in range(BLOCK_WEIGHTS):
                    _widen(staged, j * _TILE + begin - tile, lanes, kind, bits, j * _LANES)
                for k in range(lanes):
                    places[k] = slots[begin + k] * stride + offset + block * block_bytes
                bad = _convert(scratch, lanes, number, searching, target)
                if bad >= 0:
                    index = _index(neuron + begin + bad // 2, block, bad % 2)
                    worst = index if worst < 0 else min(worst, index)
        if worst >= 0:
            break
    return worst


@kernel
def _index(neuron: int, block: int, trouble: int) -> int:
    # Sorts by neuron, then by block.
    return ((neuron << 32) + block) * 2 + trouble


@kernel
def _copy(source: Any, begin: int, count: int, target: Any, place: int) -> None:
    first, last = np.uintp(begin), np.uintp(place)
    for i in range(np.uintp(count)):
        target[last + i] = source[first + i]


@kernel
def _fill(counts: Any, first: int, weights: Any) -> None:
    for j in range(BLOCK_WEIGHTS):
        count, row = counts[first + j], np.uintp(j * _LANES)
        for k in range(np.uintp(_LANES)):
            weights[row + k] = count


@kernel
def _transpose(rows: Any, lanes: int, target: Any) -> None:
    for j in range(BLOCK_WEIGHTS):
        first, row = np.uintp(j), np.uintp(j * _LANES)
        for k in range(np.uintp(lanes)):
            target[row + k] = rows[first + k * np.uintp(BLOCK_WEIGHTS)]


@kernel
def _widen(source: Any, begin: int, count: int, kind: int, bits: Any, place: int) -> None:
    """Write elements of the source as the bits of float32."""
    first, last = np.uintp(begin), np.uintp(place)
    if kind == _F32:
        for i in range(np.uintp(count)):
            bits[last + i] = np.uint32(source[first + i])
    elif kind == _BF16:
        for i in range(np.uintp(count)):
            bits[last + i] = np.uint32(np.uint32(source[first + i]) << np.uint32(16))
    else:
        for i in range(np.uintp(count)):
            bits[last + i] = _widen_half(np.uint32(source[first + i]))


@kernel
def _widen_half(half: Any) -> Any:
    """The bits of a float16, as uint32, to those of the float32 of the same value."""
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    bias = np.uint32(224 << 23) if magnitude >= np.uint32(0x7C00) else np.uint32(112 << 23)
    normal = np.uint32(np.uint32(magnitude << np.uint32(13)) + bias)
    # Below the smallest normal float16, a number of steps of 2**-24.
    tiny = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32(sign | (tiny if magnitude < np.uint32(0x400) else normal))


@kernel
def _narrow_half(value: Any) -> Any:
    """The bits, as uint32, of the float16 nearest to a finite float32, ties to even; infinity above the largest."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    # A carry out of the mantissa goes into the exponent, as it should.
    rounded = np.uint32(magnitude + np.uint32(np.uint32(0xFFF) + odd))
    normal = np.uint32(np.uint32(rounded - np.uint32(112 << 23)) >> np.uint32(13))
    normal = np.uint32(0x7C00) if normal > np.uint32(0x7C00) else normal
    # Below the smallest normal float16, a number of steps of 2**-24.
    small = magnitude if magnitude < np.uint32(0x38800000) else np.uint32(0)
    steps = np.float32(np.uint32(small).view(np.float32) * np.float32(2.0**24))
    whole = np.int32(steps)
    rest = np.float32(steps - np.float32(whole))
    odd_whole = np.int32(whole & np.int32(1))
    up = rest > np.float32(0.5) or (rest == np.float32(0.5) and odd_whole == np.int32(1))
    tiny = np.uint32(whole + np.int32(1)) if up else np.uint32(whole)
    return np.uint32(sign | (tiny if magnitude < np.uint32(0x38800000) else normal))


@kernel
def _convert(scratch: Any, lanes: int, number: int, searching: bool, target: Any) -> int:
    """Quantise the blocks in all lanes and write each to its place.

    Returns:
        Twice the first lane that has no scale, plus what is wrong; -1 if all have one.
    """
    bits, weights, places, codes, work, halves = scratch
    top, half, kept = work[0], work[1], work[2]
    values, floats = bits.view(np.float32), work.view(np.float32)
    inverse = floats[3]
    _find_tops(bits, lanes, top)
    trouble = _scales(lanes, number, top, half, inverse, kept)
    if trouble >= 0:
        return trouble
    if searching:
        _search(values, weights, lanes, number, half, inverse, kept, floats[0], floats[4:], halves)
    if number == _IQ4_NL:
        _encode_uneven(values, lanes, inverse, codes, halves)
    else:
        _encode(values, lanes, number, inverse, codes)
    _store(codes, lanes, 32 if number == _Q8_0 else 16, half, kept, places, target)
    return -1


@kernel
def _scales(lanes: int, number: int, top: Any, half: Any, inverse: Any, kept: Any) -> int:
    """Scales as ggml's reference has them; what is wrong as `_convert` returns it."""
    tops = top.view(np.float32)
    worst = np.uint32(0)
    for k in range(np.uintp(lanes)):
        scale = _candidate(number, 0, tops[k])
        rounded = _narrow_half(scale)
        inverted = _inverted(scale)
        # So small that its inverse is infinite: all codes are 0, as they come out of the reference on x86.
        finite = abs(inverted) <= _LARGEST
        half[k] = rounded
        inverse[k] = inverted if finite else np.float32(0.0)
        kept[k] = np.uint32(0xFF) if finite else np.uint32(0)
        worst = max(worst, np.uint32(rounded & np.uint32(0x7FFF)))
    if worst >= np.uint32(0x7C00):
        for k in range(lanes):
            if np.uint32(top[k] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
                return k * 2 + NOT_FINITE
            if np.uint32(half[k] & np.uint32(0x7FFF)) >= np.uint32(0x7C00):
                return k * 2 + _TOO_LARGE
    return -1


@kernel
def _find_tops(bits: Any, lanes: int, top: Any) -> None:
    """The first weight of greatest magnitude of every lane, as bits: without the sign, they sort like magnitudes."""
    for k in range(np.uintp(lanes)):
        top[k] = bits[k]
    # Four rows at a time: a store of what may be the old value compiles to a masked store, which is slow.
    for j in range(0, BLOCK_WEIGHTS, 4):
        row, step = np.uintp(j * _LANES), np.uintp(_LANES)
        for k in range(np.uintp(lanes)):
            at = row + k
            best = _larger(_larger(top[k], bits[at]), bits[at + step])
            top[k] = _larger(_larger(best, bits[at + step + step]), bits[at + step + step + step])


@kernel
def _larger(first: Any, second: Any) -> Any:
    """Of the bits of two float32, those of greater magnitude; the first if they are equal in that."""
    magnitude = np.uint32(first & np.uint32(0x7FFFFFFF))
    return second if np.uint32(second & np.uint32(0x7FFFFFFF)) > magnitude else first


@kernel
def _candidate(number: int, candidate: int, top: Any) -> Any:
    """The scale of a block whose weight of greatest magnitude is `top`, not rounded to float16."""
    value = abs(top) if number == _Q8_0 else top
    return np.divide(value, _RATIOS[number, candidate])


@kernel
def _search(
    values: Any,
    weights: Any,
    lanes: int,
    number: int,
    half: Any,
    inverse: Any,
    kept: Any,
    top: Any,
    work: Any,
    halves: Any,
) -> None:
    """Replace `half` and `inverse` of every lane by those of the candidate with the least error."""
    scale, trial, error, least, chosen = work[0], work[1], work[2], work[3], work[4]
    for candidate in range(_RATIOS.shape[1]):
        for k in range(np.uintp(lanes)):
            scale[k] = np.uint32(_widen_half(_narrow_half(_candidate(number, candidate, top[k])))).view(np.float32)
            trial[k] = _inverted(scale[k])
            error[k] = np.float32(0.0)
        if number == _IQ4_NL:
            _add_uneven_errors(values, weights, lanes, scale, trial, error, halves)
        else:
            _add_errors(values, weights, lanes, number, scale, trial, error)
        for k in range(np.uintp(lanes)):
            # An infinite scale has no error that is a number, and never comes first.
            better = candidate == 0 or error[k] < least[k]
            chosen[k] = scale[k] if better else chosen[k]
            least[k] = error[k] if better else least[k]
    for k in range(np.uintp(lanes)):
        half[k], inverse[k], kept[k] = _narrow_half(chosen[k]), _inverted(chosen[k]), np.uint32(0xFF)


@kernel
def _inverted(scale: Any) -> Any:
    # np.divide, since numba's own division raises for zero.
    return np.float32(0.0) if scale == np.float32(0.0) else np.divide(np.float32(1.0), scale)


@kernel
def _add_errors(values: Any, weights: Any, lanes: int, number: int, scale: Any, inverse: Any, error: Any) -> None:
    # The number of the format is a constant in each loop, so that it is decided before.
    for j in range(0, BLOCK_WEIGHTS, 2):
        row, next_row = np.uintp(j * _LANES), np.uintp((j + 1) * _LANES)
        if number == _Q8_0:
            for k in range(np.uintp(lanes)):
                first = _error(_Q8_0, values[row + k], weights[row + k], scale[k], inverse[k])
                second = _error(_Q8_0, values[next_row + k], weights[next_row + k], scale[k], inverse[k])
                error[k] = (error[k] + first) + second
        else:
            for k in range(np.uintp(lanes)):
                first = _error(_Q4_0, values[row + k], weights[row + k], scale[k], inverse[k])
                second = _error(_Q4_0, values[next_row + k], weights[next_row + k], scale[k], inverse[k])
                error[k] = (error[k] + first) + second


@kernel
def _error(number: int, value: Any, weight: Any, scale: Any, inverse: Any) -> Any:
    miss = np.float32(value - scale * _level(number, value * inverse))
    return np.float32(weight * (miss * miss))


@kernel
def _level(number: int, value: Any) -> Any:
    return _q8_0_level(value) if number == _Q8_0 else _q4_0_level(value)


@kernel
def _encode(values: Any, lanes: int, number: int, inverse: Any, codes: Any) -> None:
    if number == _Q8_0:
        for j in range(BLOCK_WEIGHTS):
            row = np.uintp(j * _LANES)
            for k in range(np.uintp(lanes)):
                codes[row + k] = np.uint8(np.int32(_q8_0_level(values[row + k] * inverse[k])))
        return
    for j in range(BLOCK_WEIGHTS // 2):
        row, later = np.uintp(j * _LANES), np.uintp((j + BLOCK_WEIGHTS // 2) * _LANES)
        for k in range(np.uintp(lanes)):
            low = np.int32(_q4_0_level(values[row + k] * inverse[k]) + np.float32(8.0))
            high = np.int32(_q4_0_level(values[later + k] * inverse[k]) + np.float32(8.0))
            codes[row + k] = np.uint8(low | np.int32(high << np.int32(4)))


@kernel
def _add_uneven_errors(
    values: Any, weights: Any, lanes: int, scale: Any, inverse: Any, error: Any, halves: Any
) -> None:
    """As `_add_errors`, of iq4_nl."""
    doubles, levels = halves[0], halves[1]
    second, third, fourth = np.uintp(_LANES), np.uintp(2 * _LANES), np.uintp(3 * _LANES)
    for j in range(0, BLOCK_WEIGHTS, 4):
        row = np.uintp(j * _LANES)
        _whole_doubles(values, row, lanes, inverse, doubles)
        for i in range(np.uintp(4 * _LANES)):
            levels[i] = _iq4_nl_level(doubles[i])
        for k in range(np.uintp(lanes)):
            first = _weighted(values, weights, row + k, scale[k], levels[k])
            next_one = _weighted(values, weights, row + second + k, scale[k], levels[second + k])
            one_more = _weighted(values, weights, row + third + k, scale[k], levels[third + k])
            last = _weighted(values, weights, row + fourth + k, scale[k], levels[fourth + k])
            error[k] = (((error[k] + first) + next_one) + one_more) + last


@kernel
def _weighted(values: Any, weights: Any, at: Any, scale: Any, level: Any) -> Any:
    """The squared error of a weight, as much as it counts."""
    miss = np.float32(values[at] - scale * np.float32(level))
    return np.float32(weights[at] * (miss * miss))


@kernel
def _encode_uneven(values: Any, lanes: int, inverse: Any, codes: Any, halves: Any) -> None:
    """As `_encode`, of iq4_nl."""
    low, high = halves[0], halves[1]
    for j in range(0, BLOCK_WEIGHTS // 2, 4):
        row, later = np.uintp(j * _LANES), np.uintp((j + BLOCK_WEIGHTS // 2) * _LANES)
        _whole_doubles(values, row, lanes, inverse, low)
        _whole_doubles(values, later, lanes, inverse, high)
        for i in range(np.uintp(4 * _LANES)):
            codes[row + i] = np.uint8(_iq4_nl_code(low[i]) | np.int16(_iq4_nl_code(high[i]) << np.int16(4)))


@kernel
def _whole_doubles(values: Any, row: Any, lanes: int, inverse: Any, doubles: Any) -> None:
    """Of four rows, the whole numbers below twice the products, int16 `[4 * _LANES]`.

    Midpoints between levels are halves of whole numbers, so such a number is at one or above it if the product is. It
    fits: the greatest product is 1.5 times the greatest candidate, with the smallest scale. Of 16 bits, twice as many
    are compared at a time as of 32.
    """
    second, third, fourth = np.uintp(_LANES), np.uintp(2 * _LANES), np.uintp(3 * _LANES)
    for k in range(np.uintp(lanes)):
        doubles[k] = _whole_double(values[row + k], inverse[k])
        doubles[second + k] = _whole_double(values[row + second + k], inverse[k])
        doubles[third + k] = _whole_double(values[row + third + k], inverse[k])
        doubles[fourth + k] = _whole_double(values[row + fourth + k], inverse[k])


@kernel
def _whole_double(value: Any, inverse: Any) -> Any:
    product = np.float32(value * inverse)
    return np.int16(np.int32(np.floor(np.float32(product + product))))


@kernel
def _store(codes: Any, lanes: int, count: int, half: Any, kept: Any, places: Any, target: Any) -> None:
    for k in range(lanes):
        place, lane, mask = np.uintp(places[k]), np.uintp(k), np.uint8(kept[k])
        target[place] = np.uint8(half[k] & np.uint32(0xFF))
        target[place + np.uintp(1)] = np.uint8(half[k] >> np.uint32(8))
        for j in range(np.uintp(count)):
            target[place + np.uintp(2) + j] = np.uint8(codes[j * np.uintp(_LANES) + lane] & mask)


@kernel
def _q8_0_level(value: Any) -> Any:
    """To the nearest integer, halves away from zero; at most 127 in magnitude."""
    magnitude = abs(value)
    whole = np.float32(np.int32(magnitude))
    whole = whole + np.float32(1.0) if magnitude - whole >= np.float32(0.5) else whole
    whole = np.float32(127.0) if whole > np.float32(127.0) else whole
    return -whole if value < np.float32(0.0) else whole


@kernel
def _q4_0_level(value: Any) -> Any:
    """To the nearest integer, halves up; -8 to 7."""
    above = value + np.float32(8.5)
    above = np.float32(0.0) if above < np.float32(0.0) else above
    above = np.float32(15.0) if above > np.float32(15.0) else above
    return np.float32(np.int32(above)) - np.float32(8.0)


@kernel
def _iq4_nl_code(double: Any) -> Any:
    """The number of the nearest level, the upper one of two, of the whole number below twice a product."""
    code = np.int16(0)
    for i in range(0, 14, 2):
        code = np.int16(code - np.int16(_reached(i, double) + _reached(i + 1, double)))
    return np.int16(code - _reached(14, double))


@kernel
def _iq4_nl_level(double: Any) -> Any:
    """The nearest level, in the same way. Loops over pairs are unrolled, so that those over lanes are vectorised."""
    level = np.int16(IQ4_NL_LEVELS[0])
    for i in range(0, 14, 2):
        level = np.int16(level + np.int16(_step(i, double) + _step(i + 1, double)))
    return np.int16(level + _step(14, double))


@kernel
def _step(i: int, double: Any) -> Any:
    return np.int16(_STEPS[i] & _reached(i, double))


@kernel
def _reached(i: int, double: Any) -> Any:
    """All bits, as int16, if the number is at a midpoint or above it; none if it is below."""
    return np.int16(-np.int16(double >= _DOUBLE_MIDDLES[i]))


@kernel
def dequantise_blocks(data: Any, number: int, values: Any) -> None:
    """Decode blocks, uint8, to float32, 32 for each: scale times level, exactly rounded."""
    block_bytes = 34 if number == _Q8_0 else 18
    for block in range(values.size // BLOCK_WEIGHTS):
        first, last = np.uintp(block * block_bytes), np.uintp(block * BLOCK_WEIGHTS)
        half = np.uint32(np.uint32(data[first]) | np.uint32(np.uint32(data[first + np.uintp(1)]) << np.uint32(8)))
        scale = np.uint32(_widen_half(half)).view(np.float32)
        first += np.uintp(2)
        if number == _Q8_0:
            for j in range(np.uintp(BLOCK_WEIGHTS)):
                values[last + j] = scale * np.float32(np.int8(data[first + j]))
            continue
        for j in range(np.uintp(BLOCK_WEIGHTS // 2)):
            code = data[first + j]
            low, high = np.int32(code & np.uint8(15)), np.int32(code >> np.uint8(4))
            if number == _Q4_0:
                values[last + j] = scale * np.float32(np.int32(low - np.int32(8)))
                values[last + np.uintp(16) + j] = scale * np.float32(np.int32(high - np.int32(8)))
            else:
                values[last + j] = scale * _LEVELS[low]
                values[last + np.uintp(16) + j] = scale * _LEVELS[high]
