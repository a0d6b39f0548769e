"""Quantises blocks of ggml's formats, side by side: weight j of the block in lane k is at `j * LANES + k`.

Loops over lanes need no sums across a vector. All arithmetic is IEEE float32 in a fixed order, and a product is rounded
before it is added to something, so that the bytes are the same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from neuralink_cli.kernels import kernel
from neuralink_cli.layout.weight_formats import (
    BLOCK_WEIGHTS,
    CANDIDATES,
    CONVERTIBLE_DTYPES,
    IQ4_NL,
    IQ4_NL_LEVELS,
    Q4_0,
    Q8_0,
)

LANES = 128

# What numba compiles are numbers: of the formats, of the dtypes, and of what is wrong with a block.
Q8_0_NUMBER, Q4_0_NUMBER, IQ4_NL_NUMBER = range(3)
NUMBERS = {Q8_0.name: Q8_0_NUMBER, Q4_0.name: Q4_0_NUMBER, IQ4_NL.name: IQ4_NL_NUMBER}
_F32, _F16, _BF16 = (CONVERTIBLE_DTYPES.index(dtype) for dtype in ("F32", "F16", "BF16"))
NOT_FINITE, TOO_LARGE = range(2)

LEVELS = np.array(IQ4_NL_LEVELS, np.float32)
_STEPS = LEVELS[1:] - LEVELS[:-1]
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2.0)
_RATIOS = np.array([CANDIDATES[name] for name in NUMBERS], np.float32)
_LARGEST = np.finfo(np.float32).max


@kernel
def widen(source: Any, begin: int, count: int, kind: int, bits: Any, place: int) -> None:
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
            bits[last + i] = widen_half(np.uint32(source[first + i]))


@kernel
def widen_half(half: Any) -> Any:
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
def convert(
    bits: Any,
    weights: Any,
    lanes: int,
    number: int,
    searching: bool,
    work: Any,
    codes: Any,
    places: Any,
    target: Any,
) -> int:
    """Quantise the blocks in all lanes and write each to its place.

    Returns:
        Twice the first lane that has no scale, plus what is wrong; -1 if all have one.
    """
    top, half, kept = work[0], work[1], work[2]
    values, floats = bits.view(np.float32), work.view(np.float32)
    inverse = floats[3]
    _find_tops(bits, lanes, top)
    trouble = _scales(lanes, number, top, half, inverse, kept)
    if trouble >= 0:
        return trouble
    if searching:
        _search(values, weights, lanes, number, half, inverse, kept, floats[0], floats[4:])
    _encode(values, lanes, number, inverse, codes)
    _store(codes, lanes, 32 if number == Q8_0_NUMBER else 16, half, kept, places, target)
    return -1


@kernel
def _scales(lanes: int, number: int, top: Any, half: Any, inverse: Any, kept: Any) -> int:
    """Scales as ggml's reference has them; what is wrong as `convert` returns it."""
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
                return k * 2 + TOO_LARGE
    return -1


@kernel
def _find_tops(bits: Any, lanes: int, top: Any) -> None:
    """The first weight of greatest magnitude of every lane, as bits: without the sign, they sort like magnitudes."""
    for k in range(np.uintp(lanes)):
        top[k] = bits[k]
    # Four rows at a time: a store of what may be the old value compiles to a masked store, which is slow.
    for j in range(0, BLOCK_WEIGHTS, 4):
        row, step = np.uintp(j * LANES), np.uintp(LANES)
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
    value = abs(top) if number == Q8_0_NUMBER else top
    return np.divide(value, _RATIOS[number, candidate])


@kernel
def _search(
    values: Any, weights: Any, lanes: int, number: int, half: Any, inverse: Any, kept: Any, top: Any, work: Any
) -> None:
    """Replace `half` and `inverse` of every lane by those of the candidate with the least error."""
    scale, trial, error, least, chosen = work[0], work[1], work[2], work[3], work[4]
    for candidate in range(_RATIOS.shape[1]):
        for k in range(np.uintp(lanes)):
            scale[k] = np.uint32(widen_half(_narrow_half(_candidate(number, candidate, top[k])))).view(np.float32)
            trial[k] = _inverted(scale[k])
            error[k] = np.float32(0.0)
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
    if number == IQ4_NL_NUMBER:
        for j in range(BLOCK_WEIGHTS):
            row = np.uintp(j * LANES)
            for k in range(np.uintp(lanes)):
                error[k] += _error(IQ4_NL_NUMBER, values[row + k], weights[row + k], scale[k], inverse[k])
        return
    # The number of the format is a constant in each loop, so that it is decided before.
    for j in range(0, BLOCK_WEIGHTS, 2):
        row, next_row = np.uintp(j * LANES), np.uintp((j + 1) * LANES)
        if number == Q8_0_NUMBER:
            for k in range(np.uintp(lanes)):
                first = _error(Q8_0_NUMBER, values[row + k], weights[row + k], scale[k], inverse[k])
                second = _error(Q8_0_NUMBER, values[next_row + k], weights[next_row + k], scale[k], inverse[k])
                error[k] = (error[k] + first) + second
        else:
            for k in range(np.uintp(lanes)):
                first = _error(Q4_0_NUMBER, values[row + k], weights[row + k], scale[k], inverse[k])
                second = _error(Q4_0_NUMBER, values[next_row + k], weights[next_row + k], scale[k], inverse[k])
                error[k] = (error[k] + first) + second


@kernel
def _error(number: int, value: Any, weight: Any, scale: Any, inverse: Any) -> Any:
    miss = np.float32(value - scale * _level(number, value * inverse))
    return np.float32(weight * (miss * miss))


@kernel
def _level(number: int, value: Any) -> Any:
    if number == Q8_0_NUMBER:
        return _q8_0_level(value)
    if number == Q4_0_NUMBER:
        return _q4_0_level(value)
    return _iq4_nl_level(value)


@kernel
def _encode(values: Any, lanes: int, number: int, inverse: Any, codes: Any) -> None:
    if number == Q8_0_NUMBER:
        for j in range(BLOCK_WEIGHTS):
            row = np.uintp(j * LANES)
            for k in range(np.uintp(lanes)):
                codes[row + k] = np.uint8(np.int32(_q8_0_level(values[row + k] * inverse[k])))
        return
    for j in range(BLOCK_WEIGHTS // 2):
        row, later = np.uintp(j * LANES), np.uintp((j + BLOCK_WEIGHTS // 2) * LANES)
        if number == Q4_0_NUMBER:
            for k in range(np.uintp(lanes)):
                low = np.int32(_q4_0_level(values[row + k] * inverse[k]) + np.float32(8.0))
                high = np.int32(_q4_0_level(values[later + k] * inverse[k]) + np.float32(8.0))
                codes[row + k] = np.uint8(low | np.int32(high << np.int32(4)))
        else:
            for k in range(np.uintp(lanes)):
                low = _iq4_nl_code(values[row + k] * inverse[k])
                high = _iq4_nl_code(values[later + k] * inverse[k])
                codes[row + k] = np.uint8(low | np.int32(high << np.int32(4)))


@kernel
def _store(codes: Any, lanes: int, count: int, half: Any, kept: Any, places: Any, target: Any) -> None:
    for k in range(lanes):
        place, lane, mask = np.uintp(places[k]), np.uintp(k), np.uint8(kept[k])
        target[place] = np.uint8(half[k] & np.uint32(0xFF))
        target[place + np.uintp(1)] = np.uint8(half[k] >> np.uint32(8))
        for j in range(np.uintp(count)):
            target[place + np.uintp(2) + j] = np.uint8(codes[j * np.uintp(LANES) + lane] & mask)


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
def _iq4_nl_code(value: Any) -> Any:
    """The number of the nearest level, the upper one of two."""
    code = np.int32(0)
    for i in range(15):
        code = np.int32(code + (np.int32(1) if value >= _MIDDLES[i] else np.int32(0)))
    return code


@kernel
def _iq4_nl_level(value: Any) -> Any:
    # Small integers, so the order of adding does not matter; in pairs, it is quicker.
    level = LEVELS[0]
    for i in range(0, 14, 2):
        level = level + (_step(i, value) + _step(i + 1, value))
    return level + _step(14, value)


@kernel
def _step(i: int, value: Any) -> Any:
    return _STEPS[i] if value >= _MIDDLES[i] else np.float32(0.0)
