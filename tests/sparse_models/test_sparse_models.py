"""Every family computes in slots what its dense model computes, with the neurons left out that do not fire."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.sparse_models.loading import load_flash_model, load_with_settings
from neuralink_cli.sparse_models.settings import RunSettings
from neuralink_cli.sparse_models.sparse_block import ResidentRows, SparseDown, SparseUp
from neuralink_cli.storage.budget import DramBudget, parse_budget
from neuralink_cli.storage.cache import POLICIES
from tests.runnables import Runnable, RunnableFactory
from tests.tiny_models import ENCODERS, LAYERS, TEXT

# By family: the modules of a layer that hold its gate (or up) and its down projection, written down here again.
MODULES = {
    "opt": ("fc1", "fc2"),
    "gpt2": ("c_fc", "mlp.c_proj"),
    "llama": ("gate_proj", "down_proj"),
    "qwen2": ("gate_proj", "down_proj"),
    "gemma": ("gate_proj", "down_proj"),
    "bert": ("intermediate.dense", "output.dense"),
}
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("opt", {}),
    ("opt", {"dtype": "float16"}),
    ("llama", {"activation": "relu"}),
    ("gpt2", {"activation": "relu", "dtype": "bfloat16"}),
    ("gemma", {"activation": "relu", "shards": True}),
    ("bert", {"activation": "relu"}),
]
CALIBRATED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"active_ratio": 0.3}),
    ("qwen2", {"active_ratio": 0.3, "dtype": "bfloat16", "shards": True}),
    ("gpt2", {"active_ratio": 0.3}),
]
# Sums of these few terms of this size, in another order.
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def names_of(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return ["-".join([family, *map(str, options.values())]) for family, options in cases]


def dense_of(made: Runnable) -> Any:
    kind: Any = AutoModel if made.family in ENCODERS else AutoModelForCausalLM
    with quiet_transformers():
        return kind.from_pretrained(made.model, dtype=torch.float32).eval()


def tokens_of(made: Runnable, count: int = 24) -> torch.Tensor:
    ids: torch.Tensor = AutoTokenizer.from_pretrained(made.model)(TEXT, return_tensors="pt")["input_ids"]
    return ids[:, :count]


def outputs_of(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = model(**inputs)
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found


def go_on(model: Any, ids: torch.Tensor, count: int = 24) -> list[int]:
    with quiet_transformers(), torch.inference_mode():
        output = model.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=-1)
    found: list[int] = output[0].tolist()
    return found


def mask(model: Any, made: Runnable) -> None:
    """Let a dense model compute without the neurons that do not fire: by a few lines that share nothing with ours."""
    index = json.loads((made.layout / "model.flash.json").read_text())
    thresholds = [block["threshold"] for block in index["blocks"]]
    activation = ACT2FN[index["blocks"][0]["activation"]]
    gate, down = MODULES[made.family]
    signals: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        layer = next((int(step) for step in name.split(".") if step.isdigit()), -1)
        if name.endswith(gate):

            def seen(_module: Any, _inputs: Any, output: torch.Tensor, layer: int = layer) -> None:
                signals[layer] = activation(output)

            module.register_forward_hook(seen)
        elif name.endswith(down) and "attention" not in name:

            def masked(_module: Any, inputs: tuple[torch.Tensor, ...], layer: int = layer) -> tuple[torch.Tensor, ...]:
                fires = signals[layer].abs() > thresholds[layer]
                assert fires.any()
                assert not fires.all()
                return (inputs[0] * fires, *inputs[1:])

            module.register_forward_pre_hook(masked)


@pytest.mark.parametrize(("family", "options"), EXACT, ids=names_of(EXACT))
def test_exact_layouts_compute_what_the_dense_model_does(
    runnable: RunnableFactory, family: str, options: dict[str, Any]
) -> None:
    made = runnable(family, **options)
    dense, ids = dense_of(made), tokens_of(made)
    with load_flash_model(made.layout, dram="40%") as model:
        torch.testing.assert_close(outputs_of(model, input_ids=ids), outputs_of(dense, input_ids=ids), **TOLERANCE)
        if family not in ENCODERS:
            assert go_on(model, ids) == go_on(dense, ids)


@pytest.mark.parametrize(("family", "options"), CALIBRATED, ids=names_of(CALIBRATED))
def test_calibrated_layouts_compute_what_the_masked_dense_model_does(
    runnable: RunnableFactory, family: str, options: dict[str, Any]
) -> None:
    made = runnable(family, **options)
    dense, ids = dense_of(made), tokens_of(made)
    whole = outputs_of(dense, input_ids=ids)
    mask(dense, made)
    with load_flash_model(str(made.layout), dram="40%") as model:
        found = outputs_of(model, input_ids=ids)
        torch.testing.assert_close(found, outputs_of(dense, input_ids=ids), **TOLERANCE)
        assert (found - whole).abs().max() > 0.01
        assert go_on(model, ids) == go_on(dense, ids)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_batch_with_padding(runnable: RunnableFactory, family: str) -> None:
    made = runnable(family) if family == "opt" else runnable(family, activation="relu")
    dense, ids = dense_of(made), tokens_of(made, 20).repeat(2, 1)
    attended = torch.ones_like(ids)
    attended[1, :7] = 0
    with load_flash_model(made.layout) as model:
        found, expected = (outputs_of(m, input_ids=ids, attention_mask=attended) for m in (model, dense))
    torch.testing.assert_close(found[attended == 1], expected[attended == 1], **TOLERANCE)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("at_once", [1, 5])
def test_more_firing_neurons_than_fit_are_computed_in_turns(
    runnable: RunnableFactory, family: str, at_once: int
) -> None:
    made = runnable(family) if family == "opt" else runnable(family, active_ratio=0.3)
    ids = tokens_of(made)
    parts = 1 if family == "opt" else 2
    plain, architecture = RunSettings(parse_budget("40%")), find_architecture(family, made.model)
    with load_with_settings(made.layout, plain, architecture) as model:
        expected = outputs_of(model, input_ids=ids)
        before = model.flash.counters.looked_up
    with load_with_settings(made.layout, replace(plain, working_bytes=at_once * parts * 16 * 4), architecture) as model:
        torch.testing.assert_close(outputs_of(model, input_ids=ids), expected, **TOLERANCE)
        # Up and down are then fetched one after the other.
        assert model.flash.counters.looked_up == before * parts


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dram", ["0", "30%", "100%"])
def test_neither_cache_nor_pinned_neurons_change_the_result(runnable: RunnableFactory, policy: str, dram: str) -> None:
    made = runnable("opt", pin_hot=0.1)
    ids = tokens_of(made, 12)
    expected = go_on(dense_of(made), ids)
    with load_flash_model(made.layout, dram=dram, cache=policy, device_profile="nvme") as model:
        assert go_on(model, ids) == expected
        counters = model.flash.counters
        assert model.flash.cache_bytes <= parse_budget(dram).bytes_of(model.flash.flash_bytes)
    # Pinned neurons are there whatever the policy.
    assert (counters.hits > 0) == (dram != "0")
    assert counters.bytes_useful <= counters.bytes_read
    assert 0 < counters.io_seconds < counters.fetch_seconds


def test_everything_in_dram_is_read_once(runnable: RunnableFactory) -> None:
    made = runnable("llama", activation="relu")
    with load_flash_model(made.layout, dram="100%", cache="lru") as model:
        go_on(model, tokens_of(made), 8)
        first = model.flash.counters
        go_on(model, tokens_of(made), 8)
        second = model.flash.counters - first
    assert first.hit_rate < 1
    assert (second.hit_rate, second.reads, second.bytes_read, second.io_seconds) == (1.0, 0, 0, 0.0)


def test_the_dense_matrices_are_nowhere(runnable: RunnableFactory) -> None:
    made = runnable("gemma", activation="relu", shards=True)
    with load_flash_model(made.layout) as model:
        block = model.flash.stores[0].block
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        matrices = [name for name, t in tensors.items() if sorted(t.shape) == sorted((block.neurons, block.hidden))]
        assert len(matrices) == LAYERS
        assert all(name.endswith("gate_proj.weight") for name in matrices)
        kinds = [type(m) for m in model.modules() if isinstance(m, (ResidentRows, SparseUp, SparseDown))]
        assert sorted(map(str, kinds)) == sorted(map(str, [ResidentRows, SparseUp, SparseDown] * LAYERS))
        assert not any(t.is_meta for t in tensors.values())
        # Embedding and head are one tensor, as in the dense model.
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert model.flash.resident_bytes == LAYERS * block.neurons * block.hidden * 4
        assert type(model).__name__ == "GemmaForCausalLM"
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_lower_precision_is_near(runnable: RunnableFactory) -> None:
    made = runnable("llama", activation="relu")
    ids = tokens_of(made)
    expected = outputs_of(dense_of(made), input_ids=ids)
    with load_flash_model(made.layout, dtype="bfloat16") as model:
        found = outputs_of(model, input_ids=ids)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.15)


def test_threads_may_share_a_model(runnable: RunnableFactory) -> None:
    made = runnable("llama", active_ratio=0.3)
    ids = tokens_of(made, 40)
    with load_flash_model(made.layout, dram="20%") as model:
        starts = range(0, 32, 2)
        expected = [outputs_of(model, input_ids=ids[:, k : k + 8]) for k in starts]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda k: outputs_of(model, input_ids=ids[:, k : k + 8]), starts))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_models_of_one_layout_do_not_mind_each_other(runnable: RunnableFactory) -> None:
    made = runnable("opt")
    ids = tokens_of(made)
    with load_flash_model(made.layout) as first, load_flash_model(made.layout, dram="100%") as second:
        assert go_on(first, ids) == go_on(second, ids)
        first.close()
        first.close()
        assert go_on(second, ids)[:24] == ids[0].tolist()


def test_a_closed_model_does_not_run(runnable: RunnableFactory) -> None:
    made = runnable("opt")
    with load_flash_model(made.layout, dram="0") as model:
        pass
    with pytest.raises(ValueError, match="closed"):
        outputs_of(model, input_ids=tokens_of(made))


def test_the_generation_config_is_that_of_the_checkpoint(runnable: RunnableFactory) -> None:
    made = runnable("opt", generation_config='{"max_new_tokens": 3, "eos_token_id": 1, "pad_token_id": 0}')
    with load_flash_model(made.layout) as model, quiet_transformers():
        assert model.generate(tokens_of(made), eos_token_id=-1).shape[1] == 24 + 3


def test_it_cannot_be_saved_without_its_weights(runnable: RunnableFactory, tmp_path: Path) -> None:
    with (
        load_flash_model(runnable("opt").layout) as model,
        pytest.raises(UnsupportedError, match=r"cannot be saved; get its checkpoint with `neuralink restore`"),
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_its_precision_can_be_changed(runnable: RunnableFactory) -> None:
    made = runnable("llama", activation="relu")
    ids = tokens_of(made)
    with load_flash_model(made.layout) as model:
        expected = outputs_of(model, input_ids=ids)
        torch.testing.assert_close(outputs_of(model.double(), input_ids=ids).float(), expected, **TOLERANCE)


def test_the_head_sees_states_without_gaps(runnable: RunnableFactory) -> None:
    """On some processors torch would copy all weights of the head for those of the last token of several."""
    made = runnable("llama", active_ratio=0.3)
    seen = []
    with load_flash_model(made.layout) as model:
        model.get_output_embeddings().register_forward_pre_hook(lambda _, states: seen.append(states[0].stride()))
        model(input_ids=tokens_of(made), logits_to_keep=1)
        hidden = model.config.hidden_size
    assert [stride[-2:] for stride in seen] == [(hidden, 1)]
    assert seen[0][0] == hidden, "there is a gap between the last tokens of two texts"


def test_the_package_imports_torch_only_when_used() -> None:
    script = (
        "import sys, neuralink_cli.sparse_models.settings, neuralink_cli.sparse_models.neuron_store;"
        "from neuralink_cli.runtime import session;"
        "from neuralink_cli.sparse_models import loading, flash_weights;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_budget_needs_no_text(runnable: RunnableFactory) -> None:
    made = runnable("opt")
    settings = RunSettings(DramBudget(fraction=0.5))
    with load_with_settings(made.layout, settings, find_architecture("opt", made.model)) as model:
        assert 0 < model.flash.cache_bytes <= model.flash.flash_bytes / 2
