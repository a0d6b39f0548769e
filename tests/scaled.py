"""Checkpoints of eight or four bits with scales, made from ordinary ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import build_model

FP8, INT8, PACKED4, PACKED8, MXFP4 = "fp8", "int8", "packed int4", "packed int8", "mxfp4"
BITS = {PACKED4: 4, PACKED8: 8}
CONFIGS: dict[str, dict[str, Any]] = {
    FP8: {"quant_method": "fp8", "activation_scheme": "dynamic"},
    INT8: {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            }
        },
    },
}
for packed, bits in BITS.items():
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    CONFIGS[packed] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
MX_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
CONFIGS[MXFP4] = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {**MX_WEIGHTS, "scale_dtype": "torch.uint8"}},
    },
}
# The magnitudes of MXFP4.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantised_copy(model: Path, target: Path, kind: str, block: tuple[int, int] = (128, 128)) -> dict[str, np.ndarray]:
    """Copy a checkpoint with its projections quantised; returns what their weights stand for, float32, by name.

    Args:
        kind: `FP8` with a scale for each block, `INT8` with one for each row, `PACKED4` and `PACKED8` with one for each
            part of a row that is as long as a block, `MXFP4`.
    """
    shutil.copytree(model, target)
    tensors, values = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith((".fc1.weight", ".fc2.weight", "proj.weight")):
            tensors[name] = weight
            continue
        if kind == MXFP4:
            tensors[f"{name}_packed"], tensors[f"{name}_scale"], values[name] = mxfp4(weight)
            continue
        size = (1, weight.shape[1]) if kind == INT8 else block
        if kind in BITS:
            size = (1, min(block[1], weight.shape[1]))
        # Padded with zeros to whole blocks.
        blocks = [-(-length // each) for length, each in zip(weight.shape, size, strict=True)]
        padded = torch.zeros(blocks[0] * size[0], blocks[1] * size[1])
        padded[: weight.shape[0], : weight.shape[1]] = weight.float().abs()
        largest = padded.reshape(blocks[0], size[0], blocks[1], size[1]).amax((1, 3))
        scales = largest / {FP8: 448, PACKED4: 7}.get(kind, 127)
        if kind != FP8:
            scales = scales.to(torch.bfloat16)
        wide = scales.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        scaled = weight.float() / wide
        most = 7 if kind == PACKED4 else 127
        codes = scaled.to(torch.float8_e4m3fn) if kind == FP8 else scaled.round().clamp(-most - 1, most).to(torch.int8)
        if kind in BITS:
            tensors[f"{name}_packed"] = packed_codes(codes, BITS[kind])
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        else:
            tensors[name] = codes
        tensors[name + ("_scale_inv" if kind == FP8 else "_scale")] = scales
        values[name] = (codes.float() * wide).numpy()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = CONFIGS[kind] | ({"weight_block_size": list(block)} if kind == FP8 else {})
    (target / "config.json").write_text(json.dumps(config))
    return values


def packed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, int8 `[rows, columns]`, as compressed-tensors packs them: int32, the first in the lowest bits."""
    shifted = codes.long() + (1 << (bits - 1))
    words = sum(shifted[:, k :: 32 // bits] << (bits * k) for k in range(32 // bits))
    assert isinstance(words, torch.Tensor)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A matrix in MXFP4: codes, uint8 `[rows, columns / 2]`, exponents, uint8 `[rows, columns / 32]`, and values."""
    blocks = weight.float().reshape(weight.shape[0], -1, 32)
    exponents = (torch.floor(torch.log2(blocks.abs().amax(2))) - 2 + 127).clamp(0, 254).to(torch.uint8)
    scales = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)[..., None]
    codes = ((blocks.abs() / scales)[..., None] - _E2M1).abs().argmin(-1)
    codes = (codes + 8 * torch.signbit(blocks)).to(torch.uint8).reshape(weight.shape)
    numbers = torch.cat([_E2M1, -_E2M1])[codes.long()].reshape(blocks.shape)
    return codes[:, ::2] | (codes[:, 1::2] << 4), exponents, (numbers * scales).reshape(weight.shape).numpy()


def mxfp4_experts(model: Path, target: Path) -> dict[str, np.ndarray]:
    """Copy a checkpoint with experts as gpt-oss has them, in its MXFP4; returns what they stand for, turned around.

    The values are float32 `[experts, rows, columns]`, by the name of the codes.
    """
    shutil.copytree(model, target)
    tensors, values = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        rows = weight.transpose(1, 2).contiguous()
        codes, exponents, numbers = mxfp4(rows.reshape(-1, rows.shape[2]))
        stack = (*rows.shape[:2], rows.shape[2] // 32)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = codes.reshape(*stack, 16), exponents.reshape(stack)
        values[f"{name}_blocks"] = numbers.reshape(rows.shape)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (target / "config.json").write_text(json.dumps(config))
    return values


def mxfp4_gpt_oss(folder: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A gpt-oss that is wide enough for whole blocks, in bfloat16 and in MXFP4, and what the latter stands for."""
    # Weights so small that rounding them hardly routes tokens elsewhere.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2}
    plain = build_model(folder / "plain", "gpt_oss", dtype="bfloat16", sizes=sizes)
    return plain, folder / "model", mxfp4_experts(plain, folder / "model")
