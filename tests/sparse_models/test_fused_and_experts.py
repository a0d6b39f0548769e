"""Models whose gate and up projection are one tensor, and mixtures of experts, computed from flash.

The oracle is the dense model itself: with ReLU what does not fire is zero, and with a calibrated threshold a few lines
of the definition leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.rewriting.restore import loadable
from neuralink_cli.runtime.session import RunRequest, run_layout
from neuralink_cli.sparse_models.loading import load_flash_model, load_with_settings
from neuralink_cli.sparse_models.settings import GenerationOptions, RunSettings
from neuralink_cli.sparse_models.sparse_block import FusedGateUp
from neuralink_cli.storage.budget import parse_budget
from tests.checkpoints import write_random_placement
from tests.families import FAMILY
from tests.layouts import relayout
from tests.runnables import Runnable, RunnableFactory
from tests.scaled import mxfp4_gpt_oss
from tests.sparse_models.test_sparse_models import TOLERANCE, go_on, outputs_of, tokens_of
from tests.tiny_models import TEXT

FUSED = ["phi3", "glm4"]
# Experts in tensors of their own or stacked, with a shared expert or dense layers beside them, without gates.
EXPERTS = [
    "mixtral", "mixtral-fused", "qwen2_moe", "qwen3_moe", "qwen3_moe-fused", "olmoe", "deepseek_v3", "granitemoe",
    "granitemoeshared", "nemotron_h", "lfm2_moe", "gpt_oss", "minimax_m3_vl_text", "deepseek_v4",
]  # fmt: skip
WITHOUT_ACTIVATION = ("lfm2_moe", "gpt_oss", "minimax_m3_vl_text")
PROMPT = "The river rises in the hills"


def exact(runnable: RunnableFactory, family: str, **options: Any) -> Runnable:
    """A layout of a model with ReLU, or with whatever leaves neurons exactly at zero."""
    own = FAMILY[family].activation[1]
    return runnable(family, activation=own if FAMILY[family].exact else "relu", **options)


def dense_of(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet_transformers():
        # Faster experts than the eager ones accept only some matrix sizes.
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager").eval()


@pytest.mark.parametrize("family", [name for name in (*FUSED, *EXPERTS) if name not in WITHOUT_ACTIVATION])
def test_exact_layouts_compute_what_the_dense_model_does(runnable: RunnableFactory, family: str) -> None:
    made = exact(runnable, family)
    dense, ids = dense_of(made.model), tokens_of(made)
    with load_flash_model(made.layout, dram="40%") as model:
        torch.testing.assert_close(outputs_of(model, input_ids=ids), outputs_of(dense, input_ids=ids), **TOLERANCE)
        assert go_on(model, ids) == go_on(dense, ids)


@pytest.mark.parametrize("family", ["modernbert", "nomic_bert"])
def test_encoders_that_are_fused_or_have_other_names_in_memory(runnable: RunnableFactory, family: str) -> None:
    made = exact(runnable, family)
    with quiet_transformers():
        dense = AutoModel.from_pretrained(made.model, dtype=torch.float32).eval()
    ids = tokens_of(made)
    with load_flash_model(made.layout) as model:
        torch.testing.assert_close(outputs_of(model, input_ids=ids), outputs_of(dense, input_ids=ids), **TOLERANCE)


@pytest.mark.parametrize("family", [*FUSED, *EXPERTS])
def test_calibrated_layouts_are_compared_with_the_masked_dense_model(runnable: RunnableFactory, family: str) -> None:
    made = runnable(family, active_ratio=0.3)
    request = RunRequest(
        made.layout, RunSettings(parse_budget("30%")), prompt=PROMPT, generation=GenerationOptions(max_new_tokens=8),
        compare=made.model, perplexity_text=TEXT, perplexity_tokens=100,
    )  # fmt: skip
    report = run_layout(request)
    assert report.comparison is not None
    assert report.comparison.masked is not None
    assert report.comparison.dense_perplexity is not None
    assert report.comparison.masked.agrees
    assert report.perplexity is not None
    assert abs(report.perplexity.value / report.comparison.dense_perplexity.value - 1) > 1e-4


def test_masked_fused_projections_are_those_of_the_definition(runnable: RunnableFactory) -> None:
    made = runnable("phi3", active_ratio=0.3)
    index = json.loads((made.layout / "model.flash.json").read_text())
    dense, ids = dense_of(made.model), tokens_of(made)
    whole = outputs_of(dense, input_ids=ids)
    for layer, block in zip(dense.model.layers, index["blocks"], strict=True):

        def masked(hidden: torch.Tensor, mlp: Any = layer.mlp, threshold: float = block["threshold"]) -> torch.Tensor:
            gate, up = mlp.gate_up_proj(hidden).split(37, dim=-1)
            signal = torch.nn.functional.silu(gate)
            found: torch.Tensor = mlp.down_proj(signal * up * (signal.abs() > threshold))
            return found

        layer.mlp.forward = masked
    with load_flash_model(made.layout) as model:
        found = outputs_of(model, input_ids=ids)
    torch.testing.assert_close(found, outputs_of(dense, input_ids=ids), **TOLERANCE)
    assert (found - whole).abs().max() > 0.01


# What an expert gives for a state, if only those neurons count whose signal is above the threshold.
Definition = Callable[[Any, int, torch.Tensor, float], torch.Tensor]


def require_masked_experts(made: Runnable, define: Definition) -> None:
    """The layout computes what the model does with experts of the definition, which is not what it does without."""
    index = json.loads((made.layout / "model.flash.json").read_text())
    thresholds = {block["id"]: block["threshold"] for block in index["blocks"]}
    dense, ids = dense_of(made.model), tokens_of(made)
    whole = outputs_of(dense, input_ids=ids)
    for number, layer in enumerate(dense.model.layers):

        def masked(
            states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, experts: Any = layer.mlp.experts,
            number: int = number,
        ) -> torch.Tensor:  # fmt: skip
            rows = []
            for state, numbers, weights in zip(states, chosen.tolist(), shares, strict=True):
                total = torch.zeros_like(state)
                for expert, weight in zip(numbers, weights, strict=True):
                    threshold = thresholds[f"layers.{number}.experts.{expert}"]
                    total = total + weight * define(experts, expert, state, threshold)
                rows.append(total)
            return torch.stack(rows)

        layer.mlp.experts.forward = masked
    with load_flash_model(made.layout) as model:
        found = outputs_of(model, input_ids=ids)
    # float32 has 7 digits, and experts that are clamped at 7 give sums of some 10.
    torch.testing.assert_close(found, outputs_of(dense, input_ids=ids), rtol=1e-5, atol=2e-5)
    assert (found - whole).abs().max() > 0.01


def test_masked_experts_are_those_of_the_definition(runnable: RunnableFactory) -> None:
    def define(experts: Any, expert: int, state: torch.Tensor, threshold: float) -> torch.Tensor:
        gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
        signal = torch.nn.functional.silu(gate)
        found: torch.Tensor = experts.down_proj[expert] @ (signal * up * (signal.abs() > threshold))
        return found

    require_masked_experts(runnable("mixtral", active_ratio=0.3), define)


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("weights", ["q4_0", "gate=q8_0,up=q4_0,down=q8_0"])
def test_rounded_weights_are_those_that_their_bytes_stand_for(
    tmp_path: Path, runnable: RunnableFactory, monkeypatch: pytest.MonkeyPatch, family: str, weights: str
) -> None:
    # Blocks of 32 weights along the hidden size.
    known = FAMILY[family]
    monkeypatch.setitem(FAMILY, family, replace(known, options={**known.options, "hidden_size": 32, "head_dim": 16}))
    made = exact(runnable, family, seed=1, relayout=("--resident", "gate", "--weights", weights))
    ids = tokens_of(made)
    with loadable(made.layout) as decoded:
        dense = dense_of(decoded)
    with load_flash_model(made.layout) as model:
        torch.testing.assert_close(outputs_of(model, input_ids=ids), outputs_of(dense, input_ids=ids), **TOLERANCE)


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_only_what_fires_is_read(runnable: RunnableFactory, family: str) -> None:
    made = exact(runnable, family)
    dense, ids = dense_of(made.model), tokens_of(made, 1)
    with load_flash_model(made.layout, dram="0") as model:
        outputs_of(model, input_ids=ids)
        counters = model.flash.counters
        read = {store.block.id: store.counters.looked_up for store in model.flash.stores}
        stride = model.flash.stores[0].block.stride
    expected: dict[str, int] = {}
    for number, layer in enumerate(dense.model.layers):
        if family == "phi3":

            def fused(_module: Any, _inputs: Any, output: torch.Tensor, name: str = f"layers.{number}") -> None:
                expected[name] = int((output[..., :37] > 0).sum())

            layer.mlp.gate_up_proj.register_forward_hook(fused)
            continue

        def routed(experts: Any, inputs: tuple[torch.Tensor, ...], number: int = number) -> None:
            states, chosen, _ = inputs
            for expert in chosen[0].tolist():
                gate = experts.gate_up_proj[expert][:37] @ states[0]
                expected[f"layers.{number}.experts.{expert}"] = int((gate > 0).sum())

        layer.mlp.experts.register_forward_pre_hook(routed)
    outputs_of(dense, input_ids=ids)
    # Two of four experts hold no token, and are not in it.
    assert {name: count for name, count in read.items() if count} == expected
    assert counters.bytes_useful == sum(expected.values()) * stride
    assert 0 < sum(expected.values()) < 2 * 2 * 37


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_turns_change_nothing(runnable: RunnableFactory, family: str) -> None:
    made = runnable(family, active_ratio=0.3)
    ids, plain = tokens_of(made), RunSettings(parse_budget("40%"))
    found = []
    for settings in (plain, replace(plain, working_bytes=1)):
        with load_with_settings(made.layout, settings, find_architecture(family, made.model)) as model:
            found.append(outputs_of(model, input_ids=ids))
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("family", ["phi3", "mixtral-fused"])
def test_the_dense_matrices_are_nowhere(runnable: RunnableFactory, family: str) -> None:
    made = exact(runnable, family)
    with load_flash_model(made.layout) as model:
        large = [name for name, tensor in model.named_buffers() if tensor.numel() >= 37 * 16 and "embed" not in name]
        sizes = {tensor.numel() for name, tensor in model.named_buffers() if name in large}
        assert sizes == {37 * 16}
        assert len(large) == len(model.flash.stores)
        assert not any("mlp.gate_up" in name or "experts" in name for name, _ in model.named_parameters())
        doubled = model.double()
        assert outputs_of(doubled, input_ids=tokens_of(made)).dtype == torch.float64


def test_up_may_come_before_the_gate() -> None:
    for gate_first in (True, False):
        fused = FusedGateUp(gate_first=gate_first)
        fused.gate.forward = lambda hidden: hidden  # type: ignore[method-assign]
        fused.up.forward = lambda hidden: -hidden  # type: ignore[method-assign]
        values = torch.arange(1.0, 4)
        expected = [1, 2, 3, -1, -2, -3] if gate_first else [-1, -2, -3, 1, 2, 3]
        np.testing.assert_array_equal(fused(values[None])[0], expected)


@pytest.mark.parametrize("weights", ["down=q8_0", "gate=q4_0,up=mxfp4,down=q4_0"])
def test_mxfp4_runs_as_what_it_stands_for(tmp_path: Path, weights: str) -> None:
    """A threshold of 0 lets all fire, so the layout computes what its weights decoded do."""
    _, model, _ = mxfp4_gpt_oss(tmp_path)
    placement = write_random_placement(model, tmp_path / "placement", threshold=0.0)
    relayout(model, placement, tmp_path / "layout", weights=weights, resident="gate")
    with loadable(tmp_path / "layout") as decoded:
        dense = dense_of(decoded)
    ids = torch.arange(3, 43)[None]
    with load_flash_model(tmp_path / "layout", dram="30%") as flash:
        found = outputs_of(flash, input_ids=ids)
    torch.testing.assert_close(found, outputs_of(dense, input_ids=ids), **TOLERANCE)
    assert found.std() > 0.1


def test_masked_experts_of_gpt_oss_are_those_of_the_definition(runnable: RunnableFactory) -> None:
    """With clamps, one added to up, and a bias of down also where nothing fires."""

    def define(experts: Any, expert: int, state: torch.Tensor, threshold: float) -> torch.Tensor:
        both = state @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
        signal = gate * torch.sigmoid(1.702 * gate)
        found: torch.Tensor = ((up + 1) * signal * (signal.abs() > threshold)) @ experts.down_proj[expert]
        return found + experts.down_proj_bias[expert]

    require_masked_experts(runnable("gpt_oss", active_ratio=0.3), define)
