"""Compares the weights of a layout with their source; reads both ahead and computes the layout's digest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from neuralink_cli.architectures.blocks import MovedPiece
from neuralink_cli.architectures.regions import Slab, stretches
from neuralink_cli.arrays import Bytes, Order
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError, VerificationError
from neuralink_cli.files.header import TensorEntry
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.layout.dense_rounding import rounded, source_reads, stored_reads
from neuralink_cli.layout.gathering import Gathering
from neuralink_cli.layout.open_layout import Layout, check_digest
from neuralink_cli.layout.plan import DenseTensor, SourcePiece
from neuralink_cli.placement.placement import inverse
from neuralink_cli.rewriting.permuting import moved_bytes, slab_reads
from neuralink_cli.rewriting.unbundling import scatter_piece
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.pipeline import FileRange, Scratch, pieces_of, read_ahead

# Adds the next bytes of a file to its digest; the bytes must not change until the future is done.
Hashing = Callable[[Bytes], "Future[None]"]


@dataclass(frozen=True, slots=True)
class _Check:
    """A tensor of the layout, and what it proves about the source.

    Attributes:
        reads: What to read from the layout: the tensor from its start to its end.
        source: What to read from the source.
        run: Called with iterators over both, which it exhausts, and with the function to pass the layout's bytes to.
    """

    nbytes: int
    reads: Sequence[FileRange]
    source: Sequence[FileRange]
    run: Callable[[Iterator[Bytes], Iterator[Bytes], Hashing], None]


class Comparison:
    """A layout beside its source, and how much of each source tensor has been compared."""

    def __init__(self, layout: Layout, checkpoint: Checkpoint) -> None:
        self._layout = layout
        self._checkpoint = checkpoint
        self._compared: Counter[str] = Counter()
        self._stored, self._lines = Scratch(), Scratch()

    def run(self, progress: Callable[[int], object] | None = None) -> None:
        """Compare everything, each file read once from start to end.

        Args:
            progress: Called with the layout's bytes seen since the last call.

        Raises:
            VerificationError: A tensor differs (the message says where, with the neuron if there is one), or a digest.
        """
        for file, expected in self._layout.weight_files:
            digest = hashlib.sha256(file.header.prelude)
            checks = tuple(self._checks(file))
            with (
                pipeline.stage("hash") as hasher,
                read_ahead(wanted for check in checks for wanted in check.reads) as stored,
                read_ahead(wanted for check in checks for wanted in check.source) as source,
            ):
                for check in checks:
                    check.run(stored, source, partial(_hash, hasher, digest))
                    if progress is not None:
                        progress(check.nbytes)
            check_digest(file, digest.hexdigest(), expected)
        for name, place in self._checkpoint.tensors.items():
            if self._compared[name] != place.entry.nbytes:
                raise VerificationError(f"source tensor {name!r} is not in the layout", where=self._layout.directory)

    def _checks(self, file: TensorFile) -> Iterator[_Check]:
        """The checks of the tensors in a file of the layout."""
        layout, made = self._layout, _made_of(self._layout)
        for entry in file.header.entries:
            if entry.name in layout.gatherings:
                yield self._remade(file, entry, layout.gatherings[entry.name])
            elif entry.name in layout.dense:
                yield self._rounded(file, layout.dense[entry.name], layout.rounding)
            elif entry.name in made:
                yield self._made(file, entry, made[entry.name])
            elif entry.name in layout.moved_slabs:
                yield self._moved(file, entry, layout.moved_slabs[entry.name])
            elif entry.name in self._checkpoint and entry.name not in layout.made_slabs:
                yield self._same(file, entry)
            else:
                yield self._own(file, entry)

    def _own(self, file: TensorFile, entry: TensorEntry) -> _Check:
        """A tensor that the source does not have: only its digest is checked, and that padding is zero."""
        reads = tuple(_reads(file, entry))

        def run(stored: Iterator[Bytes], _source: Iterator[Bytes], hashing: Hashing) -> None:
            for _ in reads:
                data = next(stored)
                hashing(data).result()
                if entry.name.startswith("padding.") and data.any():
                    raise VerificationError(f"{entry.name} is not zero", where=file.path)

        return _Check(entry.nbytes, reads, (), run)

    def _same(self, file: TensorFile, entry: TensorEntry) -> _Check:
        """A tensor stored as in the source."""
        reads = tuple(_reads(file, entry))

        def run(stored: Iterator[Bytes], source: Iterator[Bytes], hashing: Hashing) -> None:
            position = 0
            for _ in reads:
                data = next(stored)
                hashed = hashing(data)
                self._compare(entry.name, position, data, next(source))
                position += data.size
                hashed.result()

        place = self._checkpoint.place(entry.name)
        return _Check(entry.nbytes, reads, tuple(_reads(place.file, place.entry)), run)

    def _made(self, file: TensorFile, entry: TensorEntry, made: Sequence[_Made]) -> _Check:
        """A tensor from which weights of the source are rebuilt."""
        reads = tuple(_reads(file, entry))
        cuts = [
            (stretch, first, count)
            for stretch in made
            for first, count in stretches(stretch.slab.lines, stretch.slab.pitch, pipeline.PIECE)
        ]

        def run(stored: Iterator[Bytes], source: Iterator[Bytes], hashing: Hashing) -> None:
            whole, hashed = self._load(entry.nbytes, reads, stored, hashing)
            slots: dict[str, Order] = {}
            for stretch, first, count in cuts:
                slab, expected = stretch.slab, next(source)
                lines = self._lines.take(expected.size)
                if len(stretch.pieces) < len(slab.pieces):
                    lines[:] = expected
                for piece in stretch.pieces:
                    block = piece.block.id
                    if block not in slots:
                        slots[block] = inverse(self._layout.order(block))
                    scatter_piece(piece, whole, slots[block], slab, first, lines)
                proved = sum(piece.region.some_lines(first, count).own_bytes for piece in stretch.pieces)
                self._compare(stretch.tensor, slab.start + first * slab.pitch, lines, expected, proved)
            for task in hashed:
                task.result()

        places = {stretch.tensor: self._checkpoint.place(stretch.tensor) for stretch in made}
        source = []
        for stretch, first, count in cuts:
            place, pitch = places[stretch.tensor], stretch.slab.pitch
            start = place.offset + stretch.slab.start
            source.append(FileRange(place.file, start + first * pitch, count * pitch))
        return _Check(entry.nbytes, reads, source, run)

    def _remade(self, file: TensorFile, entry: TensorEntry, gathering: Gathering) -> _Check:
        """A tensor with rounded weights: made from the source again, and compared bit by bit."""
        reads = tuple(_reads(file, entry))

        def run(stored: Iterator[Bytes], source: Iterator[Bytes], hashing: Hashing) -> None:
            whole, hashed = self._load(entry.nbytes, reads, stored, hashing)
            order = self._layout.order(gathering.block)
            expected = self._lines.take(entry.nbytes)
            with self._possible(entry.name):
                gathering.fill(source, inverse(order), expected, self._checkpoint)
            if not _equal(whole, expected):
                slot, byte = divmod(int(np.flatnonzero(whole != expected)[0]), gathering.stride)
                part = [part for part in gathering.parts if part.offset <= byte][-1]
                raise VerificationError(
                    f"tensor {entry.name!r} is not what {part.region.tensor!r} of the source gives as {part.weights}: "
                    f"{gathering.block}, neuron {int(order[slot])}, slot {slot}",
                    where=self._layout.directory,
                )
            for part in gathering.parts:
                self._compared[part.region.tensor] += part.region.own_bytes
            for task in hashed:
                task.result()

        return _Check(entry.nbytes, reads, gathering.reads(self._checkpoint), run)

    def _rounded(self, file: TensorFile, tensor: DenseTensor, rounding: str) -> _Check:
        """A tensor outside the blocks: its rows are rounded again."""
        reads = stored_reads(tensor, file)

        def run(stored: Iterator[Bytes], source: Iterator[Bytes], hashing: Hashing) -> None:
            row = 0
            remade = rounded(tensor, (next(source) for _ in reads), rounding, self._lines, self._checkpoint)
            while row < tensor.rows:
                with self._possible(tensor.name):
                    expected = next(remade)
                data = next(stored)
                hashed = hashing(data)
                if not _equal(data, expected):
                    row += int(np.flatnonzero(data != expected)[0]) // tensor.row_bytes
                    raise VerificationError(
                        f"tensor {tensor.name!r} is not what the source gives as {tensor.weights}: row {row}",
                        where=self._layout.directory,
                    )
                row += data.size // tensor.row_bytes
                hashed.result()
            self._compared[tensor.name] += tensor.rows * tensor.source_row_bytes

        return _Check(tensor.place.bytes, reads, source_reads(tensor, self._checkpoint), run)

    @contextmanager
    def _possible(self, name: str) -> Iterator[None]:
        """Within the block, weights that cannot be rounded are not those that the layout was made from."""
        try:
            yield
        except UnsupportedError as error:
            raise VerificationError(
                f"tensor {name!r} is not what the source gives: in {error.where}, {error.what}",
                where=self._layout.directory,
            ) from None

    def _load(
        self, nbytes: int, reads: Sequence[FileRange], stored: Iterator[Bytes], hashing: Hashing
    ) -> tuple[Bytes, list[Future[None]]]:
        """A whole tensor of the layout in memory, and the hashing of its pieces."""
        whole = self._stored.take(nbytes)
        hashed, done = [], 0
        for _ in reads:
            data = next(stored)
            whole[done : done + data.size] = data
            hashed.append(hashing(whole[done : done + data.size]))
            done += data.size
        return whole, hashed

    def _moved(self, file: TensorFile, entry: TensorEntry, slabs: Sequence[Slab[MovedPiece]]) -> _Check:
        """A tensor whose neurons have another order in the source."""

        def run(stored: Iterator[Bytes], source: Iterator[Bytes], hashing: Hashing) -> None:
            hashed: list[Future[None]] = []
            pieces = _hashed(stored, hashing, hashed)
            position = 0
            for slab in slabs:
                for moved in moved_bytes(slab, entry.dtype, self._layout.order, pieces, self._lines):
                    done = 0
                    while done < moved.size:
                        expected = next(source)
                        self._compare(entry.name, position, moved[done : done + expected.size], expected)
                        done += expected.size
                        position += expected.size
            for task in hashed:
                task.result()

        place = self._checkpoint.place(entry.name)
        reads = tuple(wanted for slab in slabs for wanted in slab_reads(file, entry, slab))
        source = tuple(wanted for slab in slabs for wanted in slab_reads(place.file, place.entry, slab))
        return _Check(entry.nbytes, reads, source, run)

    def _compare(self, name: str, start: int, data: Bytes, expected: Bytes, proved: int | None = None) -> None:
        """Compare bytes of a source tensor, from byte `start` on, and count `proved` of them, by default all."""
        if not _equal(data, expected):
            byte = start + int(np.flatnonzero(data != expected)[0])
            raise VerificationError(
                f"tensor {name!r} differs from the source at byte {byte}{neuron_at(self._layout, name, byte)}",
                where=self._layout.directory,
            )
        self._compared[name] += data.size if proved is None else proved


@dataclass(frozen=True, slots=True)
class _Made:
    """The `pieces` of a slab of a source tensor that one tensor of the layout holds."""

    tensor: str
    slab: Slab[SourcePiece]
    pieces: tuple[SourcePiece, ...]


def _made_of(layout: Layout) -> dict[str, list[_Made]]:
    """What is rebuilt from each tensor of the layout, by its name."""
    made: dict[str, list[_Made]] = {}
    for name, slabs in layout.made_slabs.items():
        for slab in slabs:
            exact = [piece.stored.tensor for piece in slab.pieces if piece.stored.tensor not in layout.gatherings]
            for stored in dict.fromkeys(exact):
                pieces = tuple(piece for piece in slab.pieces if piece.stored.tensor == stored)
                made.setdefault(stored, []).append(_Made(name, slab, pieces))
    return made


def _reads(file: TensorFile, entry: TensorEntry) -> Iterator[FileRange]:
    start = file.header.offset_of(entry)
    return pieces_of(file, start, start + entry.nbytes)


def _hashed(pieces: Iterator[Bytes], hashing: Hashing, hashed: list[Future[None]]) -> Iterator[Bytes]:
    for piece in pieces:
        hashed.append(hashing(piece))
        yield piece
        hashed[-1].result()


def _hash(hasher: ThreadPoolExecutor, digest: Any, data: Bytes) -> Future[None]:
    return hasher.submit(digest.update, data.data)


def _equal(data: Bytes, expected: Bytes) -> bool:
    """Whether bytes are equal, compared eight at a time."""
    words = data.size - data.size % 8
    return np.array_equal(data[:words].view(np.uint64), expected[:words].view(np.uint64)) and np.array_equal(
        data[words:], expected[words:]
    )


def neuron_at(layout: Layout, name: str, byte: int) -> str:
    """Block, neuron and slot that a byte of a source tensor belongs to, for a message; empty if none."""
    for block, region in layout.regions_of(name):
        order = layout.order(block)
        neuron = region.neuron_at(byte, order.size)
        if neuron is not None:
            return f": {block}, neuron {neuron}, slot {int(inverse(order)[neuron])}"
    return ""
