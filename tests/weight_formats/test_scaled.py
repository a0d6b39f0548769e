"""Codes and scales as float32, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor
from neuralink_cli.weight_formats.scaled import Scales, levels_of, packed_levels, widen_rows, widen_scaled
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
    found, place = widen_scaled(data[region.start : region.stop], region, scales)
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
