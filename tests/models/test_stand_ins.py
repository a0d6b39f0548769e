"""Checkpoints that come with code of their own and are run without it, against that code written down here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.models.loading import load_model
from tests.conftest import ModelFactory
from tests.families import FAMILY
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import build_model


def fatrelu(x: torch.Tensor) -> torch.Tensor:
    return x * (x > 0.05)


def relu(x: torch.Tensor) -> torch.Tensor:
    return x * (x > 0)


# What the FFN computes of gate and up.
FFNS = {
    "prosparse": lambda gate, up: fatrelu(gate) * up,
    "turbosparse": lambda gate, up: relu(gate) * relu(up),
}


@pytest.mark.parametrize("family", FFNS)
def test_the_stand_in_computes_what_the_checkpoint_means(model: ModelFactory, family: str, tmp_path: Path) -> None:
    known = FAMILY[family]
    ordinary = shutil.copytree(model(family), tmp_path / "ordinary")
    config = json.loads((ordinary / "config.json").read_text())
    del config["auto_map"]
    (ordinary / "config.json").write_text(json.dumps(config | {"model_type": known.model_type, "hidden_act": "relu"}))
    expected = AutoModelForCausalLM.from_pretrained(ordinary, dtype="float32")
    for layer in expected.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(FFNS[family](mlp.gate_proj(x), mlp.up_proj(x)))
    architecture = find_architecture(str(known.renamed), tmp_path)
    found = load_model(model(family), architecture, with_head=True, device="cpu")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_drelu_fires_where_both_are_positive_if_the_intermediate_is_asked_for(
    model: ModelFactory, text_file: Path, tmp_path: Path
) -> None:
    ratios = {}
    for signal in ("gate", "intermediate"):
        profile(ProfileRequest(model("turbosparse"), tmp_path / signal, (str(text_file),), signal))
        with Trace(tmp_path / signal) as trace:
            ratios[signal] = [int(trace.fired(block).astype(bool).sum()) for block in trace.info.blocks]
    assert all(both < gate for both, gate in zip(ratios["intermediate"], ratios["gate"], strict=True))


def test_what_nothing_stands_in_for_needs_its_code(text_file: Path, tmp_path: Path) -> None:
    directory = build_model(tmp_path / "model", "llama", activation="relu")
    path = directory / "config.json"
    own = {"model_type": "minicpm", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(
        UnsupportedError, match=r"needs Python code that comes with the checkpoint; .*trust-remote-code"
    ):
        profile(ProfileRequest(directory, tmp_path / "t", (str(text_file),)))
