from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.architectures.architecture import Architecture, parse_architecture
from neuralink_cli.architectures.blocks import FFNBlock, UpValues, module_of
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.architectures.regions import elements_of
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import InputError, NeuralinkError, UnsupportedError
from tests.checkpoints import HIDDEN, LAYERS, NEURONS, RawTensor, blocks_of, random_tensor, tensors_of, write_checkpoint

# Weight names of layer 1 and their neuron axes, gate | up | down.
EXPECTED = {
    "opt": [("model.decoder.layers.1.fc1.weight", 0), ("model.decoder.layers.1.fc2.weight", 1)],
    "llama": [
        ("model.layers.1.mlp.gate_proj.weight", 0),
        ("model.layers.1.mlp.up_proj.weight", 0),
        ("model.layers.1.mlp.down_proj.weight", 1),
    ],
    "gpt2": [("transformer.h.1.mlp.c_fc.weight", 1), ("transformer.h.1.mlp.c_proj.weight", 0)],
    "bert": [
        ("bert.encoder.layer.1.intermediate.dense.weight", 0),
        ("bert.encoder.layer.1.output.dense.weight", 1),
    ],
}
ACTIVATIONS = {"opt": "relu", "llama": "silu", "gpt2": "gelu_new", "bert": "gelu"}


def blocks(directory: Path, architecture: Architecture | None = None) -> tuple[FFNBlock, ...]:
    with Checkpoint(directory) as checkpoint:
        return blocks_of(checkpoint) if architecture is None else find_blocks(checkpoint, architecture)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("family", EXPECTED)
def test_finds_the_blocks(tmp_path: Path, family: str, dtype: str) -> None:
    found = blocks(write_checkpoint(tmp_path / "model", family, dtype=dtype))
    assert [block.id for block in found] == ["layers.0", "layers.1"]
    block = found[1]
    assert (block.neurons, block.hidden, block.activation) == (NEURONS, HIDDEN, ACTIVATIONS[family])
    assert [(part.weight, part.neuron_axis) for part in block.parts] == EXPECTED[family]
    assert [part.role for part in block.parts] == (["gate"] if family == "llama" else []) + ["up", "down"]
    assert all((part.bias is None) == (family == "llama") for part in block.parts)
    assert block.firing_part is block.parts[0]
    assert block.part("down").role == "down"
    size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
    assert block.bundle_bytes == len(block.parts) * HIDDEN * size
    assert module_of(block.parts[0]) == EXPECTED[family][0][0].removesuffix(".weight")


@pytest.mark.parametrize("family", EXPECTED)
def test_biases_are_optional(tmp_path: Path, family: str) -> None:
    for bias in (False, True):
        for block in blocks(write_checkpoint(tmp_path / str(bias), family, bias=bias)):
            assert [part.bias for part in block.parts] == [
                part.weight.replace(".weight", ".bias") if bias else None for part in block.parts
            ]


def test_names_may_lack_the_prefix_of_the_head(tmp_path: Path) -> None:
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors_of("bert").items()}
    found = blocks(write_checkpoint(tmp_path / "model", "bert", tensors=tensors))
    assert found[0].parts[0].weight == "encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize("layers", [None, 0, -1, True, "2", 2.0])
def test_layers_are_counted_if_the_config_does_not_say(tmp_path: Path, layers: object) -> None:
    model = write_checkpoint(tmp_path / "model", config={"num_hidden_layers": layers})
    assert len(blocks(model)) == LAYERS


def test_the_config_may_name_fewer_layers_than_there_are(tmp_path: Path) -> None:
    assert len(blocks(write_checkpoint(tmp_path / "model", config={"num_hidden_layers": 1}))) == 1


@pytest.mark.parametrize("activation", [None, 3, ["relu"]])
def test_the_activation_has_a_default(tmp_path: Path, activation: object) -> None:
    model = write_checkpoint(tmp_path / "model", config={"activation_function": activation})
    assert {block.activation for block in blocks(model)} == {"relu"}


def custom(**changes: Any) -> Architecture:
    part = {"neuron_axis": 0}
    block = {
        "id": "layers.${layer}",
        "up": {**part, "weight": "${layer}.up"},
        "down": {"neuron_axis": 1, "weight": "${layer}.down"},
    }
    document = {
        "name": "mine", "model_types": ["mine"], "task": "encoder", "prefixes": [""], "activation": {"config": ["act"]},
        "blocks": [block], **changes,
    }  # fmt: skip
    return parse_architecture(document, "mine.json")


def test_an_architecture_of_the_user(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {f"{layer}.up": random_tensor(random, "F16", 6, 4) for layer in range(3)}
    tensors |= {f"{layer}.down": random_tensor(random, "F16", 4, 6) for layer in range(3)}
    model = write_checkpoint(tmp_path / "model", tensors=tensors, config={"model_type": "mine", "act": "relu2"})
    found = blocks(model, custom())
    assert [(block.id, block.neurons, block.hidden, block.activation) for block in found] == [
        (f"layers.{layer}", 6, 4, "relu2") for layer in range(3)
    ]
    with pytest.raises(UnsupportedError, match="architecture 'mine' is not known"):
        blocks(model)


def test_an_activation_without_default_must_be_in_the_config(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {"0.up": random_tensor(random, "F16", 6, 4), "0.down": random_tensor(random, "F16", 4, 6)}
    model = write_checkpoint(tmp_path / "model", tensors=tensors)
    with pytest.raises(InputError, match=r"config.json: does not name the activation \(act\)"):
        blocks(model, custom())


def sparse_layers(tmp_path: Path, layers: tuple[int, ...], **config: Any) -> Path:
    """A checkpoint of which only some layers have an FFN."""
    random = np.random.default_rng(0)
    tensors = {f"{layer}.norm": random_tensor(random, "F16", 4) for layer in range(4)}
    for layer in layers:
        tensors[f"{layer}.up"] = random_tensor(random, "F16", 6, 4)
        tensors[f"{layer}.down"] = random_tensor(random, "F16", 4, 6)
    return write_checkpoint(tmp_path / "model", tensors=tensors, config={"act": "relu2", **config})


@pytest.mark.parametrize("config", [{}, {"depth": 4}, {"depth": 10**9}])
def test_layers_without_an_ffn(tmp_path: Path, config: dict[str, int]) -> None:
    model = sparse_layers(tmp_path, (1, 3), **config)
    described = custom(layers=["depth"], layers_without_blocks=True)
    assert [block.id for block in blocks(model, described)] == ["layers.1", "layers.3"]
    with pytest.raises(InputError, match=r"tensor '0\.up' of architecture 'mine' is missing"):
        blocks(model, custom(layers=["depth"]))


def test_no_layer_has_an_ffn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tensor '0\.up' of architecture 'mine' is missing"):
        blocks(sparse_layers(tmp_path, ()), custom(layers_without_blocks=True))


@pytest.mark.parametrize(
    ("stated", "names"),
    [
        (None, ["relu2"] * 2),
        (0.5, ["gaussian_topk(0.5) relu2"] * 2),
        ([0.95, 0.0], ["gaussian_topk(0.95) relu2", "relu2"]),
        ([0, 0], ["relu2"] * 2),
    ],
)
def test_layers_may_cut_neurons_off(tmp_path: Path, stated: object, names: list[str]) -> None:
    model = sparse_layers(tmp_path, (0, 1), share=stated)
    described = custom(activation={"config": ["act"], "cut": ["share"]})
    assert [block.activation for block in blocks(model, described)] == names


@pytest.mark.parametrize("stated", [1, -0.5, "0.5", True, [0.5], [0.5, 2.0], [0.5, None], {"0": 0.5}])
def test_what_is_cut_off_must_be_a_share(tmp_path: Path, stated: object) -> None:
    model = sparse_layers(tmp_path, (0, 1), share=stated)
    with pytest.raises(InputError, match=r"config\.json: share names no share of neurons for layer [01]$"):
        blocks(model, custom(activation={"config": ["act"], "cut": ["share"]}))


UP, UP_BIAS = "model.decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc1.bias"
DOWN, DOWN_BIAS = "model.decoder.layers.1.fc2.weight", "model.decoder.layers.1.fc2.bias"


def resized(name: str, *shape: int, dtype: str = "F32") -> Callable[[dict[str, RawTensor]], object]:
    return lambda tensors: tensors.update({name: random_tensor(np.random.default_rng(0), dtype, *shape)})


def odd_dtype(name: str, dtype: str, *shape: int, size: int) -> Callable[[dict[str, RawTensor]], object]:
    return lambda tensors: tensors.update({name: RawTensor(dtype, shape, bytes(size))})


WRONG: dict[str, tuple[Callable[[dict[str, RawTensor]], object], type[NeuralinkError], str]] = {
    "first tensor missing": (
        lambda tensors: tensors.pop("model.decoder.layers.0.fc1.weight"),
        InputError,
        "tensor 'model.decoder.layers.0.fc1.weight' of architecture 'opt' is missing",
    ),
    "later tensor missing": (lambda tensors: tensors.pop(UP), InputError, f"tensor {UP!r} is missing"),
    "down missing": (lambda tensors: tensors.pop(DOWN), InputError, f"tensor {DOWN!r} is missing"),
    "vector": (resized(UP, NEURONS), InputError, f"tensor {UP!r} has shape [37], but a matrix is needed"),
    "three axes": (resized(UP, NEURONS, HIDDEN, 1), InputError, "has shape [37, 20, 1], but a matrix is needed"),
    "no neurons": (resized(UP, 0, HIDDEN), InputError, "has shape [0, 20], but a matrix is needed"),
    "other neurons": (
        resized(DOWN, HIDDEN, NEURONS + 1),
        InputError,
        f"tensor {DOWN!r} of shape [20, 38] does not fit {UP!r} of [37, 20]",
    ),
    "transposed": (resized(DOWN, NEURONS, HIDDEN), InputError, f"tensor {DOWN!r} of shape [37, 20] does not fit"),
    "other hidden size": (resized(DOWN, HIDDEN + 1, NEURONS), InputError, "of shape [21, 37] does not fit"),
    "up bias": (resized(UP_BIAS, HIDDEN), InputError, f"tensor {UP_BIAS!r} has shape [20], not [37]"),
    "down bias": (resized(DOWN_BIAS, NEURONS), InputError, f"tensor {DOWN_BIAS!r} has shape [37], not [20]"),
    "bias is a matrix": (resized(UP_BIAS, 1, NEURONS), InputError, f"tensor {UP_BIAS!r} has shape [1, 37], not [37]"),
    "nibbles": (
        odd_dtype(UP, "F4", NEURONS, HIDDEN, size=NEURONS * HIDDEN // 2),
        UnsupportedError,
        f"tensor {UP!r} has dtype F4, whose columns are not whole bytes",
    ),
    "six bits": (
        odd_dtype(DOWN, "F6_E2M3", HIDDEN, NEURONS, size=NEURONS * HIDDEN * 6 // 8),
        UnsupportedError,
        f"tensor {DOWN!r} has dtype F6_E2M3, whose",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(tmp_path: Path, name: str) -> None:
    change, kind, complaint = WRONG[name]
    tensors = tensors_of("opt")
    change(tensors)
    model = write_checkpoint(tmp_path / "model", tensors=tensors)
    with pytest.raises(kind) as caught:
        blocks(model)
    assert type(caught.value) is kind
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(str(model))


def test_refuses_biases_whose_entries_are_not_whole_bytes(tmp_path: Path) -> None:
    tensors = tensors_of("opt", neurons=36)
    tensors[UP_BIAS] = RawTensor("F4", (36,), bytes(18))
    with pytest.raises(UnsupportedError, match=f"tensor '{UP_BIAS}' has dtype F4, whose"):
        blocks(write_checkpoint(tmp_path / "model", tensors=tensors))


def test_a_config_that_names_too_many_layers_is_refused_at_the_first_that_is_missing(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config={"num_hidden_layers": 10**9})
    with pytest.raises(InputError, match=r"tensor 'model.decoder.layers.2.fc1.weight' is missing"):
        blocks(model)


@pytest.mark.parametrize(("per_token", "share"), [(2, 0.5), (4, 1.0), (9, 1.0), (None, 1.0), (0, 1.0)])
def test_the_share_of_tokens_that_an_expert_gets(tmp_path: Path, per_token: int | None, share: float) -> None:
    random = np.random.default_rng(0)
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": random_tensor(random, "F16", *shape)
        for expert in range(4)
        for name, shape in (("w1", (6, 4)), ("w2", (4, 6)), ("w3", (6, 4)))
    }
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_experts_per_tok": per_token}
    found = blocks(write_checkpoint(tmp_path / "model", tensors=tensors, config=config))
    assert [(b.expert.module, b.expert.index, b.expert.share) for b in found if b.expert is not None] == [
        ("model.layers.0.mlp.experts", expert, share) for expert in range(4)
    ]


def test_parts_that_alternate(tmp_path: Path) -> None:
    """Of the second expert: where each neuron's weights and bias are, by numpy's own indexing."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    model = write_checkpoint(tmp_path / "model", "gpt_oss", config={"swiglu_limit": 5, "swiglu_alpha": 1.5})
    with Checkpoint(model) as checkpoint:
        found = blocks_of(checkpoint)
        tensor = np.frombuffer(checkpoint.place(name).file.read(name), np.uint32).reshape(2, HIDDEN, 2 * NEURONS)
        bias = np.frombuffer(checkpoint.place(name).file.read(f"{name}_bias"), np.uint32).reshape(2, -1)
    assert [block.id for block in found][-2:] == ["layers.1.experts.0", "layers.1.experts.1"]
    block = found[-1]
    assert (block.activation, block.up_values) == ("at_most(5) swish(1.5)", UpValues(5.0, 1))
    for role, first in (("gate", 0), ("up", 1)):
        part = block.part(role)
        region, of_bias = block.region(part), block.bias_region(part, "F32")
        data = tensor.view(np.uint8).reshape(-1)
        assert np.array_equal(elements_of(data[region.start : region.stop], region, 4), tensor[1, :, first::2])
        data = bias.view(np.uint8).reshape(-1)
        assert np.array_equal(
            elements_of(data[of_bias.start : of_bias.stop], of_bias, 4), bias[1, first::2].reshape(-1, 1)
        )


@pytest.mark.parametrize("value", ["7", 0, -1, True, float("inf"), [7]])
def test_a_clamp_must_be_a_number_above_0(tmp_path: Path, value: object) -> None:
    model = write_checkpoint(tmp_path / "model", "gpt_oss", config={"swiglu_limit": value})
    with pytest.raises(InputError, match=r"config.json: (swiglu_limit is not a number above 0|.*Infinity)"):
        blocks(model)


def test_rows_that_alternate_do_not_fill_a_tensor_alone(tmp_path: Path) -> None:
    """A description with gate and up from different halves of the columns, one of them alternating."""
    document = json.loads(
        resources.files("neuralink_cli.architectures").joinpath("descriptions/gpt-oss.json").read_text()
    )
    del document["blocks"][0]["up"]["share"]["alternating"]
    architecture = parse_architecture(document, "mine.json")
    with pytest.raises(UnsupportedError, match=r"gate_up_proj.*: its parts"):
        blocks(write_checkpoint(tmp_path / "model", "gpt_oss"), architecture)


@pytest.mark.parametrize("shape", [(1, HIDDEN), (HIDDEN,), (2, 1, HIDDEN), (2, HIDDEN + 1)])
def test_a_bias_of_down_must_have_a_row_for_every_expert(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.1.mlp.experts.down_proj_bias"
    bias = random_tensor(np.random.default_rng(0), "F32", *shape)
    model = write_checkpoint(tmp_path / "model", "gpt_oss", tensors={**tensors_of("gpt_oss"), name: bias})
    with pytest.raises(InputError, match=rf"'{name}' has shape .* which is not {HIDDEN} for each expert"):
        blocks(model)
