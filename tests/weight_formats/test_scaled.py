"""Codes and scales as float32, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuralink_cli.architectures.regions import Region
from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor
from neuralink_cli.weight_formats.scaled import Scales, levels_of, widen_rows, widen_scaled


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
