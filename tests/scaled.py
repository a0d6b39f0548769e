"""Checkpoints of eight bits with scales, made from ordinary ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP8, INT8 = "fp8", "int8"
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


def quantised_copy(model: Path, target: Path, kind: str, block: tuple[int, int] = (128, 128)) -> dict[str, np.ndarray]:
    """Copy a checkpoint with its projections quantised; returns what their weights stand for, float32, by name.

    Args:
        kind: `FP8` with a scale for each block, `INT8` with one for each row.
    """
    shutil.copytree(model, target)
    tensors, values = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith((".fc1.weight", ".fc2.weight", "proj.weight")):
            tensors[name] = weight
            continue
        size = block if kind == FP8 else (1, weight.shape[1])
        scales = torch.zeros(-(-weight.shape[0] // size[0]), -(-weight.shape[1] // size[1]))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                tile = weight[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
                scales[i, j] = tile.float().abs().max() / (448 if kind == FP8 else 127)
        if kind == INT8:
            scales = scales.to(torch.bfloat16)
        wide = scales.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        scaled = weight.float() / wide
        codes = scaled.to(torch.float8_e4m3fn) if kind == FP8 else scaled.round().clamp(-128, 127).to(torch.int8)
        tensors[name], tensors[name + ("_scale_inv" if kind == FP8 else "_scale")] = codes, scales
        values[name] = (codes.float() * wide).numpy()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = CONFIGS[kind] | ({"weight_block_size": list(block)} if kind == FP8 else {})
    (target / "config.json").write_text(json.dumps(config))
    return values
