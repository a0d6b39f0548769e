"""Where neurons lie in a tensor: a tensor may hold one matrix, several one after the other, or several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

# Longer stretches of lines are multiples of this: whoever transposes them does so in tiles.
_TILE = 256


@dataclass(frozen=True)
class Region:
    """`lines` stretches of `line_bytes` bytes, `pitch` bytes from one to the next, the first at byte `start`.

    With `neuron_axis` 0 each line is a neuron's; with 1 each has an element of every neuron, `neurons` in all.
    """

    tensor: str
    neuron_axis: int
    start: int
    pitch: int
    lines: int
    line_bytes: int

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + (self.lines - 1) * self.pitch + self.line_bytes

    def some_lines(self, first: int, count: int) -> Region:
        """Where `count` of its lines lie, from line `first` on."""
        return replace(self, start=self.start + first * self.pitch, lines=count)

    def line_at(self, byte: int) -> tuple[int, int] | None:
        """Line, and byte in it, of a byte of the tensor; None if it lies elsewhere."""
        line, place = divmod(byte - self.start, self.pitch)
        return (line, place) if 0 <= line < self.lines and place < self.line_bytes else None


class Placed(Protocol):
    """Anything that lies in a region."""

    @property
    def region(self) -> Region:
        """Where."""
        ...


Piece = TypeVar("Piece", bound=Placed)


@dataclass(frozen=True)
class Slab(Generic[Piece]):
    """Bytes `start` to `stop` of a tensor: lines of `pitch` bytes, which are one piece or several side by side."""

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
        """Bytes of a line of all pieces together."""
        return self.pieces[0].region.pitch


def stretches(lines: int, pitch: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut `lines` lines of `pitch` bytes into stretches of at most `most` bytes, or single lines.

    Yields the first line of each, and how many it has.
    """
    each = max(most // pitch, 1)
    each -= each % _TILE if each > _TILE else 0
    for first in range(0, lines, each):
        yield first, min(each, lines - first)


def cut_into_slabs(pieces: Iterable[Piece], nbytes: int) -> tuple[Slab[Piece], ...]:
    """Cut a tensor of `nbytes` bytes into the stretches that its pieces fill.

    Raises:
        ValueError: The pieces overlap, or leave something of the tensor out.
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
    """Pieces side by side: lines of the same number and pitch that add up to the pitch."""
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
