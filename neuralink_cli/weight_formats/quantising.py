"""Conversion of weights into ggml's block formats, on the way from the matrices of a checkpoint to bundles, and back.

docs/weight_formats.md says what every byte is; they are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.regions import Region
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.weight_formats.block_kernels import (
    DTYPE_NUMBERS,
    FORMAT_NUMBERS,
    NOT_FINITE,
    dequantise_blocks,
    gather_columns,
    gather_rows,
    scratch_arrays,
)
from neuralink_cli.weight_formats.formats import (
    BLOCK_WEIGHTS,
    IQ4_NL,
    MXFP4,
    NEAREST,
    ROUNDING_FORMATS,
    SEARCH,
    BlockFormat,
)
from neuralink_cli.weight_formats.mxfp4_kernels import dequantise_mxfp4

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BadBlock:
    """A block that has no scale: weights `first_weight` to `first_weight` + 31 of a neuron."""

    neuron: int
    first_weight: int
    finite: bool
    """False if it holds NaN or infinity; else its weights are too large for a float16 scale."""

    def error(
        self, tensor: str, weight_format: BlockFormat, *, line: str = "neuron", first: int = 0
    ) -> UnsupportedError:
        """What to raise: `tensor` is the tensor that the weights are from.

        Args:
            line: What the weights are those of, and `first` the number of the first of them.
        """
        what = f"too large for {weight_format.name}" if self.finite else "NaN or infinite"
        last = self.first_weight + BLOCK_WEIGHTS - 1
        return UnsupportedError(
            f"weights of {line} {first + self.neuron:,} ({self.first_weight:,} to {last:,}) are {what}",
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
    size = 4 if dtype == "F32" else 2
    source = lines.view(f"<u{size}")
    pitch, width = region.pitch // size, region.line_bytes // size
    by_rows = region.neuron_axis == 0
    hidden = width if by_rows else first + region.lines
    if hidden % BLOCK_WEIGHTS or (not by_rows and first % BLOCK_WEIGHTS):
        raise ValueError(f"lines {first} to {first + region.lines} of {width} weights are not whole blocks")
    if weight_format.name not in ROUNDING_FORMATS:
        raise ValueError(f"nothing is rounded to {weight_format.name}")
    if importance is not None and rounding != SEARCH:
        raise ValueError("only a search weighs errors")
    weights = np.ones(hidden, np.float32) if importance is None else np.ascontiguousarray(importance, np.float32)
    if weights.size < hidden:
        raise ValueError(f"importance of {weights.size} weights, not of {hidden}")
    if neurons is None:
        neurons = range(first, first + region.lines) if by_rows else range(width)
    searching = rounding == SEARCH or weight_format is IQ4_NL
    how = (FORMAT_NUMBERS[weight_format.name], weight_format.block_bytes, searching, weights)
    places = (bundles, stride, offset, slots[neurons.start : neurons.stop], neurons.start)
    kind = DTYPE_NUMBERS[dtype]
    scratch = scratch_arrays()
    if by_rows:
        bad = gather_rows(source, kind, pitch, neurons.start - first, hidden // BLOCK_WEIGHTS, how, places, scratch)
    else:
        bad = gather_columns(source, kind, pitch, first, region.lines, how, places, scratch)
    if bad < 0:
        return None
    block, trouble = divmod(bad, 2)
    return BadBlock(block >> 32, (block & 0xFFFFFFFF) * BLOCK_WEIGHTS, trouble != NOT_FINITE)


def quantise_rows(
    rows: Bytes,
    dtype: str,
    columns: int,
    weight_format: BlockFormat,
    target: Bytes,
    *,
    rounding: str = NEAREST,
    importance: Values | None = None,
) -> BadBlock | None:
    """Quantise rows of `columns` weights of `dtype`, given as bytes, as `gather_quantised` does.

    Args:
        target: uint8 `[rows * row bytes]`, contiguous.
    """
    width = columns * (4 if dtype == "F32" else 2)
    count = rows.size // width
    return gather_quantised(
        rows,
        Region("", 0, 0, width, count, width),
        0,
        np.arange(count, dtype=np.int32),
        dtype,
        weight_format,
        target.reshape(-1),
        weight_format.row_bytes(columns),
        0,
        rounding=rounding,
        importance=importance,
    )


def as_float32(data: Bytes, dtype: str) -> Values:
    """Bytes of F32, F16 or BF16 as the same numbers in float32; the last axis is that of the bytes."""
    if dtype == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    return data.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def dequantise(rows: Bytes, weight_format: BlockFormat) -> Values:
    """The values of uint8 `[rows, row bytes]` as float32 `[rows, hidden]`: scale times level, exactly rounded."""
    count, nbytes = rows.shape
    blocks = nbytes // weight_format.block_bytes
    values = np.empty((count, blocks * BLOCK_WEIGHTS), np.float32)
    blocks, flat = np.ascontiguousarray(rows).reshape(-1), values.reshape(-1)
    if weight_format == MXFP4:
        dequantise_mxfp4(blocks, flat)
    else:
        dequantise_blocks(blocks, FORMAT_NUMBERS[weight_format.name], flat)
    return values
