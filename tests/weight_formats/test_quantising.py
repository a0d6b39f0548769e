"""Weight formats against the gguf package, and against the published rules in plain numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neuralink_cli.architectures.regions import Region, stretches
from neuralink_cli.arrays import Bytes
from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.placement.placement import inverse
from neuralink_cli.weight_formats.block_kernels import CANDIDATES, DTYPE_NUMBERS, IQ4_NL_LEVELS
from neuralink_cli.weight_formats.formats import (
    BLOCK_FORMATS,
    CONVERTIBLE_DTYPES,
    IQ4_NL,
    MXFP4,
    NEAREST,
    Q4_0,
    Q8_0,
    ROUNDING_FORMATS,
    SEARCH,
    BlockFormat,
    parse_weight_formats,
    part_bytes,
    require_convertible,
)
from neuralink_cli.weight_formats.quantising import BadBlock, Values, dequantise, gather_quantised, quantise_rows

FORMATS = (Q8_0, Q4_0, IQ4_NL)
GGML = {
    Q8_0: GGMLQuantizationType.Q8_0,
    Q4_0: GGMLQuantizationType.Q4_0,
    IQ4_NL: GGMLQuantizationType.IQ4_NL,
    MXFP4: GGMLQuantizationType.MXFP4,
}
LARGEST_HALF = np.float32(65504)
LEVELS = np.array(IQ4_NL_LEVELS, np.float32)

# Blocks of weights whose scale has an inverse: numpy converts what comes of the others differently on each machine.
blocks_of_weights = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 96])),
    elements=st.one_of(
        st.floats(-5e5, 5e5, width=32),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, 2.0**-126, -(2.0**-24), 524000.0]),
    ),
    fill=st.sampled_from([0.0, -0.0, 0.25]),
)


def random_values(rows: int, hidden: int, seed: int = 0) -> Values:
    return (np.random.default_rng(seed).standard_normal((rows, hidden)) * 0.02).astype(np.float32)


def quantise(
    values: Values, weight_format: BlockFormat, target: Bytes, *, rounding: str = NEAREST, importance: Any = None
) -> BadBlock | None:
    """Quantise float32 `[rows, hidden]`."""
    data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    return quantise_rows(data, "F32", values.shape[1], weight_format, target, rounding=rounding, importance=importance)


def quantised(values: Values, weight_format: BlockFormat, rounding: str = NEAREST, importance: Any = None) -> Bytes:
    """The bytes of float32 `[rows, hidden]`."""
    target = np.full((len(values), weight_format.row_bytes(values.shape[1])), 0xEE, np.uint8)
    assert quantise(values, weight_format, target, rounding=rounding, importance=importance) is None
    return target


def by_gguf(values: Values, weight_format: BlockFormat) -> Bytes:
    with np.errstate(all="ignore"):
        made: Bytes = quants.quantize(values, GGML[weight_format])
    return made


def has_inverse(values: Values, weight_format: BlockFormat) -> npt.NDArray[np.bool_]:
    """For every block if 1 / scale is a float32, or the scale is 0."""
    largest = np.abs(values.reshape(-1, 32)).max(axis=1)
    scale = largest / np.float32(127 if weight_format is Q8_0 else 8)
    with np.errstate(all="ignore"):
        usable: npt.NDArray[np.bool_] = (scale == 0) | np.isfinite(np.float32(1) / scale)
    return usable


# --- Against gguf.


@pytest.mark.parametrize("weight_format", [Q8_0, Q4_0])
@given(values=blocks_of_weights)
@settings(max_examples=150)
def test_rows_are_quantised_as_by_gguf(weight_format: BlockFormat, values: Values) -> None:
    compared = has_inverse(values, weight_format)
    made, wanted = quantised(values, weight_format), by_gguf(values, weight_format)
    shape = (-1, weight_format.block_bytes)
    assert np.array_equal(made.reshape(shape)[compared], wanted.reshape(shape)[compared])


@pytest.mark.parametrize("weight_format", [Q8_0, Q4_0])
def test_many_blocks_are_quantised_as_by_gguf(weight_format: BlockFormat) -> None:
    """More than go together, of weights as models have them, with ties and outliers."""
    values = random_values(301, 5 * 32)
    values[::7] = np.round(values[::7] * 100)
    values[5, 40], values[250, 3] = 400_000.0, -400_000.0
    assert np.array_equal(quantised(values, weight_format), by_gguf(values, weight_format))


ONE = np.float32(1)
EXTREMES = {
    "zeros": np.zeros(32),
    "negative zeros": np.full(32, -0.0),
    "equal": np.full(32, 0.1),
    "equal and negative": np.full(32, -0.1),
    "the negative one first": np.array([-1, 1] * 16),
    "the positive one first": np.array([1, -1] * 16),
    "an outlier": np.r_[np.full(31, 1e-3), 1000.0],
    "a negative outlier": np.r_[np.full(31, 1e-3), -1000.0],
    "halves of steps": np.r_[-8.0, np.arange(31) / 2 - 7.5],
    "halves of small steps": np.r_[127.0, np.arange(31) * 8.5 - 126.5],
    "one float16 step": np.full(32, 2.0**-24),
    "float16 without exponent": np.linspace(-1, 1, 32) * 2.0**-15,
    "a scale of half the least float16": np.r_[np.zeros(31), 2.0**-22],
    "a scale above half the least float16": np.r_[np.zeros(31), np.nextafter(np.float32(2.0**-22), ONE)],
    "a scale that becomes zero": np.linspace(-1, 1, 32) * 2.0**-30,
    "the largest float16": np.linspace(-1, 1, 32) * 65504,
    "scales that tie in float16": (1 + 2.0**-11) * np.linspace(-8, 7, 32),
    "the largest scale of q4_0": np.r_[np.zeros(31), np.nextafter(np.float32(65520 * 8), ONE)],
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("weight_format", [Q8_0, Q4_0])
def test_extreme_blocks_are_quantised_as_by_gguf(name: str, weight_format: BlockFormat) -> None:
    values = EXTREMES[name].astype(np.float32).reshape(1, 32)
    assert has_inverse(values, weight_format).all()
    assert np.array_equal(quantised(values, weight_format), by_gguf(values, weight_format))


def test_a_product_is_rounded_before_it_is_added() -> None:
    """Weights for which a fused multiply-add would give another code."""
    random = np.random.default_rng(3)
    top = np.float32(-0.7)
    # Those near a step, where rounding decides.
    near = (np.arange(-7, 8) - 0.5) * 0.0875
    values = (random.choice(near, 400_000) * (1 + random.uniform(-2e-7, 2e-7, 400_000))).astype(np.float32)
    inverted = np.float32(1) / (top / np.float32(-8))
    fused = (values.astype(np.float64) * np.float64(inverted) + 8.5).astype(np.float32)
    telling = values[np.trunc(fused) != np.trunc(values * inverted + np.float32(8.5))]
    assert telling.size >= 310
    rows = np.c_[np.full(10, top), telling[:310].reshape(10, 31)].astype(np.float32)
    assert np.array_equal(quantised(rows, Q4_0), by_gguf(rows, Q4_0))


@pytest.mark.parametrize("weight_format", [Q8_0, Q4_0])
def test_a_scale_that_has_no_inverse_gives_codes_of_zero(weight_format: BlockFormat) -> None:
    values = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 32) * np.float32(2.0**-130)
    assert not has_inverse(values, weight_format).any()
    made = quantised(values, weight_format)
    assert not made[:, 2:].any()
    assert not dequantise(made, weight_format).any()


@pytest.mark.parametrize("weight_format", FORMATS)
def test_all_scales_and_codes_are_decoded_as_by_gguf(weight_format: BlockFormat) -> None:
    data = np.random.default_rng(1).integers(0, 256, (1 << 14, 4, weight_format.block_bytes), dtype=np.uint8)
    data[..., :2] = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(1 << 14, 4, 2)
    rows = data.reshape(1 << 14, -1)
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(rows, GGML[weight_format])
    made = dequantise(rows, weight_format)
    assert made.dtype == np.float32
    numbers = ~np.isnan(wanted)
    assert np.array_equal(np.isnan(made), ~numbers)
    assert np.array_equal(made.view(np.uint32)[numbers], wanted.view(np.uint32)[numbers])


def test_rows_may_be_a_part_of_bundles() -> None:
    bundles = np.random.default_rng(1).integers(0, 60, (5, 100), dtype=np.uint8)
    made = dequantise(bundles[:, 10:46], Q4_0)
    assert np.array_equal(made, quants.dequantize(bundles[:, 10:46].copy(), GGML[Q4_0]))


# --- From the matrices of a checkpoint to bundles.


def as_source(values: Values, dtype: str) -> tuple[Bytes, Values]:
    """Bytes of a matrix in a dtype, as uint8 `[lines, width, size]`, and the values that they have."""
    if dtype == "F16":
        halves = values.astype(np.float16)
        return halves[..., None].view(np.uint8), halves.astype(np.float32)
    if dtype == "BF16":
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        return words[..., None].view(np.uint8), (words.astype(np.uint32) << 16).view(np.float32)
    return values[..., None].view(np.uint8), values


def spread(matrix: Bytes, axis: int, before: int, after: int) -> tuple[Bytes, Region]:
    """A matrix with `before` and `after` elements of something else in every line; from its first line on."""
    lines, width, size = matrix.shape
    wide = np.full((lines, before + width + after, size), 0x7F, np.uint8)
    wide[:, before : before + width] = matrix
    region = Region("t", axis, before * size, wide.shape[1] * size, lines, width * size)
    return wide.reshape(-1), region


def cuts(region: Region, most: int) -> Iterator[tuple[int, int]]:
    """Stretches of lines; of whole blocks, if a line is not a neuron."""
    if region.neuron_axis == 0:
        yield from stretches(region.lines, region.pitch, most)
    else:
        each = max(most // region.pitch // 32, 1) * 32
        for first in range(0, region.lines, each):
            yield first, min(each, region.lines - first)


def ranges(start: int, stop: int, each: int) -> Iterator[range]:
    for begin in range(start, stop, each):
        yield range(begin, min(begin + each, stop))


@given(
    neurons=st.sampled_from([1, 2, 31, 127, 128, 129, 255, 257, 300]),
    hidden=st.sampled_from([32, 64, 160]),
    dtype=st.sampled_from(CONVERTIBLE_DTYPES),
    axis=st.sampled_from([0, 1]),
    weight_format=st.sampled_from([Q8_0, Q4_0]),
    gaps=st.tuples(st.sampled_from([0, 3]), st.sampled_from([0, 1])),
    most=st.sampled_from([1, 50_000, 1 << 30]),
    each=st.sampled_from([1, 37, 128, 1000]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_bundles_hold_what_gguf_makes_of_each_neuron(
    neurons: int,
    hidden: int,
    dtype: str,
    axis: int,
    weight_format: BlockFormat,
    gaps: tuple[int, int],
    most: int,
    each: int,
    seed: int,
) -> None:
    """Whatever stretches the lines come in, and however threads share the neurons; the rest stays as it was."""
    order = np.random.default_rng(seed).permutation(neurons).astype(np.int32)
    shape = (neurons, hidden) if axis == 0 else (hidden, neurons)
    matrix, values = as_source(random_values(*shape, seed=seed), dtype)
    data, region = spread(matrix, axis, *gaps)
    part = weight_format.row_bytes(hidden)
    stride, offset = part + 9, 4
    bundles = np.full(neurons * stride, 0xEE, np.uint8)
    for first, count in cuts(region, most):
        some = region.some_lines(first, count)
        start, stop = (first, first + count) if axis == 0 else (0, neurons)
        for share in ranges(start, stop, each):
            lines = data[some.start : some.stop]
            arguments = (lines, some, first, inverse(order), dtype, weight_format, bundles, stride, offset)
            assert gather_quantised(*arguments, neurons=share) is None
    rows = bundles.reshape(neurons, stride)
    wanted = by_gguf(np.ascontiguousarray(values if axis == 0 else values.T)[order], weight_format)
    assert np.array_equal(rows[:, offset : offset + part], wanted)
    assert np.all(rows[:, :offset] == 0xEE)
    assert np.all(rows[:, offset + part :] == 0xEE)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_number_of_a_dtype_is_taken_exactly(dtype: str, axis: int) -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    exact = words.astype(np.uint16).view(np.float16).astype(np.float32) if dtype == "F16" else None
    exact = (words << 16).view(np.float32) if exact is None else exact
    # Neighbours share a block, so that it shows the last bit of each; larger ones have no scale.
    usable = (np.abs(exact.reshape(-1, 32)) < 500_000).all(axis=1)
    values = exact.reshape(-1, 32)[usable]
    halves = words.astype("<u2").reshape(-1, 32)[usable]
    matrix = np.ascontiguousarray(halves if axis == 0 else halves.T)
    bundles = np.zeros(len(values) * 34, np.uint8)
    slots = np.arange(len(values), dtype=np.int32)
    region = Region("t", axis, 0, matrix.shape[1] * 2, matrix.shape[0], matrix.shape[1] * 2)
    data = matrix.reshape(-1).view(np.uint8)
    assert gather_quantised(data, region, 0, slots, dtype, Q8_0, bundles, 34, 0) is None
    assert np.array_equal(bundles.reshape(-1, 34), quantised(values, Q8_0))


# --- The search for a scale.


def levels_by_rule(values: Values, weight_format: BlockFormat) -> Values:
    """The level for values that were divided by the scale, as docs/weight_formats.md has it."""
    if weight_format is Q8_0:
        whole = np.floor(np.abs(values))
        whole += np.abs(values) - whole >= np.float32(0.5)
        return (np.sign(values) * np.minimum(whole, 127)).astype(np.float32)
    if weight_format is Q4_0:
        levels: Values = np.trunc(np.clip(values + np.float32(8.5), 0, 15)) - np.float32(8)
        return levels
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    return LEVELS[np.searchsorted(middles, values, side="right")]


def search_by_rule(values: Values, weight_format: BlockFormat, importance: Values) -> Bytes:
    """The bytes of float32 `[blocks, 32]` with errors that count as float32 `[blocks, 32]` says."""
    top = values[np.arange(len(values)), np.abs(values).argmax(axis=1)]
    top = np.abs(top) if weight_format is Q8_0 else top
    best = np.full(len(values), np.inf, np.float32)
    scales, levels = np.zeros(len(values), np.float16), np.zeros_like(values)
    with np.errstate(all="ignore"):
        for number, candidate in enumerate(CANDIDATES[weight_format.name]):
            scale = (top / np.float32(candidate)).astype(np.float16)
            wide = scale.astype(np.float32)
            inverted = np.where(wide == 0, np.float32(0), np.float32(1) / wide)
            level = levels_by_rule(values * inverted[:, None], weight_format)
            miss = values - wide[:, None] * level
            error = np.zeros(len(values), np.float32)
            for j in range(32):
                error += importance[:, j] * (miss[:, j] * miss[:, j])
            better = (error < best) | (number == 0)
            best[better], scales[better], levels[better] = error[better], scale[better], level[better]
    if weight_format is Q8_0:
        codes = levels.astype(np.int8).view(np.uint8)
    else:
        numbers = np.searchsorted(LEVELS if weight_format is IQ4_NL else np.arange(-8, 8), levels)
        codes = (numbers[:, :16] | numbers[:, 16:] << 4).astype(np.uint8)
    made: Bytes = np.concatenate([scales[:, None].view(np.uint8), codes], axis=1)
    return made


@pytest.mark.parametrize("weight_format", FORMATS)
@given(values=blocks_of_weights)
@settings(max_examples=60)
def test_a_search_follows_its_rule(weight_format: BlockFormat, values: Values) -> None:
    blocks = values.reshape(-1, 32)
    wanted = search_by_rule(blocks, weight_format, np.ones_like(blocks))
    made = quantised(values, weight_format, SEARCH)
    assert np.array_equal(made.reshape(-1, weight_format.block_bytes), wanted)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_search_follows_its_rule_for_many_blocks(weight_format: BlockFormat, weighted: bool, axis: int) -> None:
    """Of float16, and with importance that differs from weight to weight, in stretches."""
    neurons, hidden = 301, 5 * 32
    shape = (neurons, hidden) if axis == 0 else (hidden, neurons)
    matrix, values = as_source(random_values(*shape, seed=4), "F16")
    rows = np.ascontiguousarray(values if axis == 0 else values.T)
    importance = np.random.default_rng(5).exponential(size=hidden).astype(np.float32) if weighted else None
    data, region = spread(matrix, axis, 0, 0)
    stride = weight_format.row_bytes(hidden)
    bundles = np.zeros(neurons * stride, np.uint8)
    slots = np.arange(neurons, dtype=np.int32)
    for first, count in cuts(region, 64 * region.pitch):
        some = region.some_lines(first, count)
        lines = data[some.start : some.stop]
        arguments = (lines, some, first, slots, "F16", weight_format, bundles, stride, 0)
        assert gather_quantised(*arguments, rounding=SEARCH, importance=importance) is None
    counts = np.ones(hidden, np.float32) if importance is None else importance
    blocks = rows.reshape(-1, 32)
    wanted = search_by_rule(blocks, weight_format, np.tile(counts, neurons).reshape(-1, 32))
    assert np.array_equal(bundles.reshape(-1, weight_format.block_bytes), wanted)


def error_of(values: Values, weight_format: BlockFormat, rounding: str, importance: Any = None) -> Any:
    """Squared errors, as float64."""
    decoded = dequantise(quantised(values, weight_format, rounding, importance), weight_format)
    return (decoded.astype(np.float64) - values) ** 2


@pytest.mark.parametrize(("weight_format", "ratio"), [(Q8_0, 0.85), (Q4_0, 0.92)])
def test_a_search_has_less_error_in_every_block(weight_format: BlockFormat, ratio: float) -> None:
    values = random_values(500, 64)
    nearest, searched = (error_of(values, weight_format, rounding) for rounding in (NEAREST, SEARCH))
    assert np.all(searched.reshape(-1, 32).sum(axis=1) <= nearest.reshape(-1, 32).sum(axis=1) * 1.00001)
    assert searched.sum() < ratio * nearest.sum()


def test_uneven_levels_have_less_error_than_even_ones() -> None:
    values = random_values(500, 64)
    uneven = error_of(values, IQ4_NL, NEAREST).sum()
    assert uneven < 0.77 * error_of(values, Q4_0, NEAREST).sum()
    assert uneven < 0.86 * error_of(values, Q4_0, SEARCH).sum()


@pytest.mark.parametrize("weight_format", FORMATS)
def test_important_weights_have_less_error(weight_format: BlockFormat) -> None:
    values = random_values(500, 64)
    importance = np.where(np.arange(64) % 8 == 0, 100, 1).astype(np.float32)
    alike = error_of(values, weight_format, SEARCH)
    weighted = error_of(values, weight_format, SEARCH, importance)
    assert weighted[:, ::8].sum() < 0.9 * alike[:, ::8].sum()
    assert weighted.sum() > alike.sum()


def test_each_search_begins_with_the_scale_of_the_reference() -> None:
    assert {name: candidates[0] for name, candidates in CANDIDATES.items()} == {
        "q8_0": 127,
        "q4_0": -8,
        "iq4_nl": IQ4_NL_LEVELS[0],
    }


# --- What cannot be converted.


BAD = {"NaN": np.nan, "infinity": np.inf, "negative infinity": -np.inf, "too large": 2.0**25}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rounding", [NEAREST, SEARCH])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_first_bad_block_is_named(weight_format: BlockFormat, rounding: str, axis: int, name: str) -> None:
    """By neuron, although the bad weight of a later neuron lies in an earlier line."""
    values = random_values(300, 96)
    values[290, 2] = values[200, 2] = values[145, 70] = values[145, 95] = BAD[name]
    data = np.ascontiguousarray(values if axis == 0 else values.T)
    region = Region("t", axis, 0, data.shape[1] * 4, data.shape[0], data.shape[1] * 4)
    stride = weight_format.row_bytes(96)
    arguments = (np.arange(300, dtype=np.int32), "F32", weight_format, np.zeros(300 * stride, np.uint8), stride, 0)
    for share in (range(300), range(100, 250), range(145, 146)):
        bad = gather_quantised(data.reshape(-1).view(np.uint8), region, 0, *arguments, rounding=rounding, neurons=share)
        assert bad == BadBlock(145, 64, finite=name == "too large")
    whole = data.reshape(-1).view(np.uint8)
    assert gather_quantised(whole, region, 0, *arguments, rounding=rounding, neurons=range(145)) is None


def test_a_bad_block_in_a_later_stretch_is_counted_from_the_start() -> None:
    values = random_values(64, 96)
    values[40, 70] = np.nan
    slots, bundles = np.arange(64, dtype=np.int32), np.zeros(64 * 102, np.uint8)
    for axis in (0, 1):
        data = np.ascontiguousarray(values if axis == 0 else values.T)
        region = Region("t", axis, 0, data.shape[1] * 4, data.shape[0], data.shape[1] * 4).some_lines(32, 32)
        found = set()
        for first in (32, 64)[: 1 + axis]:
            some = replace(region, start=first * region.pitch)
            lines = data.reshape(-1).view(np.uint8)[some.start : some.stop]
            found.add(gather_quantised(lines, some, first, slots, "F32", Q8_0, bundles, 102, 0))
        assert found - {None} == {BadBlock(40, 64, finite=False)}


def test_a_scale_is_too_large_where_float16_becomes_infinite() -> None:
    target = np.zeros((1, 18), np.uint8)
    values = np.zeros((1, 32), np.float32)
    values[0, 9] = np.nextafter(np.float32(65520 * 8), np.float32(0))
    assert quantise(values, Q4_0, target) is None
    assert target[0, :2].view(np.float16)[0] == -LARGEST_HALF
    values[0, 9] = 65520 * 8
    assert quantise(values, Q4_0, target) == BadBlock(0, 0, finite=True)


def test_a_bad_block_says_what_is_wrong() -> None:
    with pytest.raises(UnsupportedError, match=r"^down: weights of neuron 1,234 \(64 to 95\) are NaN or infinite; use"):
        raise BadBlock(1234, 64, finite=False).error("down", Q4_0)
    with pytest.raises(UnsupportedError, match="are too large for q4_0"):
        raise BadBlock(1234, 64, finite=True).error("down", Q4_0)


def test_arguments_that_do_not_fit_are_refused() -> None:
    slots, bundles = np.arange(64, dtype=np.int32), np.zeros(64 * 34, np.uint8)

    def gather(region: Region, first: int, **options: Any) -> None:
        gather_quantised(np.zeros(region.stop, np.uint8), region, first, slots, "F32", Q8_0, bundles, 34, 0, **options)

    gather(Region("t", 0, 0, 128, 64, 128), 0)
    with pytest.raises(ValueError, match="whole blocks"):
        gather(Region("t", 0, 0, 132, 64, 132), 0)
    with pytest.raises(ValueError, match="whole blocks"):
        gather(Region("t", 1, 0, 256, 20, 256), 0)
    with pytest.raises(ValueError, match="whole blocks"):
        gather(Region("t", 1, 0, 256, 48, 256), 16)
    with pytest.raises(ValueError, match="only a search"):
        gather(Region("t", 0, 0, 128, 64, 128), 0, importance=np.ones(32, np.float32))
    with pytest.raises(ValueError, match="importance of 31"):
        gather(Region("t", 0, 0, 128, 64, 128), 0, importance=np.ones(31, np.float32), rounding=SEARCH)
    with pytest.raises(ValueError, match="nothing is rounded to mxfp4"):
        quantise(np.zeros((1, 32), np.float32), MXFP4, np.zeros((1, 17), np.uint8))


# --- Names and sizes.


def test_formats_have_the_sizes_of_ggml() -> None:
    from gguf import GGML_QUANT_SIZES

    for weight_format in BLOCK_FORMATS.values():
        sizes = (weight_format.block_weights, weight_format.block_bytes)
        assert sizes == GGML_QUANT_SIZES[GGML[weight_format]]
    assert list(ROUNDING_FORMATS.values()) == list(FORMATS)
    assert list(CANDIDATES) == list(ROUNDING_FORMATS)
    assert tuple(DTYPE_NUMBERS) == CONVERTIBLE_DTYPES
    assert [part_bytes(name, 4096, 2) for name in ("source", "q8_0", "q4_0", "iq4_nl")] == [8192, 4352, 2304, 2304]


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("q4_0", {"gate": "q4_0", "up": "q4_0", "down": "q4_0"}),
        ("source", {"gate": "source", "up": "source", "down": "source"}),
        ("gate=q8_0,up=iq4_nl,down=q4_0", {"gate": "q8_0", "up": "iq4_nl", "down": "q4_0"}),
        ("down = q4_0, gate=source", {"gate": "source", "up": "source", "down": "q4_0"}),
    ],
)
def test_formats_are_given_for_all_roles_or_by_role(text: str, formats: dict[str, str]) -> None:
    assert parse_weight_formats(text, "--weight-format") == formats


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown weight format ''; choose from source, q8_0, q4_0, iq4_nl"),
        ("q4_1", "unknown weight format 'q4_1'; choose from"),
        ("Q4_0", "unknown weight format 'Q4_0'"),
        ("gate=q4", "unknown weight format 'q4'"),
        ("gate=", "unknown weight format ''"),
        ("gates=q4_0", "unknown role 'gates'; choose from gate, up, down"),
        ("=q4_0", "unknown role ''"),
        ("gate=q4_0,gate=q8_0", "gate is named twice"),
        ("gate=q4_0,", "'' is not ROLE=FORMAT; write"),
        ("q4_0,q8_0", "'q4_0' is not ROLE=FORMAT"),
        ("gate=q4_0=q8_0", "unknown weight format 'q4_0=q8_0'"),
    ],
)
def test_a_wrong_choice_of_formats_is_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_weight_formats(text, "--weight-format")
    assert str(caught.value).startswith(f"--weight-format: {said}")


def test_what_cannot_be_stored_in_blocks_is_refused() -> None:
    require_convertible("q4_0", "layers.3", 64, "BF16")
    require_convertible("source", "layers.3", 33, "F8_E4M3")
    with pytest.raises(UnsupportedError, match=r"^layers.3: a row has 1,000 weights, which is not a multiple of 32"):
        require_convertible("q4_0", "layers.3", 1000, "F16")
    with pytest.raises(UnsupportedError, match=r"^layers.3: weights of dtype F8_E4M3 cannot be stored as q8_0"):
        require_convertible("q8_0", "layers.3", 64, "F8_E4M3")
