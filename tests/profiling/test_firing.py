"""What fires: the activations that are no function of a value alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from neuralink_cli.activations.trace import Trace
from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.profiling.firing import firing_rule
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile


def gates(seed: int = 0) -> torch.Tensor:
    return torch.randn(30, 44, generator=torch.Generator().manual_seed(seed)) * torch.arange(30)[:, None]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_a_cut_is_that_of_gemma(share: float) -> None:
    class Own:
        activation_sparsity = share

    values = gates()
    expected = torch.nn.functional.gelu(Gemma3nTextMLP._gaussian_topk(Own(), values), approximate="tanh")
    rule = firing_rule("layers.0", f"gaussian_topk({share}) gelu_pytorch_tanh", "gate")
    assert torch.equal(rule.signal(values), expected)
    assert torch.equal(rule.fires(values, 0.0), expected != 0)
    assert rule.fires(values[1:], 0.0).float().mean() == pytest.approx(1 - share, abs=0.05)


def test_a_cut_before_an_activation_that_is_not_known() -> None:
    with pytest.raises(UnsupportedError, match="is not a function that transformers knows by name"):
        firing_rule("layers.0", "gaussian_topk(0.5) my-own", "gate")


def test_an_activation_with_parameters_needs_the_module_that_has_them() -> None:
    with pytest.raises(UnsupportedError, match=r"'xielu' .* is not a function that transformers knows by"):
        firing_rule("layers.0", "xielu", "gate")
    own = torch.nn.Softplus(beta=3)
    assert torch.equal(firing_rule("layers.0", "xielu", "gate", own).signal(gates()), own(gates()))


def cut_everywhere(source: Path, target: Path, share: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"activation_sparsity_pattern": share}))
    return target


def test_a_model_that_cuts_in_every_layer_needs_no_threshold(
    model: ModelFactory, text_file: Path, tmp_path: Path
) -> None:
    """Without one, what fires is what reaches the down projection."""
    directory = cut_everywhere(model("gemma3n_text"), tmp_path / "cut", [0.7, 0.9])
    found = {}
    for signal in ("gate", "intermediate"):
        request = ProfileRequest(directory, tmp_path / signal, (str(text_file),), signal)
        assert profile(request).calibration is None
        with Trace(tmp_path / signal) as trace:
            found[signal] = [
                np.unpackbits(trace.fired(block), axis=1, bitorder="little") for block in trace.info.blocks
            ]
            assert [block.activation for block in trace.info.blocks] == [
                "gaussian_topk(0.7) gelu_pytorch_tanh",
                "gaussian_topk(0.9) gelu_pytorch_tanh",
            ]
    for gate, intermediate, share in zip(found["gate"], found["intermediate"], (0.7, 0.9), strict=True):
        np.testing.assert_array_equal(gate, intermediate)
        assert gate[:, :44].mean() == pytest.approx(1 - share, abs=0.05)


def test_a_model_that_cuts_in_some_layers_needs_one(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="activation 'gelu_pytorch_tanh' is hardly ever exactly zero"):
        profile(ProfileRequest(model("gemma3n_text"), tmp_path / "t", (str(text_file),)))


def test_an_activation_with_parameters_is_recorded_with_those_of_the_model(
    model: ModelFactory, text_file: Path, tmp_path: Path
) -> None:
    """The input of the down projection is the activated up projection, so both signals are the same."""
    found = []
    for signal in ("gate", "intermediate"):
        profile(ProfileRequest(model("apertus"), tmp_path / signal, (str(text_file),), signal, 0.3))
        with Trace(tmp_path / signal) as trace:
            found.append([trace.fired(block) for block in trace.info.blocks])
    for gate, intermediate in zip(*found, strict=True):
        np.testing.assert_array_equal(gate, intermediate)


def test_a_clamp_and_a_slope_are_those_of_gpt_oss() -> None:
    """Its own code, with an up projection that gives zeros, which become ones."""
    experts = GptOssExperts(GptOssConfig(hidden_size=4, intermediate_size=44, num_local_experts=1, swiglu_limit=7.0))
    values = gates()
    expected = experts._apply_gate(torch.stack((values, torch.zeros_like(values)), dim=-1).flatten(-2))
    rule = firing_rule("layers.0", "at_most(7) swish(1.702)", "gate")
    assert torch.equal(rule.signal(values), expected)
    assert torch.equal(rule.fires(values, 0.2), expected.abs() > 0.2)
    assert (values > 7).sum() > 100


@pytest.mark.parametrize("name", ["at_most(7) my-own", "at_most(7) xielu", "swish(x)", "at_most(7)"])
def test_clamps_and_slopes_of_what_is_not_known(name: str) -> None:
    with pytest.raises(UnsupportedError, match="is not a function that transformers knows by name"):
        firing_rule("layers.0", name, "gate")


def test_a_clamped_relu_fires_where_its_input_is_positive() -> None:
    rule = firing_rule("layers.0", "at_most(6) relu", "gate")
    assert torch.equal(rule.signal(gates()), gates().clamp(0, 6))
    assert torch.equal(rule.fires(gates(), 0.0), gates() > 0)
