"""Moves weights between the matrices of a checkpoint and bundles, as unsigned integers of the element's size.

Row-column bundling (LLM in a flash, section 3.2): a bundle holds gate row | up row | down column of a neuron. A matrix
whose neurons are columns is transposed on the way. Lines of a matrix and bundles lie far apart in memory, so every
visit misses the TLB: tiles are copied in and out in long stretches and transposed inside the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.regions import Region, elements_of, taken_apart
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.kernels import kernel

_TILE = 256
_MICRO_TILE = 32


def gather_part(
    lines: Bytes, region: Region, first: int, slots: Order, element_bytes: int, bundles: Bytes, stride: int, offset: int
) -> None:
    """Copy lines of a matrix into one part of the bundles: neuron j goes to bundle `slots[j]`.

    Args:
        lines: Bytes of a tensor from the start of `region` to its stop.
        region: Where these lines lie, from line `first` of the matrix on.
        slots: int32 `[n]`, the slot of every neuron.
        bundles: uint8 `[n * stride]`, written at `offset` of each stride. Stride and offset are in bytes and multiples
            of `element_bytes`.
    """
    if region.lanes > 1:
        lines, region = taken_apart(lines, region, element_bytes)
    source, target = _elements(lines, element_bytes), _elements(bundles, element_bytes)
    pitch, step, start = region.pitch // element_bytes, stride // element_bytes, offset // element_bytes
    if region.neuron_axis == 0:
        some = slots[first : first + region.lines]
        _gather_rows(source, pitch, some, region.line_bytes // element_bytes, target, step, start)
    else:
        _gather_columns(source, pitch, slots, region.lines, target, step, start + first)


def scatter_part(
    bundles: Bytes, stride: int, offset: int, slots: Order, region: Region, first: int, element_bytes: int, lines: Bytes
) -> None:
    """The inverse of `gather_part`: restore lines of a matrix from the bundles; bytes of others stay."""
    if region.lanes > 1:
        own, apart = taken_apart(lines, region, element_bytes)
        scatter_part(bundles, stride, offset, slots, apart, first, element_bytes, own)
        elements_of(lines, region, element_bytes)[:] = elements_of(own, apart, element_bytes)
        return
    source, target = _elements(bundles, element_bytes), _elements(lines, element_bytes)
    pitch, step, start = region.pitch // element_bytes, stride // element_bytes, offset // element_bytes
    if region.neuron_axis == 0:
        some = slots[first : first + region.lines]
        _scatter_rows(source, step, start, some, region.line_bytes // element_bytes, target, pitch)
    else:
        _scatter_columns(source, step, start + first, slots, region.lines, target, pitch)


def move_lines(lines: Bytes, region: Region, first: int, to: Order, element_bytes: int, target: Bytes) -> None:
    """Move the neurons of a matrix inside it: neuron j of `lines` goes to place `to[j]` of `target`.

    Args:
        lines: Bytes of a tensor from the start of `region` to its stop.
        region: Where these lines lie, from line `first` of the matrix on.
        to: int32 `[n]`.
        target: Bytes of the target matrix, from the start of line 0; bytes of others stay.
    """
    if region.lanes > 1:
        own, apart = taken_apart(lines, region, element_bytes)
        moved = np.empty_like(own)
        move_lines(own, apart, 0, to, element_bytes, moved)
        there = elements_of(target[first * region.pitch :], region, element_bytes)
        there[:] = elements_of(moved, apart, element_bytes)
        return
    if region.neuron_axis == 0:
        gather_part(lines, region, first, to, element_bytes, target, region.pitch, 0)
    else:
        source, moved = _elements(lines, element_bytes), _elements(target[first * region.pitch :], element_bytes)
        _move_columns(source, moved, region.pitch // element_bytes, region.lines, to)


def _elements(data: Bytes, element_bytes: int) -> npt.NDArray[Any]:
    return data.view(f"<u{element_bytes}")


@kernel
def _copy(source: Any, begin: int, target: Any, place: int, count: int) -> None:
    # A loop, because numba takes seconds to compile a slice assignment. Unsigned, because numba tests signed indexes
    # for counting from the end, and then does not vectorise.
    first, last = np.uintp(begin), np.uintp(place)
    for i in range(np.uintp(count)):
        target[last + i] = source[first + i]


@kernel
def _gather_rows(source: Any, pitch: int, slots: Any, hidden: int, target: Any, step: int, start: int) -> None:
    for line in range(slots.size):
        _copy(source, line * pitch, target, slots[line] * step + start, hidden)


@kernel
def _scatter_rows(source: Any, step: int, start: int, slots: Any, hidden: int, target: Any, pitch: int) -> None:
    for line in range(slots.size):
        _copy(source, slots[line] * step + start, target, line * pitch, hidden)


@kernel
def _move_columns(source: Any, target: Any, pitch: int, lines: int, to: Any) -> None:
    for line in range(lines):
        for j in range(to.size):
            target[line * pitch + to[j]] = source[line * pitch + j]


@kernel
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


@kernel
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


@kernel
def _transpose(source: Any, height: int, width: int, target: Any) -> None:
    for top in range(0, height, _MICRO_TILE):
        rows = min(_MICRO_TILE, height - top)
        for left in range(0, width, _MICRO_TILE):
            for j in range(left, min(left + _MICRO_TILE, width)):
                first, last = np.uintp(top * _TILE + j), np.uintp(j * _TILE + top)
                for i in range(np.uintp(rows)):
                    target[last + i] = source[first + i * np.uintp(_TILE)]
