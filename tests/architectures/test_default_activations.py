"""The activation of every built-in description against the config classes and modules of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from neuralink_cli.architectures.activation_names import split_most
from neuralink_cli.architectures.architecture import Architecture, builtin_architectures, find_architecture
from neuralink_cli.architectures.find_blocks import activation_name
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.models.model_class import stand_in_config
from tests import swept
from tests.checkpoints import random_tensor, write_checkpoint
from tests.families import BY_NAME_ONLY

# Where the FFN code of transformers reads its activation.
READ_BY_THE_MODEL = {
    **dict.fromkeys(
        ["gpt2", "gpt-sw3", "gptj", "codegen", "opt", "gpt_bigcode", "gpt_neo", "xglm"], "activation_function"
    ),
    **dict.fromkeys(
        ["bart", "mbart", "pegasus", "blenderbot", "blenderbot-small", "mvp", "plbart"], "activation_function"
    ),
    **dict.fromkeys(["marian", "m2m_100", "fsmt"], "activation_function"),
    **dict.fromkeys(["distilbert", "falcon"], "activation"),
    **dict.fromkeys(["gemma2", "gemma3", "gemma3_text", "vaultgemma", "gemma3n", "gemma3n_text"], "hidden_activation"),
    **dict.fromkeys(["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"], "hidden_activation"),
    **dict.fromkeys(["modernbert", "modernbert-decoder", "recurrent_gemma"], "hidden_activation"),
    **dict.fromkeys(["t5", "mt5", "umt5", "longt5"], "dense_act_fn"),
    "nemotron_h": "mlp_hidden_act",
}
KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn", "feed_forward_proj")
# Written into the code of the model, whatever the config says.
FIXED = ("bloom", "mpt", "lfm2", "lfm2_moe", "lfm3")
# x * sigmoid(slope * x), with a slope from the config.
WITH_SLOPE = ("gpt_oss", "minimax_m3_vl_text", "openai_privacy_filter")
# Those whose gate is clamped.
CLAMPED = (*WITH_SLOPE, "deepseek_v4")
# Models of images and text, whose text model has a config of its own.
WITH_TEXT_CONFIG = ("gemma3", "gemma3n", "gemma4", "gemma4_unified", "qwen3_5", "qwen3_5_moe")
KNOWN = [
    model_type
    for architecture in builtin_architectures()
    for model_type in architecture.model_types
    if architecture.runs_as is None and model_type not in BY_NAME_ONLY
]
MODEL_TYPES = [model_type for model_type in KNOWN if model_type in CONFIG_MAPPING]
STAND_INS = [architecture for architecture in builtin_architectures() if architecture.runs_as is not None]


@pytest.fixture(autouse=True)
def no_words_for_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers spells out every config that it makes, for a log that nobody reads: a third of the time."""
    monkeypatch.setattr(PretrainedConfig, "__repr__", object.__repr__)


def described(tmp_path: Path, model_type: str, config: dict[str, Any]) -> str:
    """The activation as the description of a model type reads it from a config, without a clamp."""
    return split_most(with_clamp(tmp_path, model_type, config))[1]


def with_clamp(tmp_path: Path, model_type: str, config: dict[str, Any]) -> str:
    """The same with its clamp."""
    directory = tmp_path / "model"
    if not directory.exists():
        write_checkpoint(directory, tensors={"unused": random_tensor(np.random.default_rng(0), "F32", 1)})
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    with Checkpoint(directory) as checkpoint:
        return activation_name(checkpoint, find_architecture(model_type, directory))


def computed(model_type: str, config: dict[str, Any]) -> str:
    """The activation as the model class of transformers reads it from the same config."""
    made = CONFIG_MAPPING[model_type].from_dict({"model_type": model_type, **config}).get_text_config()
    return str(getattr(made, READ_BY_THE_MODEL.get(model_type, "hidden_act")))


def in_text_config(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"text_config": values} if model_type in WITH_TEXT_CONFIG else values


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in (*FIXED, *WITH_SLOPE)])
def test_the_default_activation_is_that_of_the_config_class(tmp_path: Path, model_type: str) -> None:
    config = in_text_config(model_type, {})
    assert described(tmp_path, model_type, config) == computed(model_type, config)


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in (*FIXED, *WITH_SLOPE)])
def test_keys_of_the_config_decide_where_the_model_class_reads_them(tmp_path: Path, model_type: str) -> None:
    for key in KEYS:
        for value in ("relu", "gated-gelu", "gated-silu"):
            # Elsewhere no function of transformers is called that.
            said = value if key == "feed_forward_proj" else value.removeprefix("gated-")
            config = in_text_config(model_type, {key: said})
            found = described(tmp_path, model_type, config)
            assert found == computed(model_type, config), (key, said)


@pytest.mark.parametrize("model_type", CLAMPED)
def test_clamps_and_slopes_are_those_of_the_config_class(tmp_path: Path, model_type: str) -> None:
    own = CONFIG_MAPPING[model_type]()
    # Older versions of transformers have these numbers in the code of the model.
    alpha, limit = getattr(own, "swiglu_alpha", 1.702), getattr(own, "swiglu_limit", 7)
    slope = f"swish({alpha:g})" if model_type in WITH_SLOPE else "silu"
    assert with_clamp(tmp_path / "own", model_type, {}) == f"at_most({limit:g}) {slope}"
    slope = "swish(1.5)" if model_type in WITH_SLOPE else "silu"
    config = {"swiglu_limit": 3, "swiglu_alpha": 1.5}
    assert with_clamp(tmp_path / "other", model_type, config) == f"at_most(3) {slope}"


def test_gemma_calls_its_tanh_gelu_gelu(tmp_path: Path) -> None:
    legacy = {"hidden_act": "gelu", "hidden_activation": None}
    assert described(tmp_path, "gemma", legacy) == computed("gemma", legacy) == "gelu_pytorch_tanh"


def test_activations_that_the_code_of_a_model_fixes(tmp_path: Path) -> None:
    from transformers import BloomConfig, MptConfig
    from transformers.activations import ACT2FN
    from transformers.models.bloom.modeling_bloom import BloomMLP
    from transformers.models.mpt.modeling_mpt import MptMLP

    values = torch.linspace(-6, 6, 1001)
    for model_type, module in (
        ("bloom", BloomMLP(BloomConfig(hidden_size=8)).gelu_impl),
        ("mpt", MptMLP(MptConfig(d_model=8)).act),
    ):
        named = described(tmp_path / model_type, model_type, {"activation_function": "relu", "hidden_act": "relu"})
        torch.testing.assert_close(module(values), ACT2FN[named](values), rtol=0, atol=2e-6)


@pytest.mark.parametrize("architecture", STAND_INS, ids=lambda architecture: architecture.name)
def test_a_model_that_stands_in_takes_the_activation_of_the_description(
    tmp_path: Path, architecture: Architecture
) -> None:
    model_type = architecture.model_types[0]
    named = described(tmp_path, model_type, {})
    assert stand_in_config(tmp_path / "model", architecture).hidden_act == named


def test_every_model_type_of_transformers_is_compared() -> None:
    """But for those that the installed version does not have yet."""
    assert set(READ_BY_THE_MODEL) <= set(KNOWN)
    assert set(KNOWN) - set(MODEL_TYPES) <= {one.model_type for one in swept.read()[1]}
