"""Codes and scales as float32, against torch."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor
from neuralink_cli.weight_formats.formats import MXFP4
from neuralink_cli.weight_formats.quantising import dequantise
from neuralink_cli.weight_formats.scaled import (
    MXFP4_LEVELS,
    Scales,
    carry_quantised,
    levels_of,
    packed_levels,
    powers_of_two,
    widen_rows,
    widen_scaled,
)
from tests.scaled import packed_codes


def test_every_code_has_the_value_that_torch_gives_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype, kind in (("F8_E4M3", torch.float8_e4m3fn), ("I8", torch.int8)):
        expected = codes.view(kind).float().numpy()
        assert np.array_equal(levels_of(dtype).view(np.uint32), expected.view(np.uint32)) or np.array_equal(
            levels_of(dtype), expected, equal_nan=True
        )
        assert np.array_equal(np.signbit(levels_of(dtype)), np.signbit(expected))


@pytest.mark.parametrize("block", [(4, 4), (5, 7), (1, 12), (30, 24), (3, 100)])
def test_every_weight_has_the_scale_of_its_block(block: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    rows, columns = 30, 24
    codes = random.integers(0, 256, (rows, columns)).astype(np.uint8)
    values = random.random((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    scales = Scales(ScaledTensor("w", "s", rows, columns, *block), values, levels_of("I8"))
    wide = np.repeat(np.repeat(values, block[0], 0), block[1], 1)[:rows, :columns]
    expected = codes.view(np.int8).astype(np.float32) * wide
    data = codes.reshape(-1)
    for first in (0, 3, 29):
        assert np.array_equal(
            widen_rows(data[first * columns :], first, scales).view(np.float32), expected[first:].ravel()
        )
    # A stretch of columns of some rows.
    region = Region("w", 1, 7 * columns + 5, columns, 20, 11)
    before = 7 // block[0]
    for some in (scales, replace(scales, values=values[before:], first_row=before * block[0])):
        found, place = widen_scaled(data[region.start : region.stop], region, some)
        assert (place.pitch, place.line_bytes, place.lines, place.neuron_axis) == (44, 44, 20, 1)
        assert np.array_equal(found.view(np.float32).reshape(20, 11), expected[7:27, 5:16])


@pytest.mark.parametrize("block", [8, 32, 96])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_are_widened_from_any_place(bits: int, block: int) -> None:
    rows, columns = 30, 96
    random = np.random.default_rng(0)
    half = 1 << bits >> 1
    codes = random.integers(-half, half, (rows, columns)).astype(np.int8)
    values = random.standard_normal((rows, columns // block), np.float32)
    scales = Scales(ScaledTensor("w", "s", rows, columns, 1, block), values, packed_levels(bits), bits)
    expected = torch.from_numpy(codes).float() * torch.from_numpy(values).repeat_interleave(block, 1)
    data = packed_codes(torch.from_numpy(codes), bits).numpy().reshape(-1).view(np.uint8)
    per_row = columns * bits // 8
    assert np.array_equal(
        widen_rows(data[3 * per_row : 7 * per_row], 3, scales).view(np.uint32),
        expected[3:7].numpy().reshape(-1).view(np.uint32),
    )
    for first, width in ((0, 96), (5, 11), (6, 90), (95, 1)):
        region = Region("w", 1, 7 * columns + first, columns, 20, width)
        lines = data[region.start * bits // 8 : -(-region.stop * bits // 8)]
        found, place = widen_scaled(lines, region, scales)
        assert (place.start, place.pitch, place.line_bytes, place.lines) == (0, 4 * width, 4 * width, 20)
        assert np.array_equal(found.view(np.float32).reshape(20, width), expected[7:27, first : first + width].numpy())


def test_scales_of_mxfp4_are_powers_of_two() -> None:
    exponents = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(exponents).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(powers_of_two(exponents), expected, equal_nan=True)


def test_every_block_of_mxfp4_stands_for_what_ggml_says() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (8 * 255, 16)).astype(np.uint8)
    # All exponents, so that some numbers are subnormal and some are too large.
    rows = np.concatenate([np.repeat(np.arange(255, dtype=np.uint8), 8)[:, None], codes], axis=1)
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(dequantise(rows, MXFP4).view(np.uint32), expected.view(np.uint32))


def test_rows_of_mxfp4_are_carried_from_any_place() -> None:
    rows, columns, hidden = 20, 128, 64
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (rows, columns)).astype(np.uint8)
    exponents = random.integers(0, 255, (rows, columns // 32)).astype(np.uint8)
    data = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8).reshape(-1)
    tensor = ScaledTensor("w", "s", rows, columns, 1, 32)
    scales = Scales(tensor, powers_of_two(exponents), np.array(MXFP4_LEVELS, np.float32), 4, exponents)
    # Lines 5 to 14 of a matrix that begins at row 2, in the right half of the tensor.
    region = Region("w", 0, 7 * columns + hidden, columns, 10, hidden)
    slots = random.permutation(15).astype(np.int32)
    bundles, stride = np.zeros(15 * 40, np.uint8), 40
    lines = data[region.start // 2 : region.stop // 2]
    assert carry_quantised(lines, region, 5, slots, scales, bundles, stride, 3) is None
    numbers = torch.tensor(MXFP4_LEVELS)[torch.from_numpy(codes).long()].reshape(rows, -1, 32)
    values = torch.ldexp(numbers, torch.from_numpy(exponents).int()[..., None] - 127).reshape(rows, columns).numpy()
    found = dequantise(bundles.reshape(15, stride)[:, 3 : 3 + 34], MXFP4)
    assert np.array_equal(found[slots[5:15]], values[7:17, hidden:])
    assert not bundles.reshape(15, stride)[:, :3].any()
    assert not bundles.reshape(15, stride)[slots[:5]].any()
    exponents[9, 3] = 255
    bad = carry_quantised(lines, region, 5, slots, scales, bundles, stride, 3)
    assert bad is not None
    assert (bad.neuron, bad.first_weight, bad.finite) == (7, 32, False)
    later = replace(scales, values=scales.values[6:], exponents=exponents[6:], first_row=6)
    bad = carry_quantised(lines, region, 5, slots, later, bundles, stride, 3)
    assert bad is not None
    assert (bad.neuron, bad.first_weight) == (7, 32)
    for wrong in (Region("w", 1, 0, columns, 10, hidden), Region("w", 0, 16, columns, 10, hidden)):
        with pytest.raises(ValueError, match="no rows of MXFP4"):
            carry_quantised(lines, wrong, 5, slots, scales, bundles, stride, 3)
