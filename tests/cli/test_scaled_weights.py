"""Quantised weights that config.json says nothing of: refused by what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import RawTensor, random_tensor, tensors_of, write_checkpoint, write_random_placement
from tests.cli.conftest import Neuralink

STEM = "model.layers.1.mlp.up_proj"
# What lies beside the weights (a name, a dtype, a shape), and words of the message.
BESIDE: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "per tensor": (f"{STEM}.weight_scale", "F32", ()),
    "per row": (f"{STEM}.weight_scale", "BF16", (37, 1)),
    "per block": (f"{STEM}.weight_scale_inv", "F32", (1, 1)),
    "of inputs": (f"{STEM}.input_scale", "F32", ()),
    "LLM.int8": (f"{STEM}.SCB", "F32", (37,)),
    "bitsandbytes": (f"{STEM}.weight.absmax", "F32", (12,)),
    "state of bitsandbytes": (f"{STEM}.weight.quant_state.bitsandbytes__nf4", "U8", (80,)),
    "NVFP4": (f"{STEM}.weight_scale_2", "F32", ()),
    "zero points": (f"{STEM}.weight_zero_point", "F32", (37,)),
    "of attention": ("model.layers.1.self_attn.q_proj.weight_scale_inv", "F32", (1, 1)),
    "GPTQ": ("model.layers.1.self_attn.q_proj.qweight", "U8", (3, 5)),
}


def both(neuralink: Neuralink, model: Path, outputs: Path) -> list[tuple[int, str]]:
    """Exit code and message of profile and relayout."""
    sound = write_checkpoint(outputs.parent / "sound", "llama")
    placement = write_random_placement(sound, outputs.parent / "placement")
    (outputs.parent / "text.txt").write_text("some text\n")
    done = [
        neuralink("profile", model, "--dataset", outputs.parent / "text.txt", "-o", outputs / "t"),
        neuralink("relayout", model, "--placement", placement, "-o", outputs / "l"),
    ]
    assert not any(outputs.iterdir())
    return [(outcome.code, outcome.error) for outcome in done]


def test_a_scale_by_a_plain_name_is_refused(neuralink: Neuralink, tmp_path: Path, outputs: Path) -> None:
    """As DeepSeek names them: a tensor in the module of a block that has no part in its description."""
    scale = random_tensor(np.random.default_rng(0), "F32", 1, 1)
    model = write_checkpoint(tmp_path / "model", "llama", tensors={**tensors_of("llama"), f"{STEM}.scale": scale})
    for code, error in both(neuralink, model, outputs):
        assert code == 4
        assert f"tensor '{STEM}.scale'" in error


@pytest.mark.parametrize("name", BESIDE)
def test_scales_beside_weights_are_refused(neuralink: Neuralink, tmp_path: Path, outputs: Path, name: str) -> None:
    tensor, dtype, shape = BESIDE[name]
    tensors = {**tensors_of("llama"), tensor: random_tensor(np.random.default_rng(0), dtype, *shape)}
    for code, error in both(neuralink, write_checkpoint(tmp_path / "model", "llama", tensors=tensors), outputs):
        assert code == 4
        assert f"is quantised, though config.json does not say so: it has tensor {tensor!r}" in error


def test_a_checkpoint_of_mlx_is_said_to_be_quantised(neuralink: Neuralink, tmp_path: Path, outputs: Path) -> None:
    """Codes in 32 bits with scales and biases, of which the config speaks under a key of its own."""
    tensors = tensors_of("llama")
    module = "model.layers.0.mlp.up_proj"
    rows = tensors[f"{module}.weight"].shape[0]
    tensors[f"{module}.weight"] = RawTensor("U32", (rows, 4), bytes(16 * rows))
    for name in ("scales", "biases"):
        tensors[f"{module}.{name}"] = RawTensor("BF16", (rows, 1), bytes(2 * rows))
    config = {"quantization": {"group_size": 32, "bits": 4}}
    model = write_checkpoint(tmp_path / "model", "llama", tensors=tensors, config=config)
    for code, error in both(neuralink, model, outputs):
        assert code == 4
        assert f"is quantised, in a way that is not understood: it has tensor '{module}.scales'" in error


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U8"])
def test_weights_of_eight_bits_are_refused(neuralink: Neuralink, tmp_path: Path, outputs: Path, dtype: str) -> None:
    for code, error in both(neuralink, write_checkpoint(tmp_path / "model", "llama", dtype=dtype), outputs):
        assert code == 4
        assert f"FFN weight 'model.layers.0.mlp.gate_proj.weight' is {dtype}, a dtype of quantised weights" in error


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
    ],
)
def test_a_nested_quantization_config_is_seen(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, config: dict[str, Any]
) -> None:
    for code, error in both(neuralink, write_checkpoint(tmp_path / "model", "llama", config=config), outputs):
        assert code == 4
        assert "is quantised (fp8)" in error


def test_the_config_of_modelopt_is_seen(neuralink: Neuralink, tmp_path: Path, outputs: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "llama")
    document = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (model / "hf_quant_config.json").write_text(json.dumps(document))
    for code, error in both(neuralink, model, outputs):
        assert code == 4
        assert "is quantised (FP8)" in error


def test_scales_that_are_no_quantisation_are_left_alone(neuralink: Neuralink, tmp_path: Path, outputs: Path) -> None:
    """As LayerScale, and the scales of a cache of keys and values."""
    scale = random_tensor(np.random.default_rng(0), "F32", 20)
    names = ("layers.0.layer_scale", "layers.0.self_attn.k_scale", "layers.0.layer_scale1.lambda1", "router.scale")
    tensors = {**tensors_of("llama"), **{f"model.{name}": scale for name in names}}
    model = write_checkpoint(tmp_path / "model", "llama", tensors=tensors)
    placement = write_random_placement(model, tmp_path / "placement")
    assert neuralink("relayout", model, "--placement", placement, "-o", outputs / "l").code == 0
