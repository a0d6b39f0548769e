"""Writes permuted layouts: moves the neurons of every tensor into their new order as it streams through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from neuralink_cli.architectures.blocks import MovedPiece
from neuralink_cli.architectures.regions import Slab, cut_into_slabs, stretches
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.files.header import DTYPE_BITS, TensorEntry
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.bundling import move_lines
from neuralink_cli.placement.placement import PlacedBlock, inverse
from neuralink_cli.rewriting.bundled_writer import tensor_section
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.journal import Journal
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import FileRange, Scratch
from neuralink_cli.streaming.sections import Section, ready, write_sections

# Where each neuron of a block goes, int32 `[n]`.
Moves = Callable[[str], Order]


def moved_section(
    file: TensorFile, entry: TensorEntry, slabs: Sequence[Slab[MovedPiece]], moves: Moves, scratch: Scratch
) -> Section:
    """The section of a tensor with its neurons moved."""

    def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
        for slab in slabs:
            for moved in moved_bytes(slab, entry.dtype, moves, pieces, scratch):
                output.write(moved)

    reads = tuple(wanted for slab in slabs for wanted in slab_reads(file, entry, slab))
    return Section(entry.nbytes, reads, write)


def slab_reads(file: TensorFile, entry: TensorEntry, slab: Slab[MovedPiece]) -> Iterator[FileRange]:
    """What to read from a tensor for `moved_bytes` of a slab."""
    start = file.header.offset_of(entry) + slab.start
    for first, count in stretches(slab.lines, slab.pitch, pipeline.PIECE):
        yield FileRange(file, start + first * slab.pitch, count * slab.pitch)


def moved_bytes(
    slab: Slab[MovedPiece], dtype: str, moves: Moves, pieces: Iterator[Bytes], scratch: Scratch
) -> Iterator[Bytes]:
    """The bytes of a slab with the neurons of each of its pieces moved, in one or several parts.

    Args:
        pieces: The bytes that `slab_reads` asks for.
    """
    to = {piece.block: moves(piece.block) for piece in slab.pieces}
    # If lines are neurons, they may go anywhere in the slab; otherwise neurons move inside their line.
    whole = any(piece.region.neuron_axis == 0 for piece in slab.pieces)
    for first, count in stretches(slab.lines, slab.pitch, pipeline.PIECE):
        data = next(pieces)
        moved = scratch.take(slab.nbytes if whole else data.size)
        for piece in slab.pieces:
            region = piece.region.some_lines(first, count)
            begin = piece.region.start - slab.start
            lines = data[begin : begin + region.stop - region.start]
            line = first if whole else 0
            move_lines(lines, region, line, to[piece.block], DTYPE_BITS[dtype] // 8, moved[begin:])
        if not whole or first + count == slab.lines:
            yield moved


def write_permuted(
    directory: Path,
    checkpoint: Checkpoint,
    moved: Mapping[str, Sequence[MovedPiece]],
    placed: Mapping[str, PlacedBlock],
    progress: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> dict[str, str]:
    """Write every weight file into `directory`, with the header bytes it had, and return their SHA-256 by name.

    Args:
        moved: From `moved_pieces`.
    """
    scratch = Scratch()
    digests = {}
    for file in checkpoint.files:
        sections = [ready(file.header.prelude)]
        for entry in file.header.entries:
            if entry.name in moved:
                slabs = cut_into_slabs(moved[entry.name], entry.nbytes)
                sections.append(moved_section(file, entry, slabs, lambda block: inverse(placed[block].order), scratch))
            else:
                sections.append(tensor_section(checkpoint, entry.name))
        digests[file.path.name] = write_sections(directory / file.path.name, sections, progress, journal)
    return digests
