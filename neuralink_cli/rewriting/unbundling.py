"""Rebuilds the tensors of a source checkpoint from a layout, as sections to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from neuralink_cli.architectures.regions import Slab, stretches
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.files.header import DTYPE_BITS, TensorEntry
from neuralink_cli.layout.bundling import scatter_part
from neuralink_cli.layout.open_layout import Layout
from neuralink_cli.layout.plan import SourcePiece, TensorRange
from neuralink_cli.placement.placement import inverse
from neuralink_cli.rewriting.held_memory import together
from neuralink_cli.rewriting.permuting import moved_section
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import FileRange, Scratch, pieces_of
from neuralink_cli.streaming.sections import Section, copied


def tensor_sections(layout: Layout, entries: Sequence[TensorEntry]) -> Iterator[Section]:
    """The sections of source tensors, to be written in this order."""
    unbundling, scratch = Unbundling(layout), Scratch()
    for entry in entries:
        if entry.name in layout.made_slabs:
            yield unbundling.section(entry)
            continue
        place = layout.place(entry.name)
        if entry.name in layout.moved_slabs:
            yield moved_section(place.file, place.entry, layout.moved_slabs[entry.name], layout.order, scratch)
        else:
            yield copied(place.file, place.offset, place.offset + place.entry.nbytes)


def scatter_piece(
    piece: SourcePiece, stored: Bytes, slots: Order, slab: Slab[SourcePiece], first: int, lines: Bytes
) -> None:
    """Copy the weights of a piece into lines of a slab, from line `first` on.

    Args:
        stored: The tensor of the layout that holds them.
        slots: int32 `[n]`, the slot of every neuron.
        lines: The bytes of whole lines of the slab.
    """
    begin = piece.region.start - slab.start
    region = piece.region.some_lines(first, lines.size // slab.pitch)
    target = lines[begin : begin + region.stop - region.start]
    stride = stored.size // piece.block.neurons
    scatter_part(stored, stride, piece.offset, slots, region, first, DTYPE_BITS[piece.dtype] // 8, target)


class Unbundling:
    """Rebuilds tensors of the source from bundles, with the bundles of one block in memory at a time.

    Ask for sections in the order in which they are written: bundles still in memory are not read again.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._planned: TensorRange | None = None
        self._stored_memory, self._lines_memory = Scratch(), Scratch()
        self._stored = self._lines = self._stored_memory.take(0)

    def section(self, entry: TensorEntry) -> Section:
        """The section of a source tensor."""
        reads: list[FileRange] = []
        steps: list[Callable[[OutputFile, Iterator[Bytes]], None]] = []
        for slab in self._layout.made_slabs[entry.name]:
            most = pipeline.PIECE if together(slab) else slab.nbytes
            for first, count in stretches(slab.lines, slab.pitch, most):
                steps.append(partial(self._begin, count * slab.pitch))
                for piece in slab.pieces:
                    if piece.stored != self._planned:
                        self._planned = piece.stored
                        loaded = tuple(self._reads(piece.stored))
                        reads += loaded
                        steps.append(partial(self._load, piece.stored.bytes, len(loaded)))
                    steps.append(partial(self._scatter, piece, slab, first))
                steps.append(self._write)

        def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
            for step in steps:
                step(output, pieces)

        return Section(entry.nbytes, tuple(reads), write)

    def _reads(self, stored: TensorRange) -> Iterator[FileRange]:
        return pieces_of(self._layout.place(stored.tensor).file, stored.offset, stored.offset + stored.bytes)

    def _begin(self, size: int, _output: OutputFile, _pieces: Iterator[Bytes]) -> None:
        self._lines = self._lines_memory.take(size)

    def _load(self, size: int, reads: int, _output: OutputFile, pieces: Iterator[Bytes]) -> None:
        self._stored = self._stored_memory.take(size)
        done = 0
        for _ in range(reads):
            data = next(pieces)
            self._stored[done : done + data.size] = data
            done += data.size

    def _scatter(
        self, piece: SourcePiece, slab: Slab[SourcePiece], first: int, _output: OutputFile, _pieces: Iterator[Bytes]
    ) -> None:
        slots = inverse(self._layout.order(piece.block.id))
        scatter_piece(piece, self._stored, slots, slab, first, self._lines)

    def _write(self, output: OutputFile, _pieces: Iterator[Bytes]) -> None:
        output.write(self._lines)
