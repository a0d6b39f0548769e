"""Moves weights between the matrices of a checkpoint and bundles, as unsigned integers of the element's size.

Row-column bundling (LLM in a flash, section 3.2): a bundle holds gate row | up row | down column of a neuron. A matrix
whose neurons are columns is transposed on the way. Both sides are far apart in memory (a line of the matrix, a bundle),
so every visit is a miss of the TLB: tiles are copied in and out in long stretches and transposed inside the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from neuralink_cli.checkpoint.header import DTYPE_BITS
from neuralink_cli.checkpoint.regions import Region, Slab
from neuralink_cli.flash.moved import MovedPiece

Bytes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.int32]
_TILE = 256
_MICRO_TILE = 32


def gather_part(
    matrix: Bytes, region: Region, order: Order, element_bytes: int, bundles: Bytes, stride: int, offset: int
) -> None:
    """Put one part of every bundle in place: bundle k gets the row or column `order[k]` of a matrix.

    Args:
        matrix: The bytes of a tensor from the start of `region` to its stop, n neurons.
        bundles: uint8 `[n * stride]`, written at `offset` of each stride. Stride and offset are in bytes and multiples
            of `element_bytes`.
    """
    source, target = _elements(matrix, element_bytes), _elements(bundles, element_bytes)
    pitch, step, start = region.pitch // element_bytes, stride // element_bytes, offset // element_bytes
    if region.neuron_axis == 0:
        _gather_rows(source, pitch, order, region.line_bytes // element_bytes, target, step, start)
    else:
        _gather_columns(source, pitch, _slots(order), region.lines, target, step, start)


def scatter_part(
    bundles: Bytes, stride: int, offset: int, order: Order, region: Region, element_bytes: int, matrix: Bytes
) -> None:
    """The inverse of `gather_part`: restore the bytes of a matrix from the bundles; those between its lines stay."""
    source, target = _elements(bundles, element_bytes), _elements(matrix, element_bytes)
    pitch, step, start = region.pitch // element_bytes, stride // element_bytes, offset // element_bytes
    if region.neuron_axis == 0:
        _scatter_rows(source, step, start, order, region.line_bytes // element_bytes, target, pitch)
    else:
        _scatter_columns(source, step, start, _slots(order), region.lines, target, pitch)


def permute_neurons(source: Bytes, target: Bytes, region: Region, order: Order, element_bytes: int) -> None:
    """Fill a region of `target` with that of `source`, neuron `order[k]` moved to place k.

    Both are the bytes of a tensor from the start of the region to its stop; those between its lines stay.
    """
    moved = np.take(_lines(source, region, element_bytes), order, axis=region.neuron_axis)
    _lines(target, region, element_bytes)[...] = moved


def permute_slab(data: Bytes, slab: Slab[MovedPiece], dtype: str, order_of: Callable[[str], Order]) -> Bytes:
    """The bytes of a slab with the neurons of every piece moved, by the order of its block."""
    moved = np.empty_like(data)
    for piece in slab.pieces:
        place = slice(piece.region.start - slab.start, piece.region.stop - slab.start)
        permute_neurons(data[place], moved[place], piece.region, order_of(piece.block), DTYPE_BITS[dtype] // 8)
    return moved


def _lines(data: Bytes, region: Region, element_bytes: int) -> npt.NDArray[Any]:
    shape = (region.lines, region.line_bytes // element_bytes)
    return np.lib.stride_tricks.as_strided(_elements(data, element_bytes), shape, (region.pitch, element_bytes))


def _elements(data: Bytes, element_bytes: int) -> npt.NDArray[Any]:
    return data.view(f"<u{element_bytes}")


def _slots(order: Order) -> Order:
    slots = np.empty_like(order)
    slots[order] = np.arange(order.size, dtype=order.dtype)
    return slots


@njit(cache=True, nogil=True)
def _copy(source: Any, begin: int, target: Any, place: int, count: int) -> None:
    # A loop, because numba takes seconds to compile the assignment of a slice; unsigned, because signed indexes are
    # checked for counting from the end, and then not vectorised.
    first, last = np.uintp(begin), np.uintp(place)
    for i in range(np.uintp(count)):
        target[last + i] = source[first + i]


@njit(cache=True, nogil=True)
def _gather_rows(source: Any, pitch: int, order: Any, hidden: int, target: Any, step: int, start: int) -> None:
    for slot in range(order.size):
        _copy(source, order[slot] * pitch, target, slot * step + start, hidden)


@njit(cache=True, nogil=True)
def _scatter_rows(source: Any, step: int, start: int, order: Any, hidden: int, target: Any, pitch: int) -> None:
    for slot in range(order.size):
        _copy(source, slot * step + start, target, order[slot] * pitch, hidden)


@njit(cache=True, nogil=True)
def _gather_columns(source: Any, pitch: int, slots: Any, hidden: int, target: Any, step: int, start: int) -> None:
    neurons = slots.size
    lines = np.empty(_TILE * _TILE, source.dtype)
    columns = np.empty(_TILE * _TILE, source.dtype)
    for neuron in range(0, neurons, _TILE):
        width = min(_TILE, neurons - neuron)
        for line in range(0, hidden, _TILE):
            height = min(_TILE, hidden - line)
            for i in range(height):
                _copy(source, (line + i) * pitch + neuron, lines, i * _TILE, width)
            _transpose(lines, height, width, columns)
            for j in range(width):
                _copy(columns, j * _TILE, target, slots[neuron + j] * step + start + line, height)


@njit(cache=True, nogil=True)
def _scatter_columns(source: Any, step: int, start: int, slots: Any, hidden: int, target: Any, pitch: int) -> None:
    neurons = slots.size
    lines = np.empty(_TILE * _TILE, source.dtype)
    columns = np.empty(_TILE * _TILE, source.dtype)
    for neuron in range(0, neurons, _TILE):
        width = min(_TILE, neurons - neuron)
        for line in range(0, hidden, _TILE):
            height = min(_TILE, hidden - line)
            for j in range(width):
                _copy(source, slots[neuron + j] * step + start + line, columns, j * _TILE, height)
            _transpose(columns, width, height, lines)
            for i in range(height):
                _copy(lines, i * _TILE, target, (line + i) * pitch + neuron, width)


@njit(cache=True, nogil=True)
def _transpose(source: Any, height: int, width: int, target: Any) -> None:
    for top in range(0, height, _MICRO_TILE):
        rows = min(_MICRO_TILE, height - top)
        for left in range(0, width, _MICRO_TILE):
            for j in range(left, min(left + _MICRO_TILE, width)):
                first, last = np.uintp(top * _TILE + j), np.uintp(j * _TILE + top)
                for i in range(np.uintp(rows)):
                    target[last + i] = source[first + i * np.uintp(_TILE)]
