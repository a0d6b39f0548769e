"""A checkpoint with the weights that a layout of rounded weights computes with: decoded, as float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes
from neuralink_cli.checkpoint.config import plain_config
from neuralink_cli.checkpoint.file_names import CONFIG_FILE
from neuralink_cli.checkpoint.mxfp4_stacks import decoded_name
from neuralink_cli.files.durable import write_file
from neuralink_cli.files.header import DTYPE_BITS, TensorEntry, build_header
from neuralink_cli.files.json_text import read_foreign_object, readable
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.companions import restore_companions
from neuralink_cli.layout.dense_rounding import decoded_section
from neuralink_cli.layout.plan import BundlePart, SourcePiece
from neuralink_cli.rewriting.unbundling import tensor_sections
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.sections import Section, ready, write_sections
from neuralink_cli.weight_formats.formats import BLOCK_FORMATS, SOURCE
from neuralink_cli.weight_formats.quantising import as_float32, dequantise

Values = npt.NDArray[np.float32]


def write_decoded(layout: BundledLayout, directory: Path, progress: Callable[[int], object] | None = None) -> None:
    """Write the checkpoint that a layout computes with, for transformers to load.

    Tensors with rounded weights are F32 there, exactly the values that their bytes stand for; all others are as they
    were. Of a checkpoint that was quantised, the scales are left out, and what its config says of them. A tensor is in
    memory at a time.

    Raises:
        OutputError: It does not fit on the disk.
        InputError, VerificationError: The layout is damaged.
    """
    directory.mkdir()
    restore_companions(layout, directory)
    for name, content in layout.verbatim.items():
        if not (directory / name).exists():
            write_file(directory / name, content)
    if layout.scales:
        _write_plain_config(directory / CONFIG_FILE)
    rounded = {
        name
        for name, slabs in layout.made_slabs.items()
        if any(piece.part.weights != SOURCE for slab in slabs for piece in slab.pieces)
    }
    wide = rounded | layout.dense.keys()
    for file, stated in layout.source_entries.items():
        entries = [entry for entry in stated if entry.name not in layout.scales]
        specs = [_spec(layout, entry, wide=entry.name in wide) for entry in entries]
        sections: list[Section] = [ready(build_header(specs, {"format": "pt"}).prelude)]
        for entry in entries:
            if entry.name in layout.dense:
                sections.append(decoded_section(layout.dense[entry.name], layout.file))
            else:
                sections += [_decoded(layout, entry)] if entry.name in rounded else tensor_sections(layout, [entry])
        write_sections(directory / file, sections, progress)


def _spec(layout: BundledLayout, entry: TensorEntry, *, wide: bool) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape of a decoded tensor; stacks of matrices are turned around, as transformers has them."""
    if _is_stack(layout, entry):
        experts, rows, columns = entry.shape
        return decoded_name(entry.name), "F32", (experts, columns, rows)
    return entry.name, "F32" if wide else entry.dtype, entry.shape


def _is_stack(layout: BundledLayout, entry: TensorEntry) -> bool:
    return entry.name in layout.packed and layout.packed[entry.name].stacked > 0


def _write_plain_config(path: Path) -> None:
    """Write a config again without what it says of quantisation."""
    config = plain_config(read_foreign_object(path))
    path.unlink()
    write_file(path, readable(config).encode())


def _decoded(layout: BundledLayout, entry: TensorEntry) -> Section:
    size = entry.nbytes * 8 // DTYPE_BITS[entry.dtype] * 4

    def write(output: OutputFile, _pieces: Iterator[Bytes]) -> None:
        values = decoded_tensor(layout, entry)
        if not _is_stack(layout, entry):
            output.write(values.view(np.uint8))
            return
        for matrix in values.reshape(entry.shape):
            output.write(np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint8))

    return Section(size, (), write)


def decoded_tensor(layout: BundledLayout, entry: TensorEntry) -> Values:
    """A source tensor as the layout has it: float32, flat, in the order of the source."""
    element_bytes = DTYPE_BITS[entry.dtype] // 8
    values = np.empty(entry.nbytes // element_bytes, dtype=np.float32)
    for slab in layout.made_slabs[entry.name]:
        for piece in slab.pieces:
            region = piece.region
            pitch, width = region.pitch // element_bytes, region.line_bytes // element_bytes // region.lanes
            lines = np.lib.stride_tricks.as_strided(
                values[region.start // element_bytes + region.lane :],
                (region.lines, width),
                (4 * pitch, 4 * region.lanes),
            )
            neurons = lines if region.neuron_axis == 0 else lines.T
            neurons[layout.order(piece.block.id)] = rows_by_slot(layout, piece)
    return values


def rows_by_slot(layout: BundledLayout, piece: SourcePiece) -> Values:
    """The weights of a piece, float32 `[n, hidden]`, by slot."""
    stored, part = layout.file.read(piece.stored.tensor).reshape(piece.block.neurons, -1), piece.part
    rows = np.ascontiguousarray(
        stored[:, part.offset : part.offset + part.bytes] if isinstance(part, BundlePart) else stored
    )
    return as_float32(rows, piece.dtype) if part.weights == SOURCE else dequantise(rows, BLOCK_FORMATS[part.weights])
