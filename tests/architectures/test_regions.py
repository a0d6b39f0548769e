"""Cutting tensors into what their parts fill, against marking every byte."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.architectures.regions import Region, cut_into_slabs


@dataclass(frozen=True)
class Piece:
    region: Region


def bytes_of(region: Region) -> list[int]:
    """Every byte of a region, one by one."""
    return [region.start + line * region.pitch + k for line in range(region.lines) for k in range(region.line_bytes)]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[Piece], int]:
    """A tensor that is whole: slabs one after the other, each of pieces side by side."""
    pieces, position = [], 0
    for _ in range(draw(st.integers(1, 4))):
        lines = draw(st.integers(1, 4))
        widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        start = position
        for width in widths:
            axis = draw(st.sampled_from([0, 1]))
            pieces.append(Piece(Region("t", axis, start, sum(widths), lines, width)))
            start += width
        position += lines * sum(widths)
    return draw(st.permutations(pieces)), position


@given(tilings())
def test_a_whole_tensor_is_cut_so_that_every_byte_is_in_one_piece(tiling: tuple[list[Piece], int]) -> None:
    pieces, nbytes = tiling
    slabs = cut_into_slabs(pieces, nbytes)
    assert [slab.start for slab in slabs] == [0, *(slab.stop for slab in slabs[:-1])]
    assert slabs[-1].stop == nbytes
    assert sorted(id(piece) for slab in slabs for piece in slab.pieces) == sorted(map(id, pieces))
    for slab in slabs:
        covered = sorted(byte for piece in slab.pieces for byte in bytes_of(piece.region))
        assert covered == list(range(slab.start, slab.stop))
        assert slab.nbytes == len(covered)


@given(tilings(), st.data())
def test_every_byte_is_found_in_its_line(tiling: tuple[list[Piece], int], data: st.DataObject) -> None:
    pieces, nbytes = tiling
    byte = data.draw(st.integers(0, nbytes - 1))
    found = [(piece.region, piece.region.line_at(byte)) for piece in pieces]
    ((region, place),) = [(region, place) for region, place in found if place is not None]
    assert place is not None
    assert region.start + place[0] * region.pitch + place[1] == byte


@given(tilings(), st.data())
def test_anything_that_is_not_whole_is_refused(tiling: tuple[list[Piece], int], data: st.DataObject) -> None:
    """One number of one piece changed: unless it still covers every byte once, it is refused."""
    pieces, nbytes = tiling
    index = data.draw(st.integers(0, len(pieces) - 1))
    key = data.draw(st.sampled_from(["start", "pitch", "lines", "line_bytes", "missing", "twice", "nbytes"]))
    step = data.draw(st.sampled_from([-2, -1, 1, 2, 7]))
    changed = list(pieces)
    if key == "missing":
        del changed[index]
    elif key == "twice":
        changed.append(pieces[index])
    elif key == "nbytes":
        nbytes += step
    else:
        numbers = vars(pieces[index].region) | {key: getattr(pieces[index].region, key) + step}
        if numbers["start"] < 0 or min(numbers["pitch"], numbers["lines"], numbers["line_bytes"]) < 1:
            return
        changed[index] = Piece(Region(**numbers))
    whole = sorted(byte for piece in changed for byte in bytes_of(piece.region)) == list(range(nbytes))
    if whole:
        # The pitch of a single line means nothing, and some other changes happen to fit.
        return
    with pytest.raises(ValueError, match="its parts"):
        cut_into_slabs(changed, nbytes)
