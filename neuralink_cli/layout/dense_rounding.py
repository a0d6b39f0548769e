"""Dense tensors in a weight format: rounded row by row, in stretches of rows, for writing and for verifying."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.regions import stretches
from neuralink_cli.arrays import Bytes
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.plan import DenseTensor
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import FileRange, Scratch
from neuralink_cli.streaming.sections import Section
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS
from neuralink_cli.weight_formats.quantising import dequantise, quantise_rows
from neuralink_cli.weight_formats.scaled import read_scales, widen_rows


def source_reads(tensor: DenseTensor, checkpoint: Checkpoint) -> tuple[FileRange, ...]:
    """The stretches of rows in the source."""
    place, row = checkpoint.place(tensor.name), tensor.source_row_bytes
    return tuple(place.stretch(first * row, (first + count) * row) for first, count in _cuts(tensor))


def stored_reads(tensor: DenseTensor, file: TensorFile) -> tuple[FileRange, ...]:
    """The same stretches of rows in the layout."""
    start, row = tensor.place.offset, tensor.row_bytes
    return tuple(FileRange(file, start + first * row, count * row) for first, count in _cuts(tensor))


def rounded(
    tensor: DenseTensor, source: Iterable[Bytes], rounding: str, scratch: Scratch, checkpoint: Checkpoint
) -> Iterator[Bytes]:
    """Round stretches of rows; each is valid until the next.

    Args:
        source: The bytes of `source_reads`.
        checkpoint: The source, which has the scales of weights that need some.

    Raises:
        UnsupportedError: Weights that cannot be rounded.
    """
    kind, scales = BLOCK_FORMATS[tensor.weights], read_scales(checkpoint, tensor.name)
    dtype = tensor.dtype if scales is None else "F32"
    for (first, count), rows in zip(_cuts(tensor), source, strict=True):
        made = scratch.take(count * tensor.row_bytes)
        if scales is not None:
            rows = widen_rows(rows, first, scales)
        bad = quantise_rows(rows, dtype, tensor.columns, kind, made, rounding=rounding)
        if bad is not None:
            raise bad.error(tensor.name, kind, line="row", first=first)
        yield made


def rounded_section(tensor: DenseTensor, checkpoint: Checkpoint, rounding: str, scratch: Scratch) -> Section:
    """A section with the rounded tensor."""
    reads = source_reads(tensor, checkpoint)

    def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
        for made in rounded(tensor, (next(pieces) for _ in reads), rounding, scratch, checkpoint):
            output.write(made)

    return Section(tensor.place.bytes, reads, write)


def longest_rounded(tensor: DenseTensor) -> int:
    """Bytes of the longest stretch of rounded rows that is in memory at a time."""
    return max((count * tensor.row_bytes for _, count in _cuts(tensor)), default=0)


def passing_bytes(tensor: DenseTensor, checkpoint: Checkpoint) -> int:
    """Bytes that rounding has in memory beside that stretch and what it reads: scales, and rows widened to float32."""
    if tensor.name not in checkpoint.scaled:
        return 0
    widened = max((4 * count * tensor.columns for _, count in _cuts(tensor)), default=0)
    return widened + checkpoint.scale_bytes(tensor.name, tensor.rows * tensor.columns)


def decoded_section(tensor: DenseTensor, file: TensorFile) -> Section:
    """A section with the values that the tensor stands for, as F32."""
    reads = stored_reads(tensor, file)

    def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
        for _ in reads:
            output.write(decoded_rows(tensor, next(pieces)))

    return Section(tensor.rows * tensor.columns * 4, reads, write)


def decoded_rows(tensor: DenseTensor, stored: Bytes) -> npt.NDArray[np.float32]:
    """The values of whole rows, float32 `[rows, columns]`, from their bytes."""
    return dequantise(stored.reshape(-1, tensor.row_bytes), BLOCK_FORMATS[tensor.weights])


def _cuts(tensor: DenseTensor) -> Iterator[tuple[int, int]]:
    return stretches(tensor.rows, tensor.source_row_bytes, pipeline.PIECE)
