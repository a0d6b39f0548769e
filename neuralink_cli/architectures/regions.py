"""Where neurons are in a tensor. A tensor may hold one matrix, several in sequence, or several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

# Longer stretches of lines are multiples of this, because transposing works in tiles.
_TILE = 256


@dataclass(frozen=True)
class Region:
    """`lines` stretches of `line_bytes` bytes, `pitch` bytes from one to the next, the first at byte `start`.

    With `neuron_axis` 0, each line is one neuron; with 1, each line has one element of every neuron.
    """

    tensor: str
    neuron_axis: int
    start: int
    pitch: int
    lines: int
    line_bytes: int

    @property
    def stop(self) -> int:
        """The end of the region: the byte after its last byte."""
        return self.start + (self.lines - 1) * self.pitch + self.line_bytes

    def some_lines(self, first: int, count: int) -> Region:
        """The region of `count` of its lines, from line `first` on."""
        return replace(self, start=self.start + first * self.pitch, lines=count)

    def line_at(self, byte: int) -> tuple[int, int] | None:
        """The line, and the byte within it, of a byte of the tensor; None if the byte is outside the region."""
        line, place = divmod(byte - self.start, self.pitch)
        return (line, place) if 0 <= line < self.lines and place < self.line_bytes else None


class Placed(Protocol):
    """Anything that has a region."""

    @property
    def region(self) -> Region:
        """Its region."""
        ...


Piece = TypeVar("Piece", bound=Placed)


@dataclass(frozen=True)
class Slab(Generic[Piece]):
    """Bytes `start` to `stop` of a tensor: lines of `pitch` bytes, each of one piece or of several side by side."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def lines(self) -> int:
        """Lines of each of its pieces."""
        return self.pieces[0].region.lines

    @property
    def pitch(self) -> int:
        """Bytes per line, over all pieces."""
        return self.pieces[0].region.pitch


def stretches(lines: int, pitch: int, most: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut `lines` lines of `pitch` bytes into stretches of at most `most` bytes, or of `multiple` lines.

    Yields the first line and the number of lines of each; all but the last have a multiple of `multiple` lines.
    """
    each = max(most // pitch, multiple)
    each -= each % (_TILE if each > _TILE else multiple)
    for first in range(0, lines, each):
        yield first, min(each, lines - first)


def cut_into_slabs(pieces: Iterable[Piece], nbytes: int) -> tuple[Slab[Piece], ...]:
    """Cut a tensor of `nbytes` bytes into the slabs that its pieces fill.

    Raises:
        ValueError: The pieces overlap, or do not fill the tensor.
    """
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.region.start):
        first = groups[-1][0].region if groups else None
        if first is not None and piece.region.start < first.start + first.lines * first.pitch:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    slabs = tuple(_slab(group) for group in groups)
    ends = [0, *(slab.stop for slab in slabs)]
    if [slab.start for slab in slabs] != ends[:-1] or ends[-1] != nbytes:
        raise ValueError("its parts do not fill it")
    return slabs


def _slab(group: Sequence[Piece]) -> Slab[Piece]:
    """A slab of pieces side by side: they have the same lines and pitch, and their widths add up to the pitch."""
    first = group[0].region
    position = first.start
    for piece in group:
        region = piece.region
        if (region.start, region.pitch, region.lines) != (position, first.pitch, first.lines):
            raise ValueError("its parts overlap")
        position += region.line_bytes
    if position - first.start != first.pitch:
        raise ValueError("its parts do not fill it")
    return Slab(first.start, first.start + first.lines * first.pitch, tuple(group))
