"""Where neurons are in a tensor. It may hold one matrix, several in sequence, several side by side, or alternating."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes

# Longer stretches of lines are multiples of this, because transposing works in tiles.
_TILE = 256


@dataclass(frozen=True, slots=True)
class Region:
    """`lines` stretches of `line_bytes` bytes, `pitch` bytes from one to the next, the first at byte `start`.

    With `neuron_axis` 0, each line is one neuron; with 1, each line has one element of every neuron.

    Attributes:
        lane, lanes: With `neuron_axis` 1, the elements of a line belong to `lanes` matrices in turn, and this is that
            with number `lane`: element j of its line is element `lane + j * lanes` of the stretch.
    """

    tensor: str
    neuron_axis: int
    start: int
    pitch: int
    lines: int
    line_bytes: int
    lane: int = 0
    lanes: int = 1

    @property
    def own_bytes(self) -> int:
        """How many bytes of the tensor are its own."""
        return self.lines * self.line_bytes // self.lanes

    @property
    def stop(self) -> int:
        """The end of the region: the byte after its last byte."""
        return self.start + (self.lines - 1) * self.pitch + self.line_bytes

    def some_lines(self, first: int, count: int) -> Region:
        """The region of `count` of its lines, from line `first` on."""
        return replace(self, start=self.start + first * self.pitch, lines=count)

    def neuron_at(self, byte: int, neurons: int) -> int | None:
        """Which of `neurons` neurons a byte of the tensor belongs to; None if it is no byte of the region."""
        line, place = divmod(byte - self.start, self.pitch)
        if not 0 <= line < self.lines or place >= self.line_bytes:
            return None
        if self.neuron_axis == 0:
            return line
        neuron, lane = divmod(place * neurons * self.lanes // self.line_bytes, self.lanes)
        return neuron if lane == self.lane else None


def elements_of(data: Bytes, region: Region, element_bytes: int) -> npt.NDArray[Any]:
    """The elements of a region as unsigned integers `[lines, elements of a line]`, in the memory of `data`.

    Args:
        data: Bytes of the tensor from the start of the region to its stop, or beyond.
    """
    pitch, width = region.pitch, region.line_bytes // element_bytes // region.lanes
    elements = data[: data.size - data.size % element_bytes].view(f"<u{element_bytes}")[region.lane :]
    strides = (pitch, region.lanes * element_bytes)
    return np.lib.stride_tricks.as_strided(elements, (region.lines, width), strides)


def taken_apart(data: Bytes, region: Region, element_bytes: int) -> tuple[Bytes, Region]:
    """The bytes of a region whose elements alternate with others' as bytes of lines of its own, and where they lie."""
    own = np.ascontiguousarray(elements_of(data, region, element_bytes))
    width = own.shape[1] * element_bytes
    apart = replace(region, start=0, pitch=width, line_bytes=width, lane=0, lanes=1)
    return own.reshape(-1).view(np.uint8), apart


class Placed(Protocol):
    """Anything that has a region."""

    @property
    def region(self) -> Region:
        """Its region."""
        ...


Piece = TypeVar("Piece", bound=Placed)


@dataclass(frozen=True, slots=True)
class Slab(Generic[Piece]):
    """Bytes `start` to `stop` of a tensor: lines of `pitch` bytes, each of one piece or of several, in turn or not."""

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
    for piece in sorted(pieces, key=lambda piece: (piece.region.start, piece.region.lane)):
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
    """A slab of pieces side by side or in turn: with equal lines and pitch, and widths that add up to the pitch."""
    first = group[0].region
    position, lane = first.start, 0
    last = (first.lanes, first.line_bytes)
    for piece in group:
        region = piece.region
        if (region.start, region.pitch, region.lines, region.lane) != (position, first.pitch, first.lines, lane):
            raise ValueError("its parts overlap")
        if lane and (region.lanes, region.line_bytes) != last:
            raise ValueError("its parts overlap")
        last = (region.lanes, region.line_bytes)
        # Those in turn lie in the same bytes.
        lane = (lane + 1) % region.lanes
        position += 0 if lane else region.line_bytes
    if lane or position - first.start != first.pitch:
        raise ValueError("its parts do not fill it")
    return Slab(first.start, first.start + first.lines * first.pitch, tuple(group))
