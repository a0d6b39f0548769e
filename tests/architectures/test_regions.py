"""Cutting tensors into what their parts fill, against marking every byte."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.architectures.regions import Region, cut_into_slabs, elements_of, taken_apart


@dataclass(frozen=True)
class Piece:
    region: Region


# Of the elements that alternate.
SIZE = 2


def bytes_of(region: Region) -> list[int]:
    """Every byte of a region, one by one."""
    return [
        region.start + line * region.pitch + k
        for line in range(region.lines)
        for k in range(region.line_bytes)
        if region.lanes == 1 or k // SIZE % region.lanes == region.lane
    ]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[Piece], int]:
    """A tensor that is whole: slabs one after the other, each of pieces side by side, some of which alternate."""
    pieces, position = [], 0
    for _ in range(draw(st.integers(1, 4))):
        lines = draw(st.integers(1, 4))
        lanes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        widths = [SIZE * each * draw(st.integers(1, 3)) if each > 1 else draw(st.integers(1, 5)) for each in lanes]
        start = position
        for width, each in zip(widths, lanes, strict=True):
            axis = draw(st.sampled_from([0, 1])) if each == 1 else 1
            region = Region("t", axis, start, sum(widths), lines, width, 0, each)
            pieces += [Piece(replace(region, lane=lane)) for lane in range(each)]
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


def neurons_of(region: Region) -> int:
    """How many there are, if an element of a line that is not cut has a byte, of one that is `SIZE`."""
    if region.neuron_axis == 0:
        return region.lines
    return region.line_bytes if region.lanes == 1 else region.line_bytes // SIZE // region.lanes


@given(tilings(), st.data())
def test_every_byte_is_found_in_its_neuron(tiling: tuple[list[Piece], int], data: st.DataObject) -> None:
    pieces, nbytes = tiling
    byte = data.draw(st.integers(0, nbytes - 1))
    found = [(piece.region, piece.region.neuron_at(byte, neurons_of(piece.region))) for piece in pieces]
    ((region, neuron),) = [(region, neuron) for region, neuron in found if neuron is not None]
    assert byte in bytes_of(region)
    line, place = divmod(byte - region.start, region.pitch)
    size = region.lanes * (SIZE if region.lanes > 1 else 1)
    assert neuron == (line if region.neuron_axis == 0 else place // size)


@given(tilings(), st.data())
def test_elements_are_those_of_the_region(tiling: tuple[list[Piece], int], data: st.DataObject) -> None:
    pieces, nbytes = tiling
    tensor = np.arange(nbytes, dtype=np.uint16).view(np.uint8)
    region = data.draw(st.sampled_from(pieces)).region
    # Two bytes of memory for each byte of the region.
    wide = replace(region, start=2 * region.start, pitch=2 * region.pitch, line_bytes=2 * region.line_bytes)
    size = 2 * (SIZE if region.lanes > 1 else 1)
    found = elements_of(tensor[wide.start : wide.stop], wide, size)
    assert found.shape[0] == region.lines
    assert np.ascontiguousarray(found).reshape(-1).view(np.uint16).tolist() == bytes_of(region)
    own, apart = taken_apart(tensor[wide.start : wide.stop], wide, size)
    assert own.view(np.uint16).tolist() == bytes_of(region)
    assert (apart.lines, apart.line_bytes, apart.lanes) == (region.lines, wide.line_bytes // region.lanes, 1)


@given(tilings(), st.data())
def test_anything_that_is_not_whole_is_refused(tiling: tuple[list[Piece], int], data: st.DataObject) -> None:
    """One number of one piece changed: unless it still covers every byte once, it is refused."""
    pieces, nbytes = tiling
    index = data.draw(st.integers(0, len(pieces) - 1))
    keys = ["start", "pitch", "lines", "line_bytes", "lane", "lanes", "missing", "twice", "nbytes"]
    key = data.draw(st.sampled_from(keys))
    step = data.draw(st.sampled_from([-2, -1, 1, 2, 7]))
    changed = list(pieces)
    if key == "missing":
        del changed[index]
    elif key == "twice":
        changed.append(pieces[index])
    elif key == "nbytes":
        nbytes += step
    else:
        numbers = asdict(pieces[index].region) | {key: getattr(pieces[index].region, key) + step}
        if min(numbers["start"], numbers["lane"]) < 0:
            return
        if min(numbers["pitch"], numbers["lines"], numbers["line_bytes"], numbers["lanes"]) < 1:
            return
        changed[index] = Piece(Region(**numbers))
    whole = sorted(byte for piece in changed for byte in bytes_of(piece.region)) == list(range(nbytes))
    if whole:
        # The pitch of a single line means nothing, and some other changes happen to fit.
        return
    with pytest.raises(ValueError, match="its parts"):
        cut_into_slabs(changed, nbytes)
