"""Models whose blocks compute something else than their description says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from neuralink_cli.architectures.architecture import find_architecture, read_architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.errors import UnsupportedError
from neuralink_cli.models import loading
from neuralink_cli.profiling import description_check
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from tests.conftest import ModelFactory
from tests.families import FAMILY
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import HIDDEN, build_model, tokenizer_of, write_images

Change = Callable[[Any], object]
_LOAD = loading.load_model


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Something is done to every model that is loaded from now on."""

    def set_change(what: Change) -> None:
        def load(*arguments: Any, **options: Any) -> Any:
            model = _LOAD(*arguments, **options)
            what(model)
            return model

        monkeypatch.setattr(loading, "load_model", load)

    return set_change


def request(directory: Path, text_file: Path, tmp_path: Path, **others: Any) -> ProfileRequest:
    return ProfileRequest(directory, tmp_path / "t", (str(text_file),), active_ratio=0.3, **others)


def refusal(asked: ProfileRequest) -> str:
    with pytest.raises(UnsupportedError, match="computes something else than architecture") as caught:
        profile(asked)
    assert not asked.output.exists()
    return str(caught.value)


class Activation(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.function(values)


def with_activation(function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Every module that has an activation gets another."""

    def apply(model: Any) -> None:
        for module in [m for m in model.modules() if type(m).__module__ != "transformers.activations"]:
            for name in ("act_fn", "activation_fn", "act", "intermediate_act_fn"):
                if hasattr(module, name):
                    setattr(module, name, Activation(function))

    return apply


def clamped(values: torch.Tensor) -> torch.Tensor:
    return functional.silu(values).clamp(max=0.8)


def sparse(values: torch.Tensor) -> torch.Tensor:
    """Gemma 3n's: what lies beyond the mean by 1.645 deviations, 5 % if values are normally distributed."""
    cutoff = values.mean(dim=-1, keepdim=True) + 1.645 * values.std(dim=-1, keepdim=True)
    return functional.silu(functional.relu(values - cutoff))


def normalised(values: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(functional.silu(values), values.shape[-1:])


OTHERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "another function": (functional.gelu, "with activation 'gelu' instead of 'silu' it would agree"),
    "one that is nearly the same": (lambda x: x * torch.sigmoid(1.01 * x), "suspected are an activation other than"),
    "a clamp": (clamped, "one with clamps or a sparsity of its own"),
    "a sparsity": (sparse, "one with clamps or a sparsity of its own"),
    "a norm": (normalised, "a norm or scale inside the block"),
    "a scale": (lambda x: 1.5 * functional.silu(x), "it is 1.5 times as much: a scale inside the block is suspected"),
}


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_else_a_block_computes_is_found_out(
    model: ModelFactory, family: str, what: str, change: Callable[[Change], None], text_file: Path, tmp_path: Path
) -> None:
    function, suspicion = OTHERS[what]
    change(with_activation(function))
    told = refusal(request(model(family), text_file, tmp_path))
    assert "block 'layers.0" in told
    assert suspicion in told


@pytest.mark.parametrize(
    ("family", "own"), [("bert", "gelu"), ("gpt2", "gelu_new"), ("starcoder2", "gelu_pytorch_tanh")]
)
def test_two_kinds_of_gelu_are_told_apart(
    model: ModelFactory, family: str, own: str, change: Callable[[Change], None], text_file: Path, tmp_path: Path
) -> None:
    other = "gelu_pytorch_tanh" if own == "gelu" else "gelu"
    change(with_activation(ACT2FN[other]))
    assert f"with activation {other!r} instead of {own!r}" in refusal(request(model(family), text_file, tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("what", ["another function", "a clamp", "a sparsity", "a norm", "a scale"])
def test_half_precision_hides_none_of_them(
    model: ModelFactory, what: str, dtype: str, change: Callable[[Change], None], text_file: Path, tmp_path: Path
) -> None:
    change(with_activation(OTHERS[what][0]))
    refusal(request(model("llama", dtype=dtype), text_file, tmp_path, dtype=dtype))


def last_of_each_kind(blocks: tuple[FFNBlock, ...]) -> list[FFNBlock]:
    return [found[-1] for found in description_check._first_and_last(blocks)]


@pytest.mark.parametrize("family", FAMILY)
def test_a_scale_in_the_last_block_of_every_kind_is_found_in_every_family(
    model: ModelFactory, family: str, change: Callable[[Change], None], text_file: Path, tmp_path: Path
) -> None:
    """So nothing is left untested: without the scale every family is profiled by other tests."""
    directory = model(family)
    known = FAMILY[family]
    architecture = find_architecture(known.renamed or known.model_type, directory)
    with Checkpoint(directory) as checkpoint:
        blocks = find_blocks(checkpoint, architecture)
        shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
    data = write_images(tmp_path / "images") if known.task == "image-encoder" else text_file
    asked = request(directory, data, tmp_path)
    for block in last_of_each_kind(blocks):

        def scale(loaded: Any, block: FFNBlock = block) -> None:
            [hooked] = hooked_blocks(loaded, [block], shapes, architecture, "intermediate")
            (hooked.module.weight if block.expert is None else hooked.module.down_proj).mul_(1.01)

        change(scale)
        kind = block.id.partition(".experts.")[0]
        assert f"block '{kind}" in refusal(asked)


def test_weights_that_are_read_from_the_disk_for_every_batch(
    model: ModelFactory, change: Callable[[Change], None], text_file: Path, tmp_path: Path
) -> None:
    for family in ("llama", "opt", "mixtral"):
        asked = request(model(family), text_file, tmp_path, max_memory=1, overwrite=True)
        change(lambda _: None)
        profile(replace(asked, output=tmp_path / family))
        change(with_activation(functional.gelu))
        refusal(asked)


def described(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A built-in description with something changed in it, as a user's file."""
    document = json.loads(
        resources.files("neuralink_cli.architectures").joinpath(f"descriptions/{name}.json").read_text()
    )
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_a_description_with_the_wrong_activation(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    file = described("llama", tmp_path, activation={"default": "relu"})
    told = refusal(request(model("llama"), text_file, tmp_path, architecture_file=file))
    assert "with activation 'silu' instead of 'relu' it would agree: correct the description" in told


def test_a_description_with_the_wrong_activation_behind_a_clamp(
    model: ModelFactory, text_file: Path, tmp_path: Path
) -> None:
    file = described("deepseek-v4", tmp_path, activation={"default": "gelu", "at_most": {"config": ["swiglu_limit"]}})
    told = refusal(request(model("deepseek_v4"), text_file, tmp_path, architecture_file=file))
    assert "with activation 'at_most(0.75) silu' instead of 'at_most(0.75) gelu' it would agree" in told


def test_values_that_are_all_too_large_are_a_difference() -> None:
    """Those of some tokens are not: what overflows may do so by rounding."""
    model = torch.ones(3, 4)
    described = model.clone()
    described[1, 2] = torch.inf
    assert description_check._difference(model, described) == 0
    described[:, 0] = torch.inf
    assert description_check._difference(model, described) == torch.inf
    assert description_check._difference(described, model) == torch.inf
    assert description_check._difference(described, described) == 0


@pytest.mark.parametrize("family", ["phi3", "mixtral-fused"])
def test_a_description_with_gate_and_up_exchanged(
    model: ModelFactory, family: str, text_file: Path, tmp_path: Path
) -> None:
    name = family.partition("-")[0]
    blocks = json.loads(described(name, tmp_path).read_text())["blocks"][-1:]
    blocks[0]["gate"], blocks[0]["up"] = blocks[0]["up"], blocks[0]["gate"]
    file = described(name, tmp_path, blocks=blocks)
    told = refusal(request(model(family), text_file, tmp_path, architecture_file=file))
    assert "with gate and up exchanged it would agree: correct the description" in told


def turned_around(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for block in blocks:
        for role in ("gate", "up", "down"):
            if role in block:
                block[role]["neuron_axis"] = 1 - block[role]["neuron_axis"]
    return blocks


@pytest.mark.parametrize(("family", "sizes"), [("llama", None), ("gpt2", {"n_inner": HIDDEN})])
def test_a_description_that_turns_all_matrices_around(
    family: str, sizes: dict[str, int] | None, text_file: Path, tmp_path: Path
) -> None:
    """Their shapes still agree with each other; of square matrices even with those of biases."""
    directory = build_model(tmp_path / "model", family, sizes=sizes)
    blocks = json.loads(described(family, tmp_path).read_text())["blocks"]
    file = described(family, tmp_path, blocks=turned_around(blocks))
    kind = "Conv1D" if family == "gpt2" else "Linear"
    with pytest.raises(UnsupportedError, match=f"as its module is a {kind}, .* as architecture '{family}' says"):
        profile(request(directory, text_file, tmp_path, architecture_file=file))


def test_a_description_that_turns_the_matrices_of_experts_around(
    model: ModelFactory, text_file: Path, tmp_path: Path
) -> None:
    directory = model("mixtral")
    blocks = json.loads(described("mixtral", tmp_path).read_text())["blocks"][:1]
    file = described("mixtral", tmp_path, blocks=turned_around(blocks))
    with pytest.raises(UnsupportedError, match=r"has 37 neurons in the model, and 16 as described; .*neuron_axis"):
        profile(request(directory, text_file, tmp_path, architecture_file=file))
    # Where nothing is recorded, the comparison itself finds it.
    architecture = read_architecture(file)
    with Checkpoint(directory) as checkpoint:
        found = find_blocks(checkpoint, architecture)
        shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
    loaded = loading.load_model(directory, architecture, device="cpu")
    told = r"block 'layers\.0\.experts\.\d' takes 16 values of a token, but architecture 'mixtral' says 37; .*axis"
    with (
        pytest.raises(UnsupportedError, match=told),
        description_check.DescriptionCheck(loaded, directory, found, shapes, architecture),
        torch.no_grad(),
    ):
        loaded(input_ids=torch.arange(3, 19)[None])


def bitnet(directory: Path) -> Path:
    from transformers import BitNetConfig, BitNetForCausalLM

    torch.manual_seed(0)
    config = BitNetConfig(
        hidden_size=16, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=320, max_position_embeddings=64, hidden_act="silu", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    BitNetForCausalLM(config).save_pretrained(directory)
    tokenizer_of("llama").save_pretrained(directory)
    return directory


def test_the_norm_inside_the_blocks_of_bitnet(text_file: Path, tmp_path: Path) -> None:
    """By the name of its tensor, and by what it does if the description says that the tensor does nothing."""
    directory = bitnet(tmp_path / "bitnet")
    asked = request(directory, text_file, tmp_path)
    with pytest.raises(
        UnsupportedError, match=r"'model\.layers\.0\.mlp\.ffn_sub_norm\.weight' \[37\] lies in the module"
    ):
        profile(replace(asked, architecture_file=described("llama", tmp_path)))
    file = described("llama", tmp_path, ignored=["layers.${layer}.mlp.ffn_sub_norm.weight"])
    assert "a norm or scale inside the block" in refusal(replace(asked, architecture_file=file))


def test_an_activation_that_transformers_does_not_know_is_not_tested_and_it_says_so(
    model: ModelFactory, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = described("llama", tmp_path, activation={"default": "my-own"})
    asked = request(model("llama"), text_file, tmp_path, architecture_file=file, signal="intermediate")
    profile(asked)
    assert "whether the model computes what the architecture says is not tested: activation 'my-own'" in caplog.text


def test_nothing_is_computed_twice_after_the_first_batch(
    model: ModelFactory, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    compare = description_check.DescriptionCheck._compare

    def spy(self: Any, block: FFNBlock, rows: torch.Tensor, result: torch.Tensor) -> None:
        assert len(rows) <= description_check.ROWS
        compared.append(block.id)
        compare(self, block, rows, result)

    monkeypatch.setattr(description_check.DescriptionCheck, "_compare", spy)
    profile(request(model("qwen2_moe"), text_file, tmp_path, batch_size=1, max_seq_length=16))
    assert len(compared) == 3
    assert [block.rstrip("0123456789") for block in sorted(compared)] == [
        "layers.", "layers.1.experts.", "layers.1.shared_expert",
    ]  # fmt: skip


def test_a_block_that_does_not_run_as_a_module_is_not_tested_and_it_says_so(
    model: ModelFactory,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(description_check.DescriptionCheck, "_watch", lambda *_: None)
    profile(request(model("llama"), text_file, tmp_path))
    assert "block 'layers.0' did not run as a module" in caplog.text


def test_biases_of_dense_layers_and_shared_experts_are_described(text_file: Path, tmp_path: Path) -> None:
    directory = build_model(tmp_path / "model", "deepseek_v2", sizes={"mlp_bias": True})
    with Checkpoint(directory) as checkpoint:
        blocks = find_blocks(checkpoint, find_architecture("deepseek_v2", directory))
    biased = [block.id for block in blocks if all(part.bias for part in block.parts)]
    assert biased == ["layers.0", "layers.1.shared_experts"]
    assert len(profile(request(directory, text_file, tmp_path)).blocks) == len(blocks)


def gpt_oss_described(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = described("gpt-oss", tmp_path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def one_after_the_other(document: dict[str, Any]) -> None:
    for block in document["blocks"]:
        for role in ("gate", "up"):
            del block[role]["share"]["alternating"]


# What is wrong in the description, and what gives it away.
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no clamp of the gate": (lambda d: d["activation"].pop("at_most"), "one with clamps"),
    "no clamp of up": (lambda d: d["up_values"].pop("limit"), "one with clamps"),
    "nothing added": (lambda d: d["up_values"].pop("plus"), "one with clamps"),
    "up values as they are": (lambda d: d.pop("up_values"), "one with clamps"),
    "another slope": (
        lambda d: d["activation"].update(slope={"default": 1}),
        "with activation 'at_most(7) quick_gelu' instead of 'at_most(7) swish(1)' it would agree",
    ),
    "another limit": (lambda d: d["activation"].update(at_most={"default": 6.5}), "one with clamps"),
    "gate and up one after the other": (one_after_the_other, "one with clamps"),
    "no bias of down": (lambda d: [block["down"].pop("bias") for block in d["blocks"]], ""),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_descriptions_of_gpt_oss(model: ModelFactory, what: str, text_file: Path, tmp_path: Path) -> None:
    change, suspicion = WRONG[what]
    asked = request(model("gpt_oss"), text_file, tmp_path, architecture_file=gpt_oss_described(tmp_path, change))
    if what == "no bias of down":
        # Found by its name already: an order could scramble what nobody speaks of.
        with pytest.raises(UnsupportedError, match=r"down_proj_bias' .* lies in the module of block"):
            profile(asked)
        return
    assert suspicion in refusal(asked)


def test_the_description_of_gpt_oss_is_right(model: ModelFactory, text_file: Path, tmp_path: Path) -> None:
    asked = request(
        model("gpt_oss"), text_file, tmp_path, architecture_file=gpt_oss_described(tmp_path, lambda _: None)
    )
    assert profile(asked).blocks[0].id == "layers.0.experts.0"
