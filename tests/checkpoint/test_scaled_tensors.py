"""Which tensors are codes with scales, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.checkpoint.scaled_tensors import ScaledTensor, Shape, find_scaled_tensors, may_have_scales
from neuralink_cli.errors import UnsupportedError

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUPS = {"a": {"format": "nvfp4-pack"}}
INT8 = {"quant_method": "compressed-tensors", "format": "int-quantized"}
MIXED = {"a": {"format": "pack-quantized"}, "b": {"format": "int-quantized"}}
W, HERE = "a.proj.weight", Path("model")


@pytest.mark.parametrize(
    ("config", "dtype", "scales", "expected"),
    [
        (FP8, "F8_E4M3", (2, 3), (128, 128)),
        (FP8, "F8_E4M3", (), (200, 300)),
        ({"quant_method": "fp8"}, "F8_E4M3", (2, 3), (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [100, 30]}, "F8_E4M3", (2, 10), (100, 30)),
        (INT8, "I8", (200, 1), (1, 300)),
        (INT8, "I8", (1,), (200, 300)),
        (INT8, "I8", (200, 10), (1, 30)),
        ({**INT8, "format": "mixed-precision", "config_groups": MIXED}, "I8", (200, 10), (1, 30)),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "F8_E4M3", (200, 1), (1, 300)),
    ],
)
def test_blocks_follow_from_the_shapes(
    config: dict[str, Any], dtype: str, scales: tuple[int, ...], expected: tuple[int, int]
) -> None:
    name = f"{W}_scale_inv" if config["quant_method"] == "fp8" else f"{W}_scale"
    tensors: dict[str, Shape] = {W: (dtype, (200, 300)), name: ("F32", scales), "norm.weight": ("F32", (300,))}
    assert find_scaled_tensors(config, tensors, HERE) == {W: ScaledTensor(W, name, 200, 300, *expected)}


@pytest.mark.parametrize(
    ("config", "dtype", "shape", "scale_dtype", "scales"),
    [
        (FP8, "F8_E4M3", (200, 300), "F32", (3, 3)),
        (FP8, "F8_E5M2", (200, 300), "F32", (2, 3)),
        (FP8, "F8_E4M3", (200, 300), "F8_E8M0", (2, 3)),
        (FP8, "F8_E4M3", (2, 200, 300), "F32", (2, 2, 3)),
        (INT8, "I8", (200, 300), "F32", (200, 7)),
        (INT8, "I8", (200, 300), "F32", (100, 1)),
        (INT8, "I8", (0, 300), "F32", (1,)),
    ],
)
def test_other_scales_are_refused(
    config: dict[str, Any], dtype: str, shape: tuple[int, ...], scale_dtype: str, scales: tuple[int, ...]
) -> None:
    name = f"{W}_scale_inv" if config is FP8 else f"{W}_scale"
    with pytest.raises(UnsupportedError, match=f"{W}' is {dtype}.*not understood"):
        find_scaled_tensors(config, {W: (dtype, shape), name: (scale_dtype, scales)}, HERE)


def test_codes_without_scales_and_strangers_beside_them_are_refused() -> None:
    known: dict[str, Shape] = {W: ("I8", (4, 64)), f"{W}_scale": ("F32", (4, 2))}
    assert set(find_scaled_tensors(INT8, known, HERE)) == {W}
    with pytest.raises(UnsupportedError, match=r"'b\.weight' is I8, but has no scales"):
        find_scaled_tensors(INT8, {**known, "b.weight": ("I8", (4, 64))}, HERE)
    strange: dict[str, Shape] = {**known, f"{W}_shape": ("I64", (2,))}
    with pytest.raises(UnsupportedError, match=f"'{W}_shape' belongs to quantised weights"):
        find_scaled_tensors(INT8, strange, HERE)
    assert set(find_scaled_tensors(INT8, strange, HERE, {f"{W}_shape"})) == {W}
    for last, told in (("g_idx", "activation order"), ("zero_point", "zero points")):
        with pytest.raises(UnsupportedError, match=f"'{W}_{last}' .*{told}"):
            find_scaled_tensors(INT8, {**known, f"{W}_{last}": ("I32", (64,))}, HERE)


@pytest.mark.parametrize(
    "config",
    [
        None,
        "fp8",
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors", "format": ["pack-quantized"]},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "compressed-tensors"},
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": GROUPS,
        },
    ],
)
def test_other_kinds_are_not_looked_at(config: Any) -> None:
    assert not may_have_scales(config)
    assert find_scaled_tensors(config, {W: ("I8", (4, 4)), f"{W}_scale": ("F32", (4, 1))}, HERE) == {}
