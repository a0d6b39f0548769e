"""Weights of codes and scales as float32: the code as float32, times its scale as float32, rounded once.

Regions of packed codes are given as those of the codes unpacked, a byte each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.regions import Region
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor
from neuralink_cli.files.header import DTYPE_BITS
from neuralink_cli.kernels import kernel
from neuralink_cli.weight_formats.mxfp4_kernels import carry_mxfp4
from neuralink_cli.weight_formats.quantising import BadBlock, as_float32

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scales:
    """The scales of some rows of a tensor, and the values of its codes.

    Attributes:
        values: float32 `[ceil(rows / block_rows), ceil(columns / block_columns)]`.
        levels: float32 `[256]`, the value of every code; `[16]` of codes of 4 bits.
        bits: Bits of a code, 8 or 4.
        exponents: uint8, of the shape of `values`, if these are powers of two and the codes MXFP4; 255 is NaN.
        first_row: The row of the tensor that they start with, a multiple of `block_rows`.
    """

    tensor: ScaledTensor
    values: Values
    levels: Values
    bits: int = 8
    exponents: Bytes | None = None
    first_row: int = 0


# The scales of MXFP4, by byte; 255 is not a number.
_POWERS_OF_TWO = np.append(np.ldexp(np.float32(1.0), np.arange(-127, 128)), np.nan).astype(np.float32)

# The numbers of MXFP4, by code.
MXFP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def read_scales(checkpoint: Checkpoint, name: str, region: Region | None = None) -> Scales | None:
    """The scales of a tensor of a checkpoint; None if its weights are numbers by themselves.

    Args:
        region: The scales of its rows only, of all rows if None. A tensor may hold all experts of a layer.
    """
    tensor = checkpoint.scaled.get(name)
    if tensor is None:
        return None
    place = checkpoint.place(tensor.scales)
    rows = range(tensor.rows)
    if region is not None:
        rows = range(region.start // tensor.columns, (region.stop - 1) // tensor.columns + 1)
    first, last = rows.start // tensor.block_rows, (rows.stop - 1) // tensor.block_rows
    shape = (last + 1 - first, -(-tensor.columns // tensor.block_columns))
    line = shape[1] * DTYPE_BITS[place.entry.dtype] // 8
    stored = place.file.read(tensor.scales, first * line, (last + 1) * line)
    first_row = first * tensor.block_rows
    packed = checkpoint.packed.get(name)
    powers = place.entry.dtype == "U8"
    values = (powers_of_two(stored) if powers else as_float32(stored, place.entry.dtype)).reshape(shape)
    if packed is None:
        return Scales(tensor, values, levels_of(checkpoint.place(name).entry.dtype), first_row=first_row)
    if packed.floats:
        exponents = stored.reshape(shape) if powers else None
        return Scales(tensor, values, np.array(MXFP4_LEVELS, np.float32), packed.bits, exponents, first_row)
    return Scales(tensor, values, packed_levels(packed.bits), packed.bits, first_row=first_row)


def powers_of_two(exponents: Bytes) -> Values:
    """The scales that bytes stand for in MXFP4: 2**(byte - 127), and NaN for 255."""
    return _POWERS_OF_TWO[exponents]


def packed_levels(bits: int) -> Values:
    """The value of each code of `bits` bits in packed weights: float32, half of how many there are less."""
    return np.arange(1 << bits, dtype=np.float32) - np.float32(1 << bits >> 1)


def levels_of(dtype: str) -> Values:
    """The value of each of the 256 codes of `I8` or `F8_E4M3` (one NaN of each sign, no infinity): float32."""
    codes = np.arange(256, dtype=np.int64)
    if dtype == "I8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    values[(codes & 127) == 127] = np.nan
    return np.where(codes >= 128, -values, values).astype(np.float32)


def widen_scaled(lines: Bytes, region: Region, scales: Scales) -> tuple[Bytes, Region]:
    """Lines of codes as lines of float32, one after the other.

    Args:
        lines: Bytes of the tensor from the start of `region` to its stop; of packed codes, the bytes that hold them.
        region: Where these lines lie: rows of the tensor, or the same stretch of each.

    Returns:
        The bytes of the values, and where they lie.
    """
    columns = scales.tensor.columns
    row, column = divmod(region.start, columns)
    row -= scales.first_row
    # Rows of several parts may alternate.
    step = max(region.pitch // columns, 1)
    values = np.empty((region.lines, region.line_bytes), np.float32)
    block = (scales.tensor.block_rows, scales.tensor.block_columns)
    if scales.bits == 4:
        # The first code may be in the high bits of a byte.
        odd, where = region.start % 2, (row, step, column)
        _widen_nibbles(lines, odd, region.pitch, *where, scales.levels, scales.values, *block, values)
    else:
        _widen(lines, region.pitch, row, step, column, scales.levels, scales.values, *block, values)
    width = 4 * region.line_bytes
    return values.reshape(-1).view(np.uint8), replace(region, start=0, pitch=width, line_bytes=width)


def widen_rows(rows: Bytes, first: int, scales: Scales) -> Bytes:
    """Whole rows of codes, from row `first` of the tensor on, as the bytes of float32 values.

    Args:
        rows: Whole bytes; rows of packed codes are whole bytes too.
    """
    columns = scales.tensor.columns
    count = rows.size * 8 // scales.bits // columns
    region = Region(scales.tensor.name, 0, first * columns, columns, count, columns)
    return widen_scaled(rows, region, scales)[0]


def carry_quantised(
    lines: Bytes, region: Region, first: int, slots: Order, scales: Scales, bundles: Bytes, stride: int, offset: int
) -> BadBlock | None:
    """Move rows of MXFP4 into one part of the bundles as blocks of ggml's: neuron j goes to bundle `slots[j]`.

    Args:
        lines: The bytes that hold the codes from the start of `region` to its stop.
        region: Where these lines lie, from line `first` of the matrix on; rows of whole blocks.

    Returns:
        The first block whose scale is NaN; then the bundles are undefined. None if there is none.

    Raises:
        ValueError: The weights are no such rows.
    """
    if scales.exponents is None or region.neuron_axis != 0 or region.start % 32 or region.line_bytes % 32:
        raise ValueError(f"{region.tensor} has no rows of MXFP4")
    row, column = divmod(region.start, scales.tensor.columns)
    row -= scales.first_row
    step = max(region.pitch // scales.tensor.columns, 1)
    some = slots[first : first + region.lines]
    pitch, blocks = region.pitch // 2, region.line_bytes // 32
    place = (stride, offset, some, first)
    bad = carry_mxfp4(lines, pitch, row, step, scales.exponents, column // 32, blocks, bundles, place)
    return None if bad < 0 else BadBlock(bad >> 32, (bad & 0xFFFFFFFF) * 32, finite=False)


@kernel
def _widen(
    codes: Any,
    pitch: int,
    row: int,
    step: int,
    column: int,
    levels: Any,
    scales: Any,
    block_rows: int,
    block_columns: int,
    out: Any,
) -> None:
    for i in range(out.shape[0]):
        r = (row + i * step) // block_rows
        j = 0
        while j < out.shape[1]:
            # Up to the end of a block of columns.
            c = (column + j) // block_columns
            stop = min((c + 1) * block_columns - column, out.shape[1])
            scale = scales[r, c]
            for k in range(j, stop):
                out[i, k] = levels[codes[i * pitch + k]] * scale
            j = stop


@kernel
def _widen_nibbles(
    codes: Any,
    odd: int,
    pitch: int,
    row: int,
    step: int,
    column: int,
    levels: Any,
    scales: Any,
    block_rows: int,
    block_columns: int,
    out: Any,
) -> None:
    """As `_widen`, of codes of 4 bits: the even ones in the low half of a byte."""
    for i in range(out.shape[0]):
        r = (row + i * step) // block_rows
        first = np.uintp(odd + i * pitch)
        j = 0
        while j < out.shape[1]:
            c = (column + j) // block_columns
            stop = min((c + 1) * block_columns - column, out.shape[1])
            scale = scales[r, c]
            for k in range(np.uintp(j), np.uintp(stop)):
                at = first + k
                byte = codes[at >> np.uintp(1)]
                out[i, k] = levels[(byte >> np.uint8(4)) if at & np.uintp(1) else (byte & np.uint8(15))] * scale
            j = stop
