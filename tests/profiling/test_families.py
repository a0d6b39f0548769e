"""The recorded bits of every family against firing computed by numpy from the checkpoint's own tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoModel

from neuralink_cli.activations.trace import Trace
from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.calibration.options import DEFAULT_SEQUENCE_LENGTH
from neuralink_cli.errors import OptionError
from neuralink_cli.models.loading import load_model
from neuralink_cli.models.tokenizer import load_tokenizer
from tests.conftest import ModelFactory
from tests.families import FAMILY, LAYERS, MAX_POSITIONS
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import ENCODERS, NEURONS, PLAIN, TEXT


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    erf: NDArray[np.float64] = np.vectorize(math.erf)(x / math.sqrt(2))
    return x * 0.5 * (1 + erf)


def gelu_tanh(x: NDArray[np.float64]) -> NDArray[np.float64]:
    tanh: NDArray[np.float64] = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + tanh)


ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "fatrelu": lambda x: np.where(x > 0.05, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


def read_tensors(directory: Path) -> dict[str, NDArray[np.float64]]:
    tensors: dict[str, NDArray[np.float64]] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).double().numpy() for name in file.keys()}  # noqa: SIM118
    return tensors


def mlp_inputs(directory: Path, family: str, layer: int, dtype: str) -> tuple[NDArray[np.float64], list[int]]:
    """What goes into the FFN of a layer for TEXT, each sequence run alone; and the sequence lengths."""
    known = FAMILY[family]
    if known.renamed is None:
        model = AutoModel.from_pretrained(directory, dtype=dtype).eval()
    else:
        model = load_model(directory, find_architecture(known.renamed, directory), device="cpu", dtype=dtype)
    tokenizer = load_tokenizer(directory)
    if family in ENCODERS:
        sequences = [tokenizer(line)["input_ids"] for line in TEXT.split("\n") if line]
        sequences = [ids if len(ids) <= MAX_POSITIONS else ids[: MAX_POSITIONS - 1] + ids[-1:] for ids in sequences]
    else:
        ids = tokenizer(TEXT)["input_ids"]
        length = known.positions or DEFAULT_SEQUENCE_LENGTH
        sequences = [ids[start : start + length] for start in range(0, len(ids), length)]
    seen: list[torch.Tensor] = []
    name = str(known.ffn).replace(".0.", f".{layer}.")
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    inputs = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double().numpy()
    return inputs, [len(ids) for ids in sequences]


def expected_signal(
    directory: Path, family: str, layer: int, dtype: str, signal: str
) -> tuple[NDArray[np.float64], list[int]]:
    x, lengths = mlp_inputs(directory, family, layer, dtype)
    tensors = read_tensors(directory)

    def project(module: str) -> NDArray[np.float64]:
        module = module.replace(".0.", f".{layer}.")
        weight = tensors[module + ".weight"]
        return x @ (weight if family == "gpt2" else weight.T) + tensors.get(module + ".bias", 0.0)

    known = FAMILY[family]
    assert known.weights is not None
    act = ACTIVATIONS[known.activation[1]]
    gate, up = known.weights
    s = act(project(gate or up))
    if gate and signal == "intermediate":
        s = s * (act(project(up)) if family == "turbosparse" else project(up))
    return s, lengths


def check_against_oracle(
    directory: Path, family: str, text_file: Path, output: Path, *, dtype: str, signal: str, margin: float
) -> None:
    ratio = None if FAMILY[family].exact else 0.3
    request = ProfileRequest(directory, output, (str(text_file),), signal, ratio, dtype=dtype, batch_size=3)
    summary = profile(request)
    with Trace(output) as trace:
        assert [block.neurons for block in trace.info.blocks] == [NEURONS[family]] * LAYERS
        for layer, block in enumerate(trace.info.blocks):
            s, lengths = expected_signal(directory, family, layer, dtype, signal)
            assert trace.sequence_lengths.tolist() == lengths
            bits = np.unpackbits(trace.fired(block), axis=1, bitorder="little")
            assert not bits[:, block.neurons :].any()
            fired = bits[:, : block.neurons].astype(bool)
            decided = np.abs(np.abs(s) - block.threshold) > margin
            if block.threshold == 0:
                decided |= s == 0
            # |SiLU| and |GELU| have a peak of their density at their minimum, and a threshold may lie on it.
            assert decided.mean() > (0.99 if dtype == "float32" else 0.7)
            np.testing.assert_array_equal(fired[decided], (np.abs(s) > block.threshold)[decided])
            assert summary.blocks[layer].active_ratio == fired.mean()
            # Of the neurons of a ReLU model half fire, and half of those if both gate and up have to.
            usual = 0.25 if (family, signal) == ("turbosparse", "intermediate") else 0.5
            assert fired.mean() == pytest.approx(usual if ratio is None else ratio, abs=0.1 if ratio is None else 0.05)


@pytest.mark.parametrize("family", PLAIN)
def test_bits_are_those_of_the_checkpoint(model: ModelFactory, family: str, text_file: Path, tmp_path: Path) -> None:
    check_against_oracle(model(family), family, text_file, tmp_path / "t", dtype="float32", signal="gate", margin=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert", "llama", "nemotron", "falcon", "turbosparse", "prosparse"])
def test_intermediate_signal_is_the_input_of_the_down_projection(
    model: ModelFactory, family: str, text_file: Path, tmp_path: Path
) -> None:
    check_against_oracle(
        model(family), family, text_file, tmp_path / "t", dtype="float32", signal="intermediate", margin=1e-5
    )


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "roberta"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_shards(
    model: ModelFactory, family: str, dtype: str, text_file: Path, tmp_path: Path
) -> None:
    directory = model(family, dtype=dtype, shards=True)
    assert (directory / "model.safetensors.index.json").exists()
    margin = 0.015 if dtype == "bfloat16" else 0.004
    check_against_oracle(directory, family, text_file, tmp_path / "t", dtype=dtype, signal="gate", margin=margin)


def test_float32_is_the_default_on_the_cpu(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    profile(ProfileRequest(model("opt", dtype="bfloat16"), tmp_path / "t", (str(text_file),), device="cpu"))
    with Trace(tmp_path / "t") as trace:
        assert trace.info.sources[0].parameters["dtype"] == "float32"
        assert trace.info.blocks[0].part_bytes == {"up": 32, "down": 32}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "mpt", "t5-gated", "mixtral", "phi3"])
def test_a_threshold_of_zero_needs_an_activation_that_is_exactly_zero(
    model: ModelFactory, family: str, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"hardly ever exactly zero.*--active-ratio"):
        profile(ProfileRequest(model(family), tmp_path / "t", (str(text_file),)))


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("signal", ["gate", "intermediate"])
def test_relu_in_a_gated_model_needs_no_threshold(
    model: ModelFactory, activation: str, signal: str, text_file: Path, tmp_path: Path
) -> None:
    request = ProfileRequest(model("llama", activation=activation), tmp_path / "t", (str(text_file),), signal)
    summary = profile(request)
    assert summary.calibration is None
    assert all(block.threshold == 0 and 0.3 < block.active_ratio < 0.7 for block in summary.blocks)
