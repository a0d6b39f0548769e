"""Tensors in the modules of blocks that no description mentions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neuralink_cli.architectures.architecture import builtin_architectures, find_architecture, parse_architecture
from neuralink_cli.architectures.block_modules import module_patterns
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.inference import infer_architecture
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.errors import UnsupportedError
from tests.checkpoints import HIDDEN, NEURONS, random_tensor, tensors_of, write_checkpoint
from tests.conftest import ModelFactory
from tests.families import FAMILY

# By family: a tensor that is added to its layer 1, and the block that it would belong to.
ADDED = {
    "opt": ("model.decoder.layers.1.fc1.scale", "layers.1"),
    "llama": ("model.layers.1.mlp.ffn_layernorm.weight", "layers.1"),
    "gpt2": ("transformer.h.1.mlp.act.alpha", "layers.1"),
    "bert": ("bert.encoder.layer.1.output.dense.weight_scale", "layers.1"),
}


def refusal(directory: Path) -> str:
    with Checkpoint(directory) as checkpoint, pytest.raises(UnsupportedError) as caught:
        find_blocks(checkpoint, find_architecture(checkpoint.model_type, directory))
    return str(caught.value)


@pytest.mark.parametrize("size", [NEURONS, HIDDEN, 1])
@pytest.mark.parametrize("family", ADDED)
def test_a_tensor_in_the_module_of_a_block_that_is_not_described_is_an_error(
    tmp_path: Path, family: str, size: int
) -> None:
    name, block = ADDED[family]
    tensors = tensors_of(family) | {name: random_tensor(np.random.default_rng(0), "F32", size)}
    told = refusal(write_checkpoint(tmp_path / "model", family, tensors=tensors))
    assert f"tensor {name!r} [{size}] lies in the module of block {block!r}" in told
    assert "under `ignored`" in told


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp_norm.weight",
        "model.layers.2.mlp.norm.weight",
        "model.layers.1.self_attn.mlp.norm.weight",
        "other.layers.1.mlp.norm.weight",
    ],
)
def test_tensors_elsewhere_are_no_concern(tmp_path: Path, name: str) -> None:
    tensors = tensors_of("llama") | {name: random_tensor(np.random.default_rng(0), "F32", NEURONS)}
    with Checkpoint(write_checkpoint(tmp_path / "model", "llama", tensors=tensors)) as checkpoint:
        assert len(find_blocks(checkpoint, find_architecture("llama", tmp_path))) == 2


def test_an_architecture_may_ignore_a_tensor_by_name(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    added = {f"model.layers.{k}.mlp.seen": random_tensor(random, "F32", 1) for k in range(2)}
    directory = write_checkpoint(tmp_path / "model", "llama", tensors=tensors_of("llama") | added)
    assert "'model.layers.0.mlp.seen'" in refusal(directory)
    with Checkpoint(directory) as checkpoint:
        ignoring = replace(find_architecture("llama", tmp_path), ignored=("layers.${layer}.mlp.seen",))
        assert len(find_blocks(checkpoint, ignoring)) == 2
        almost = replace(ignoring, ignored=("layers.${layer}.mlp.see", "layers.${layer}.mlp.seen.weight"))
        with pytest.raises(UnsupportedError, match=r"mlp\.seen"):
            find_blocks(checkpoint, almost)


def with_tensors(source: Path, target: Path, added: Mapping[str, tuple[int, ...]]) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors |= {name: np.ones(shape, np.float32) for name, shape in added.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


# Tensors that a mixture of experts must not have.
IN_MIXTURES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.norm.weight", "layers.0.experts.3"),
    "mixtral-fused": ("model.layers.1.mlp.experts.gate_up_proj_bias", "layers.1.experts.0"),
    "qwen3_moe": ("model.layers.0.mlp.experts.scale", "layers.0.experts.0"),
    "qwen2_moe": ("model.layers.1.mlp.shared_expert.up_proj.bias", "layers.1.shared_expert"),
    "deepseek_v3": ("model.layers.0.mlp.norm.weight", "layers.0"),
    "granitemoe": ("model.layers.1.block_sparse_moe.input_linear.bias", "layers.1.experts.0"),
}


@pytest.mark.parametrize("family", IN_MIXTURES)
def test_experts_may_have_no_other_tensors(model: ModelFactory, tmp_path: Path, family: str) -> None:
    name, block = IN_MIXTURES[family]
    told = refusal(with_tensors(model(family), tmp_path / "model", {name: (5,)}))
    assert f"tensor {name!r} [5] lies in the module of block {block!r}" in told


@pytest.mark.parametrize("family", FAMILY)
def test_every_tensor_of_a_supported_family_is_described(model: ModelFactory, family: str) -> None:
    directory = model(family)
    model_type = FAMILY[family].renamed or FAMILY[family].model_type
    with Checkpoint(directory) as checkpoint:
        built_in = find_blocks(checkpoint, find_architecture(model_type, directory))
        assert [block.id for block in built_in] == list(FAMILY[family].neurons)


@pytest.mark.parametrize("shape", [(HIDDEN,), (1,)])
def test_an_inferred_description_leaves_nothing_out(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.scale"
    tensors = tensors_of("llama") | {name: random_tensor(np.random.default_rng(0), "F32", *shape)}
    config = {"intermediate_size": NEURONS, "architectures": ["LlamaForCausalLM"]}
    directory = write_checkpoint(tmp_path / "model", "llama", tensors=tensors, config=config)
    with Checkpoint(directory) as checkpoint, pytest.raises(UnsupportedError, match=re.escape(f"tensor {name!r}")):
        find_blocks(checkpoint, parse_architecture(infer_architecture(describe(checkpoint)), "inferred"))


MODULES = {
    "opt": [("layers.${layer}.fc1", "layers.${layer}.fc2")],
    "bert": [("encoder.layer.${layer}.intermediate.dense", "encoder.layer.${layer}.output.dense")],
    "llama": [("layers.${layer}.mlp",)],
    "mixtral": [
        ("layers.${layer}.block_sparse_moe.experts.${expert}", "layers.${layer}.block_sparse_moe.experts"),
        ("layers.${layer}.mlp.experts",),
    ],
    "granitemoe": [
        ("layers.${layer}.block_sparse_moe",),
        ("layers.${layer}.block_sparse_moe.experts",),
        ("layers.${layer}.shared_mlp",),
    ],
    "vit": [("encoder.layer.${layer}.intermediate.dense", "encoder.layer.${layer}.output.dense")],
}


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_of_blocks(name: str) -> None:
    architecture = next(found for found in builtin_architectures() if found.name == name)
    assert [module_patterns(pattern) for pattern in architecture.blocks] == MODULES[name]
