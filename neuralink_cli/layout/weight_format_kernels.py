"""Conversion of weights into ggml's block formats and back, on the way from the matrices of a checkpoint to bundles.

The bytes are those of docs/weight_formats.md, on every machine: all arithmetic is IEEE float32 in a fixed order, and a
product is rounded before it is added to something.

Blocks are converted in groups, a block per lane: weight j of lane k is at `j * _LANES + k`. Loops over lanes then need
no sums across a vector, and of a matrix whose neurons are columns, lines are copied as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.regions import Region
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.files.weight_formats import (
    BLOCK_WEIGHTS,
    CONVERTIBLE_DTYPES,
    IQ4_NL,
    NEAREST,
    Q4_0,
    Q8_0,
    SEARCH,
    BlockFormat,
)
from neuralink_cli.kernels import kernel

Values = npt.NDArray[np.float32]

# The 16 levels of iq4_nl, as ggml has them.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# The scales that a search tries, as the level that the weight of greatest magnitude would have. The first of equally
# good ones is taken. Chosen greedily for the least error on Gaussian, Laplace, t and uniform weights.
CANDIDATES = {
    Q8_0.name: (127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0),
    Q4_0.name: (-8.0, -8.5, -7.25, -7.75, -8.25, -7.0, -8.75, -7.5),
    IQ4_NL.name: (-127.0, -134.0, 113.0, -122.0, 122.0, -110.0, -131.0, 116.0),
}

_LANES = 64
# Neurons of a tile of columns: a visit of a line reads some cache lines, and the bundles stay within reach of the TLB.
_TILE = 256

# What numba compiles are numbers: of the formats, and of the dtypes.
_Q8_0, _Q4_0, _IQ4_NL = range(3)
_NUMBERS = {Q8_0.name: _Q8_0, Q4_0.name: _Q4_0, IQ4_NL.name: _IQ4_NL}
_F32, _F16, _BF16 = range(3)
assert CONVERTIBLE_DTYPES == ("F32", "F16", "BF16")

_NOT_FINITE, _TOO_LARGE = range(2)

_RATIOS = np.array([CANDIDATES[name] for name in _NUMBERS], np.float32)
_LEVELS = np.array(IQ4_NL_LEVELS, np.float32)
_STEPS = _LEVELS[1:] - _LEVELS[:-1]
_MIDDLES = (_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2.0)


@dataclass(frozen=True)
class BadBlock:
    """A block that has no scale: weights `first_weight` to `first_weight` + 31 of a neuron."""

    neuron: int
    first_weight: int
    finite: bool
    """False if it holds NaN or infinity; else its weights are too large for a float16 scale."""

    def error(self, tensor: str, weight_format: BlockFormat) -> UnsupportedError:
        """What to raise: `tensor` is the tensor that the weights are from."""
        what = f"too large for {weight_format.name}" if self.finite else "NaN or infinite"
        last = self.first_weight + BLOCK_WEIGHTS - 1
        return UnsupportedError(
            f"weights of neuron {self.neuron:,} ({self.first_weight:,} to {last:,}) are {what}",
            where=tensor,
            fix="use the weight format source",
        )


def gather_quantised(
    lines: Bytes,
    region: Region,
    first: int,
    slots: Order,
    dtype: str,
    weight_format: BlockFormat,
    bundles: Bytes,
    stride: int,
    offset: int,
    *,
    rounding: str = NEAREST,
    importance: Values | None = None,
    neurons: range | None = None,
) -> BadBlock | None:
    """Quantise lines of a matrix into one part of the bundles: neuron j goes to bundle `slots[j]`.

    Args:
        lines: Bytes of a tensor from the start of `region` to its stop; on a multiple of the element's size in memory.
        region: Where these lines lie, from line `first` of the matrix on. Start and pitch are multiples of the
            element's size. With neurons as columns, `first` and the number of lines are multiples of 32.
        slots: int32 `[n]`, the slot of every neuron.
        dtype: That of the tensor, one of `CONVERTIBLE_DTYPES`.
        bundles: uint8 `[n * stride]`; `weight_format.row_bytes(hidden)` bytes are written at `offset` of each stride.
        rounding: One of `ROUNDINGS`. iq4_nl is always searched for.
        importance: float32 `[hidden]`, finite and not negative: how much the squared error of a weight counts in a
            search. None counts all alike.
        neurons: Only these neurons of the matrix (of the lines, if neurons are rows): how threads share the work. The
            bytes of a neuron do not depend on it.

    Returns:
        The first block, by neuron and then by weight, that cannot be converted; then the bundles are undefined. None if
        all could.
    """
    kind = CONVERTIBLE_DTYPES.index(dtype)
    size = 4 if kind == _F32 else 2
    source = lines.view(f"<u{size}")
    pitch, width = region.pitch // size, region.line_bytes // size
    by_rows = region.neuron_axis == 0
    hidden = width if by_rows else first + region.lines
    if hidden % BLOCK_WEIGHTS or (not by_rows and first % BLOCK_WEIGHTS):
        raise ValueError(f"lines {first} to {first + region.lines} of {width} weights are not whole blocks")
    if importance is not None and rounding != SEARCH:
        raise ValueError("only a search weighs errors")
    counts = np.ones(hidden, np.float32) if importance is None else np.ascontiguousarray(importance, np.float32)
    if counts.size < hidden:
        raise ValueError(f"{counts.size} weights of errors for rows of {hidden}")
    start = first if by_rows else 0
    some = neurons if neurons is not None else range(start, start + (region.lines if by_rows else width))
    number = _NUMBERS[weight_format.name]
    searching = rounding == SEARCH or number == _IQ4_NL
    how = (number, searching, counts, weight_format.block_bytes)
    if by_rows:
        some_slots = slots[some.start : some.stop]
        bad = _gather_rows(
            source,
            kind,
            pitch,
            some.start - first,
            some.start,
            some_slots,
            hidden // BLOCK_WEIGHTS,
            *how,
            bundles,
            stride,
            offset,
        )
    else:
        some_slots = slots[some.start : some.stop]
        bad = _gather_columns(
            source, kind, pitch, some.start, some_slots, first, region.lines, *how, bundles, stride, offset
        )
    if bad < 0:
        return None
    block, trouble = bad // 2, bad % 2
    return BadBlock(block >> 32, (block & 0xFFFFFFFF) * BLOCK_WEIGHTS, trouble != _NOT_FINITE)


def quantise(
    values: Values, weight_format: BlockFormat, *, rounding: str = NEAREST, importance: Values | None = None
) -> Bytes | BadBlock:
    """Quantise float32 `[rows, hidden]` to uint8 `[rows, row bytes]`, as `gather_quantised` does."""
    rows, hidden = values.shape
    data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    region = Region("", 0, 0, hidden * 4, rows, hidden * 4)
    stride = weight_format.row_bytes(hidden)
    target = np.empty(rows * stride, np.uint8)
    slots = np.arange(rows, dtype=np.int32)
    bad = gather_quantised(
        data, region, 0, slots, "F32", weight_format, target, stride, 0, rounding=rounding, importance=importance
    )
    return target.reshape(rows, stride) if bad is None else bad


def dequantise(rows: Bytes, weight_format: BlockFormat) -> Values:
    """The values of uint8 `[rows, row bytes]` as float32 `[rows, hidden]`: scale times level, exactly rounded."""
    count, nbytes = rows.shape
    blocks = nbytes // weight_format.block_bytes
    values = np.empty((count, blocks * BLOCK_WEIGHTS), np.float32)
    _dequantise(np.ascontiguousarray(rows).reshape(-1), _NUMBERS[weight_format.name], values.reshape(-1))
    return values


@kernel
def _gather_rows(
    source: Any,
    kind: int,
    pitch: int,
    line: int,
    neuron: int,
    slots: Any,
    blocks: int,
    number: int,
    searching: bool,
    counts: Any,
    block_bytes: int,
    target: Any,
    stride: int,
    offset: int,
) -> int:
    bits, weights, work, codes, places = _scratch()
    row = np.empty(_LANES * BLOCK_WEIGHTS, np.uint32)
    heavy = np.empty(_LANES * BLOCK_WEIGHTS, np.float32)
    total = slots.size * blocks
    for begin in range(0, total, _LANES):
        lanes = min(_LANES, total - begin)
        lane = 0
        while lane < lanes:
            # As many blocks as are next to each other in the source.
            at, block = divmod(begin + lane, blocks)
            run = min(lanes - lane, blocks - block)
            _widen(
                source,
                (line + at) * pitch + block * BLOCK_WEIGHTS,
                run * BLOCK_WEIGHTS,
                kind,
                row,
                lane * BLOCK_WEIGHTS,
            )
            if searching:
                _copy(counts, block * BLOCK_WEIGHTS, run * BLOCK_WEIGHTS, heavy, lane * BLOCK_WEIGHTS)
            place = slots[at] * stride + offset
            for k in range(run):
                places[lane + k] = place + (block + k) * block_bytes
            lane += run
        _transpose(row, lanes, bits)
        if searching:
            _transpose(heavy, lanes, weights)
        bad = _convert(bits, weights, lanes, number, searching, work, codes, places, target)
        if bad >= 0:
            at, block = divmod(begin + bad // 2, blocks)
            return _index(neuron + at, block, bad % 2)
    return -1


@kernel
def _gather_columns(
    source: Any,
    kind: int,
    pitch: int,
    neuron: int,
    slots: Any,
    first: int,
    lines: int,
    number: int,
    searching: bool,
    counts: Any,
    block_bytes: int,
    target: Any,
    stride: int,
    offset: int,
) -> int:
    bits, weights, work, codes, places = _scratch()
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
                bad = _convert(bits, weights, lanes, number, searching, work, codes, places, target)
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
def _scratch() -> Any:
    bits = np.zeros(BLOCK_WEIGHTS * _LANES, np.uint32)
    weights = np.ones(BLOCK_WEIGHTS * _LANES, np.float32)
    work = np.zeros((8, _LANES), np.uint32)
    codes = np.zeros(BLOCK_WEIGHTS * _LANES, np.uint8)
    places = np.zeros(_LANES, np.int64)
    return bits, weights, work, codes, places


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
    if normal > np.uint32(0x7C00):
        normal = np.uint32(0x7C00)
    if magnitude >= np.uint32(0x38800000):
        return np.uint32(sign | normal)
    steps = np.uint32(magnitude).view(np.float32) * np.float32(2.0**24)
    whole = np.int32(steps)
    rest = steps - np.float32(whole)
    if rest > np.float32(0.5) or (rest == np.float32(0.5) and whole & np.int32(1)):
        whole = np.int32(whole + np.int32(1))
    return np.uint32(sign | np.uint32(whole))


@kernel
def _convert(
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
    for k in range(lanes):
        if np.uint32(top[k] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
            return k * 2 + _NOT_FINITE
    for k in range(lanes):
        scale = _candidate(number, 0, floats[0, k])
        half[k] = _narrow_half(scale)
        if np.uint32(half[k] & np.uint32(0x7FFF)) == np.uint32(0x7C00):
            return k * 2 + _TOO_LARGE
        inverse[k] = np.float32(0.0) if scale == np.float32(0.0) else np.divide(np.float32(1.0), scale)
        kept[k] = np.uint32(0xFF)
        if np.isinf(inverse[k]):
            inverse[k], kept[k] = np.float32(0.0), np.uint32(0)
    if searching:
        _search(values, weights, lanes, number, half, inverse, floats[0], floats[4:8])
        for k in range(lanes):
            kept[k] = np.uint32(0xFF)
    _encode(values, lanes, number, inverse, codes)
    _store(codes, lanes, 32 if number == _Q8_0 else 16, half, kept, places, target)
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
    # np.divide, since numba's own division tests for zero.
    return np.divide(value, _RATIOS[number, candidate])


@kernel
def _search(values: Any, weights: Any, lanes: int, number: int, half: Any, inverse: Any, top: Any, work: Any) -> None:
    """Replace `half` and `inverse` of every lane by those of the candidate with the least error."""
    scale, trial, error, least = work[0], work[1], work[2], work[3]
    for candidate in range(_RATIOS.shape[1]):
        for k in range(lanes):
            rounded = np.uint32(_widen_half(_narrow_half(_candidate(number, candidate, top[k])))).view(np.float32)
            scale[k] = rounded
            trial[k] = np.float32(0.0) if rounded == np.float32(0.0) else np.divide(np.float32(1.0), rounded)
            error[k] = np.float32(0.0)
        _add_errors(values, weights, lanes, number, scale, trial, error)
        for k in range(lanes):
            if candidate == 0 or error[k] < least[k]:
                least[k], inverse[k] = error[k], trial[k]
                half[k] = _narrow_half(scale[k])


@kernel
def _add_errors(values: Any, weights: Any, lanes: int, number: int, scale: Any, inverse: Any, error: Any) -> None:
    for j in range(BLOCK_WEIGHTS):
        row = np.uintp(j * _LANES)
        if number == _Q8_0:
            for k in range(np.uintp(lanes)):
                value = values[row + k]
                miss = value - scale[k] * _q8_0_level(value * inverse[k])
                error[k] += weights[row + k] * (miss * miss)
        elif number == _Q4_0:
            for k in range(np.uintp(lanes)):
                value = values[row + k]
                miss = value - scale[k] * _q4_0_level(value * inverse[k])
                error[k] += weights[row + k] * (miss * miss)
        else:
            for k in range(np.uintp(lanes)):
                value = values[row + k]
                miss = value - scale[k] * _iq4_nl_level(value * inverse[k])
                error[k] += weights[row + k] * (miss * miss)


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
        if number == _Q4_0:
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
def _iq4_nl_code(value: Any) -> Any:
    """The number of the nearest level, the upper one of two."""
    code = np.int32(0)
    for i in range(15):
        code = np.int32(code + (np.int32(1) if value >= _MIDDLES[i] else np.int32(0)))
    return code


@kernel
def _iq4_nl_level(value: Any) -> Any:
    level = _LEVELS[0]
    for i in range(15):
        level = level + (_STEPS[i] if value >= _MIDDLES[i] else np.float32(0.0))
    return level


@kernel
def _dequantise(data: Any, number: int, values: Any) -> None:
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
