"""Rounded layouts of real models that keep several matrices in a tensor, against the reference of the formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import load_file

from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.storage.reader import FlashReader
from tests.checkpoints import write_random_placement
from tests.layouts import relayout, verify
from tests.rewriting.test_rounded_layouts import REFERENCE

HIDDEN, NEURONS, EXPERTS = 64, 40, 3
USUAL = {
    "hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(folder: Path, name: str, dtype: torch.dtype, *, original: bool = True, **options: Any) -> dict[str, Any]:
    """Save a random model and return its tensors."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**USUAL, **options)
    with quiet_transformers():
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
        model.save_pretrained(folder, save_original_format=original)
    return dict(load_file(folder / "model.safetensors"))


def stored(layout: Path, block: str) -> npt.NDArray[np.uint8]:
    with FlashReader(layout) as reader:
        found = reader.block(block)
        bundles: npt.NDArray[np.uint8] = reader.read_bundles(found, np.arange(found.neurons, dtype=np.int32)).bundles
    return bundles


def expected(rows: list[Any], order: npt.NDArray[np.int32], weights: str) -> npt.NDArray[np.uint8]:
    parts = [np.ascontiguousarray(part.float().numpy()[order]) for part in rows]
    return np.concatenate([gguf.quants.quantize(part, REFERENCE[weights]) for part in parts], axis=1)


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fused_gate_and_up(tmp_path: Path, dtype: torch.dtype, weights: str) -> None:
    tensors = model_of(tmp_path / "model", "Phi3", dtype)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement", seed=1)
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights=weights)
    fused, down = (tensors[f"model.layers.0.mlp.{name}.weight"] for name in ("gate_up_proj", "down_proj"))
    with open_layout(tmp_path / "layout") as opened:
        order = opened.order("layers.0")
    wanted = expected([fused[:NEURONS], fused[NEURONS:], down.T], order, weights)
    assert np.array_equal(stored(tmp_path / "layout", "layers.0"), wanted)
    assert verify(tmp_path / "model", tmp_path / "layout").mode == "full"


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@pytest.mark.parametrize("original", [True, False])
def test_experts_alone_and_in_one_tensor(tmp_path: Path, original: bool, weights: str) -> None:
    options: dict[str, Any] = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "original": original}
    tensors = model_of(tmp_path / "model", "Mixtral", torch.bfloat16, **options)
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement", seed=1)
    relayout(tmp_path / "model", placement, tmp_path / "layout", weights=weights)
    with open_layout(tmp_path / "layout") as opened:
        orders = [opened.order(f"layers.0.experts.{expert}") for expert in range(EXPERTS)]
        assert opened.kind == "bundled"
        # Routers stay as they are, whatever they are called.
        assert not any("experts" in name or "gate" in name for name in opened.dense)
        assert "model.layers.0.self_attn.q_proj.weight" in opened.dense
    for expert, order in enumerate(orders):
        if original:
            stem = f"model.layers.0.block_sparse_moe.experts.{expert}"
            parts = [tensors[f"{stem}.w1.weight"], tensors[f"{stem}.w3.weight"], tensors[f"{stem}.w2.weight"].T]
        else:
            fused, down = (
                tensors[f"model.layers.0.mlp.experts.{name}"][expert] for name in ("gate_up_proj", "down_proj")
            )
            parts = [fused[:NEURONS], fused[NEURONS:], down.T]
        found = stored(tmp_path / "layout", f"layers.0.experts.{expert}")
        assert np.array_equal(found, expected(parts, order, weights))
    assert verify(tmp_path / "model", tmp_path / "layout").mode == "full"
