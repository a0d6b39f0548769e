"""Conversion of weights into ggml's block formats and back, on the way from the matrices of a checkpoint to bundles.

The bytes are those of docs/weight_formats.md, on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.regions import Region
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.kernels import kernel
from neuralink_cli.layout.quantising import (
    IQ4_NL_NUMBER,
    LANES,
    LEVELS,
    NOT_FINITE,
    NUMBERS,
    Q4_0_NUMBER,
    Q8_0_NUMBER,
    convert,
    widen,
    widen_half,
)
from neuralink_cli.layout.weight_formats import (
    BLOCK_WEIGHTS,
    CONVERTIBLE_DTYPES,
    NEAREST,
    SEARCH,
    BlockFormat,
)

Values = npt.NDArray[np.float32]

# Neurons of a tile of columns: a visit of a line reads some cache lines, and the bundles stay within reach of the TLB.
_TILE = 256


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
    size = 4 if dtype == "F32" else 2
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
    number = NUMBERS[weight_format.name]
    searching = rounding == SEARCH or number == IQ4_NL_NUMBER
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
    return BadBlock(block >> 32, (block & 0xFFFFFFFF) * BLOCK_WEIGHTS, trouble != NOT_FINITE)


def quantise(
    values: Values,
    weight_format: BlockFormat,
    target: Bytes,
    *,
    rounding: str = NEAREST,
    importance: Values | None = None,
) -> BadBlock | None:
    """Quantise float32 `[rows, hidden]` to uint8 `[rows, row bytes]`, contiguous, as `gather_quantised` does."""
    count, hidden = values.shape
    data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    region = Region("", 0, 0, hidden * 4, count, hidden * 4)
    return gather_quantised(
        data,
        region,
        0,
        np.arange(count, dtype=np.int32),
        "F32",
        weight_format,
        target.reshape(-1),
        weight_format.row_bytes(hidden),
        0,
        rounding=rounding,
        importance=importance,
    )


def dequantise(rows: Bytes, weight_format: BlockFormat) -> Values:
    """The values of uint8 `[rows, row bytes]` as float32 `[rows, hidden]`: scale times level, exactly rounded."""
    count, nbytes = rows.shape
    blocks = nbytes // weight_format.block_bytes
    values = np.empty((count, blocks * BLOCK_WEIGHTS), np.float32)
    _dequantise(np.ascontiguousarray(rows).reshape(-1), NUMBERS[weight_format.name], values.reshape(-1))
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
    row = np.empty(LANES * BLOCK_WEIGHTS, np.uint32)
    heavy = np.empty(LANES * BLOCK_WEIGHTS, np.float32)
    total = slots.size * blocks
    for begin in range(0, total, LANES):
        lanes = min(LANES, total - begin)
        lane = 0
        while lane < lanes:
            # As many blocks as are next to each other in the source.
            at, block = divmod(begin + lane, blocks)
            run = min(lanes - lane, blocks - block)
            widen(
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
        bad = convert(bits, weights, lanes, number, searching, work, codes, places, target)
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
            for begin in range(tile, end, LANES):
                lanes = min(LANES, end - begin)
                for j in range(BLOCK_WEIGHTS):
                    widen(staged, j * _TILE + begin - tile, lanes, kind, bits, j * LANES)
                for k in range(lanes):
                    places[k] = slots[begin + k] * stride + offset + block * block_bytes
                bad = convert(bits, weights, lanes, number, searching, work, codes, places, target)
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
    bits = np.zeros(BLOCK_WEIGHTS * LANES, np.uint32)
    weights = np.ones(BLOCK_WEIGHTS * LANES, np.float32)
    work = np.zeros((9, LANES), np.uint32)
    codes = np.zeros(BLOCK_WEIGHTS * LANES, np.uint8)
    places = np.zeros(LANES, np.int64)
    return bits, weights, work, codes, places


@kernel
def _copy(source: Any, begin: int, count: int, target: Any, place: int) -> None:
    first, last = np.uintp(begin), np.uintp(place)
    for i in range(np.uintp(count)):
        target[last + i] = source[first + i]


@kernel
def _fill(counts: Any, first: int, weights: Any) -> None:
    for j in range(BLOCK_WEIGHTS):
        count, row = counts[first + j], np.uintp(j * LANES)
        for k in range(np.uintp(LANES)):
            weights[row + k] = count


@kernel
def _transpose(rows: Any, lanes: int, target: Any) -> None:
    for j in range(BLOCK_WEIGHTS):
        first, row = np.uintp(j), np.uintp(j * LANES)
        for k in range(np.uintp(lanes)):
            target[row + k] = rows[first + k * np.uintp(BLOCK_WEIGHTS)]


@kernel
def _dequantise(data: Any, number: int, values: Any) -> None:
    block_bytes = 34 if number == Q8_0_NUMBER else 18
    for block in range(values.size // BLOCK_WEIGHTS):
        first, last = np.uintp(block * block_bytes), np.uintp(block * BLOCK_WEIGHTS)
        half = np.uint32(np.uint32(data[first]) | np.uint32(np.uint32(data[first + np.uintp(1)]) << np.uint32(8)))
        scale = np.uint32(widen_half(half)).view(np.float32)
        first += np.uintp(2)
        if number == Q8_0_NUMBER:
            for j in range(np.uintp(BLOCK_WEIGHTS)):
                values[last + j] = scale * np.float32(np.int8(data[first + j]))
            continue
        for j in range(np.uintp(BLOCK_WEIGHTS // 2)):
            code = data[first + j]
            low, high = np.int32(code & np.uint8(15)), np.int32(code >> np.uint8(4))
            if number == Q4_0_NUMBER:
                values[last + j] = scale * np.float32(np.int32(low - np.int32(8)))
                values[last + np.uintp(16) + j] = scale * np.float32(np.int32(high - np.int32(8)))
            else:
                values[last + j] = scale * LEVELS[low]
                values[last + np.uintp(16) + j] = scale * LEVELS[high]
