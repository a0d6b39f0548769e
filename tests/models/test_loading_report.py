"""What does not fit between the files of a checkpoint and the model that its config describes is said in words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.errors import InputError
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.models.loading import load_model
from tests.conftest import ModelFactory
from tests.tiny_models import HIDDEN, NEURONS

WEIGHTS = "model.safetensors"
Variant = Callable[..., Path]


@pytest.fixture
def variant(model: ModelFactory, tmp_path: Path) -> Variant:
    """A copy of a tiny model with other values in config.json, and more tensors."""

    def build(
        family: str = "llama", config: Mapping[str, Any] | None = None, tensors: Mapping[str, tuple[int, ...]] = {}
    ) -> Path:
        copy = Path(shutil.copytree(model(family), tmp_path / "variant"))
        stated = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**stated, **(config or {})}))
        more = {name: np.full(shape, 0.5, np.float32) for name, shape in tensors.items()}
        save_file({**load_file(copy / WEIGHTS), **more}, copy / WEIGHTS, {"format": "pt"})
        return copy

    return build


def load(directory: Path, *, with_head: bool = False) -> Any:
    with Checkpoint(directory) as checkpoint:
        architecture = choose_architecture(describe(checkpoint))
    with quiet_transformers():
        return load_model(directory, architecture, with_head=with_head)


@pytest.mark.parametrize(("rows", "head"), [(319, False), (384, False), (384, True)])
def test_an_embedding_of_another_size_is_named_with_both_shapes(variant: Variant, rows: int, head: bool) -> None:
    with pytest.raises(InputError) as caught:
        load(variant(config={"vocab_size": rows}), with_head=head)
    name = "lm_head.weight" if head else "embed_tokens.weight"
    more = " and 1 more" if head else ""
    assert caught.value.what == (
        f"weight {name!r} has shape [320, {HIDDEN}], but the model that config.json describes needs [{rows}, {HIDDEN}]"
        f"{more}"
    )
    assert caught.value.fix is not None
    assert "vocab_size" in caught.value.fix


def test_a_bias_of_an_ffn_block_that_the_model_does_without_is_an_error(variant: Variant) -> None:
    biased = variant(tensors={"model.layers.1.mlp.up_proj.bias": (NEURONS["llama"],)})
    with pytest.raises(InputError) as caught:
        load(biased)
    assert "does without 'model.layers.1.mlp.up_proj.bias', though an FFN block has it" in caught.value.what
    assert caught.value.fix is not None
    assert "mlp_bias" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "shape", "head"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (HIDDEN,), False),
        ("model.layers.1.self_attn.q_norm.weight", (8,), False),
        ("model.norm.bias", (HIDDEN,), False),
        ("lm_head.bias", (320,), True),
    ],
)
def test_weights_of_its_modules_that_a_model_does_without_are_told(
    variant: Variant, caplog: pytest.LogCaptureFixture, name: str, shape: tuple[int, ...], head: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        load(variant(tensors={name: shape}), with_head=head)
    assert f"of transformers leaves out weight {name!r} of its modules; " in caplog.text


def test_what_is_no_weight_of_its_modules_is_not_told(variant: Variant, caplog: pytest.LogCaptureFixture) -> None:
    others = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
        "model.layers.0.self_attn.masked_bias": (),
        "model.layers.9.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "optimizer.exp_avg": (3,),
        "vision_tower.layers.0.fc.weight": (3, 3),
    }
    with caplog.at_level(logging.WARNING):
        load(variant(tensors=others))
    assert caplog.text == ""


def test_a_config_of_a_far_larger_model_takes_no_memory(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """What config.json leaves out would be that of a model of billions of weights, made from nothing."""
    from transformers import AutoModel

    nested = variant()
    stated = json.loads((nested / "config.json").read_text())
    (nested / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": stated}))
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    with pytest.raises(InputError, match=r"describes a model of 6,607,343,616 weights, and the files have 15,408; "):
        load(nested)


@pytest.mark.parametrize(
    ("config", "told", "fix"),
    [
        ({"hidden_act": "SiLU"}, "hidden_act is 'SiLU', which", "silu"),
        ({"rope_parameters": {"rope_type": "own", "rope_theta": 1.0}}, "rope_type is 'own', which", "correct it"),
    ],
)
def test_a_name_that_transformers_does_not_know_is_told(
    variant: Variant, config: dict[str, Any], told: str, fix: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(variant(config=config))
    assert caught.value.what == f"{told} transformers does not know"
    assert str(caught.value.where).endswith("config.json")
    assert fix in str(caught.value.fix)


def test_an_index_that_transformers_cannot_read_is_told(model: ModelFactory, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model("llama", shards=True), tmp_path / "copy"))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(InputError, match="has no metadata, which transformers needs; add"):
        load(copy)
