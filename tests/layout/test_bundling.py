"""Gathering and scattering against numpy's own indexing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.architectures.regions import Region, stretches
from neuralink_cli.layout.bundling import gather_part, move_lines, scatter_part
from neuralink_cli.placement.placement import inverse

Elements = npt.NDArray[np.uint8]
SIZES = (1, 2, 4, 8)
# Around the tiles in which columns are moved, and small ones.
lengths = st.sampled_from([1, 2, 3, 31, 32, 33, 63, 65, 255, 256, 257, 300, 513])


def random_matrix(random: np.random.Generator, neurons: int, hidden: int, axis: int, size: int) -> Elements:
    """Random elements, as a matrix of uint8 vectors: `[n, hidden, size]` or `[hidden, n, size]`."""
    shape = (neurons, hidden) if axis == 0 else (hidden, neurons)
    return random.integers(0, 256, (*shape, size), dtype=np.uint8)


def region_of(matrix: Elements, axis: int) -> Region:
    """Where a matrix lies in a tensor that it is alone in."""
    lines, width, size = matrix.shape
    return Region("t", axis, 0, width * size, lines, width * size)


def spread(matrix: Elements, axis: int, gap: int) -> tuple[Elements, Region]:
    """The same with `gap` elements of something else after each line but the last, as bytes, and where it lies."""
    lines, width, size = matrix.shape
    wide = np.full((lines, width + gap, size), 0xAB, dtype=np.uint8)
    wide[:, :width] = matrix
    region = Region("t", axis, 0, (width + gap) * size, lines, width * size)
    return wide.reshape(-1)[: region.stop], region


def by_neuron(matrix: Elements, axis: int) -> Elements:
    return matrix if axis == 0 else matrix.transpose(1, 0, 2)


@given(
    neurons=lengths,
    hidden=lengths,
    size=st.sampled_from(SIZES),
    axes=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3),
    gap=st.sampled_from([0, 0, 1, 37]),
    most=st.sampled_from([1, 1000, 100_000, 1 << 30]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=120)
def test_bundles_hold_what_indexing_gives(
    neurons: int, hidden: int, size: int, axes: list[int], gap: int, most: int, seed: int
) -> None:
    """Whatever stretches the lines of the matrices come in."""
    random = np.random.default_rng(seed)
    order = random.permutation(neurons).astype(np.int32)
    slots = inverse(order)
    matrices = [random_matrix(random, neurons, hidden, axis, size) for axis in axes]
    part_bytes = hidden * size
    stride = len(axes) * part_bytes
    bundles = np.full(neurons * stride, 0xEE, dtype=np.uint8)
    for k, (matrix, axis) in enumerate(zip(matrices, axes, strict=True)):
        data, region = spread(matrix, axis, gap)
        for first, count in stretches(region.lines, region.pitch, most):
            some = region.some_lines(first, count)
            gather_part(data[some.start : some.stop], some, first, slots, size, bundles, stride, k * part_bytes)
    expected = [by_neuron(matrix, axis)[order] for matrix, axis in zip(matrices, axes, strict=True)]
    assert np.array_equal(bundles.reshape(neurons, -1), np.concatenate(expected, axis=1).reshape(neurons, -1))

    for k, (matrix, axis) in enumerate(zip(matrices, axes, strict=True)):
        wanted, region = spread(matrix, axis, gap)
        restored = np.full(wanted.size, 0xAB, dtype=np.uint8)
        for first, count in stretches(region.lines, region.pitch, most):
            some = region.some_lines(first, count)
            lines = restored[some.start : some.stop]
            scatter_part(bundles, stride, k * part_bytes, slots, some, first, size, lines)
        assert np.array_equal(restored, wanted)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_part_leaves_the_rest_of_the_bundles_alone(size: int, axis: int) -> None:
    random = np.random.default_rng(size)
    matrix = random_matrix(random, 260, 258, axis, size)
    order = random.permutation(260).astype(np.int32)
    part_bytes = 258 * size
    stride = 3 * part_bytes
    bundles = np.full(260 * stride, 0xEE, dtype=np.uint8)
    gather_part(matrix.reshape(-1), region_of(matrix, axis), 0, inverse(order), size, bundles, stride, part_bytes)
    rows = bundles.reshape(260, stride)
    assert np.all(rows[:, :part_bytes] == 0xEE)
    assert np.all(rows[:, 2 * part_bytes :] == 0xEE)
    assert np.array_equal(rows[:, part_bytes : 2 * part_bytes], by_neuron(matrix, axis)[order].reshape(260, -1))


@given(
    neurons=lengths,
    others=st.sampled_from([1, 2, 33]),
    size=st.sampled_from(SIZES),
    gap=st.sampled_from([0, 3]),
    most=st.sampled_from([1, 1000, 1 << 30]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_permuting_is_indexing(neurons: int, others: int, size: int, gap: int, most: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(neurons).astype(np.int32)
    for axis in (0, 1):
        matrix = random_matrix(random, neurons, others, axis, size)
        data, region = spread(matrix, axis, gap)
        moved, back = np.full(data.size, 0xAB, dtype=np.uint8), np.full(data.size, 0xAB, dtype=np.uint8)
        for first, count in stretches(region.lines, region.pitch, most):
            some = region.some_lines(first, count)
            move_lines(data[some.start : some.stop], some, first, inverse(order), size, moved)
        assert np.array_equal(moved, spread(np.take(matrix, order, axis=axis), axis, gap)[0])
        move_lines(moved, region, 0, order, size, back)
        assert np.array_equal(back, data)


@given(
    neurons=lengths,
    hidden=lengths,
    lanes=st.sampled_from([2, 3]),
    size=st.sampled_from(SIZES),
    most=st.sampled_from([1, 1000, 100_000, 1 << 30]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_columns_that_alternate_are_those_of_their_matrices(
    neurons: int, hidden: int, lanes: int, size: int, most: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(neurons).astype(np.int32)
    slots = inverse(order)
    matrices = random.integers(0, 256, (lanes, hidden, neurons, size), dtype=np.uint8)
    data = np.ascontiguousarray(matrices.transpose(1, 2, 0, 3)).reshape(-1)
    width = neurons * lanes * size
    stride = hidden * size
    permuted, back = np.full(data.size, 0xAB, np.uint8), np.full(data.size, 0xAB, np.uint8)
    for lane, matrix in enumerate(matrices):
        region = Region("t", 1, 0, width, hidden, width, lane, lanes)
        bundles = np.full(neurons * stride, 0xEE, dtype=np.uint8)
        for first, count in stretches(region.lines, region.pitch, most):
            some = region.some_lines(first, count)
            gather_part(data[some.start : some.stop], some, first, slots, size, bundles, stride, 0)
            move_lines(data[some.start : some.stop], some, first, slots, size, permuted)
        assert np.array_equal(bundles.reshape(neurons, hidden, size), matrix.transpose(1, 0, 2)[order])
        for first, count in stretches(region.lines, region.pitch, most):
            some = region.some_lines(first, count)
            scatter_part(bundles, stride, 0, slots, some, first, size, back[some.start : some.stop])
    assert np.array_equal(back, data)
    assert np.array_equal(permuted.reshape(hidden, neurons, -1), data.reshape(hidden, neurons, -1)[:, order])


def test_bytes_are_not_read_as_numbers() -> None:
    """Signalling NaNs and negative zeros, which arithmetic would change, come through."""
    patterns = np.array([0x7F800001, 0x80000000, 0xFFC00001, 0x7FBFFFFF], dtype="<u4")
    matrix = np.ascontiguousarray(np.tile(patterns, (3, 1))).view(np.uint8).reshape(-1)
    order = np.array([2, 0, 1], dtype=np.int32)
    bundles = np.empty(48, dtype=np.uint8)
    gather_part(matrix, Region("t", 0, 0, 16, 3, 16), 0, inverse(order), 4, bundles, 16, 0)
    assert np.array_equal(bundles, matrix)
