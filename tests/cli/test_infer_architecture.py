"""`--infer-architecture` on tiny models of transformers as if their types were not built in, to the last stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from neuralink_cli.architectures.architecture import is_built_in
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import files_of, write_checkpoint
from tests.cli.conftest import Neuralink
from tests.families import VOCABULARY
from tests.tiny_models import TEXT, build_model

HIDDEN, NEURONS = 16, 37
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_inner": NEURONS,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
}
XGLM = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "ffn_dim": NEURONS, "num_layers": 2, "attention_heads": 2}
EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Kind:
    """A model type, its config, and the parts of its blocks in their order."""

    config: dict[str, Any]
    roles: str
    blocks: tuple[str, ...] = ("layers.0", "layers.1")


def with_experts(*more: str, dense: int = 0, experts: int = 4) -> tuple[str, ...]:
    """Ids of blocks: a dense layer or none, then one of experts."""
    first = [f"layers.{layer}" for layer in range(dense)]
    return (*first, *(f"layers.{layer}.experts.{e}" for layer in range(dense, 2) for e in range(experts)), *more)


KINDS = {
    "olmo2": Kind(USUAL, "gate up down"),
    "gpt_bigcode": Kind(GPT, "up down"),
    "xglm": Kind(XGLM, "up down"),
    "glm": Kind({**USUAL, "head_dim": 8}, "gate up down"),
    "dots1": Kind(
        {**USUAL, **EXPERTS, **GROUPED}, "gate up down", with_experts("layers.1.shared_experts", dense=1)
    ),
    # torch wants rows of experts to be multiples of 16 bytes long.
    "phimoe": Kind({**USUAL, "num_local_experts": 4, "intermediate_size": 36}, "gate up down", with_experts()),
}  # fmt: skip


@pytest.fixture
def nothing_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuralink_cli.architectures.architecture._documents_by_model_type", dict)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model = build_model(tmp_path_factory.mktemp("tokenizer") / "llama", "llama")
    return sorted(model.glob("tokenizer*"))


def build(directory: Path, model_type: str, tokenizer: list[Path]) -> Path:
    config = transformers.AutoConfig.for_model(model_type, **KINDS[model_type].config)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory)
    for file in tokenizer:
        shutil.copy(file, directory)
    return directory


@pytest.mark.usefixtures("nothing_built_in")
@pytest.mark.parametrize("model_type", KINDS)
def test_from_profiling_to_verifying(
    neuralink: Neuralink,
    tmp_path: Path,
    model_type: str,
    text_file: Path,
    tokenizer: list[Path],
    nothing_built_in: None,
) -> None:
    assert not is_built_in(model_type)
    kind = KINDS[model_type]
    model = build(tmp_path / "model", model_type, tokenizer)
    trace, placement = tmp_path / "trace", tmp_path / "placement"
    refused = neuralink("relayout", model, "--placement", placement, "-o", tmp_path / "x")
    assert refused.code != 0

    inferred = neuralink("architectures", "--infer", model)
    assert (inferred.code, inferred.stderr) == (0, "")
    document = json.loads(inferred.stdout)
    assert (document["model_types"], document["task"]) == ([model_type], "causal-lm")
    (tmp_path / "mine.json").write_text(inferred.stdout)

    infer = "--infer-architecture"
    profiled = neuralink(
        "profile", model, "--dataset", text_file, "-o", trace, "--active-ratio", "0.3", infer, "--json"
    )
    assert profiled.code == 0, profiled.stderr
    assert [block["id"] for block in json.loads(profiled.stdout)["blocks"]] == list(kind.blocks)
    assert "please review" in profiled.stderr
    assert inferred.stdout in profiled.stderr
    assert neuralink("cluster", trace, "-o", placement, "--effort", "fast", "-q").code == 0
    with Placement(placement) as made:
        assert made.info.model["architecture"] == document["name"]
        assert [block.id for block in made.info.blocks] == list(kind.blocks)
    for name, options in {"bundled": (), "permuted": ("--layout", "permuted")}.items():
        written = neuralink("relayout", model, "--placement", placement, "-o", tmp_path / name, *options, infer, "-q")
        assert (written.code, written.stderr) == (0, "")
        verified = neuralink(
            "verify", model, tmp_path / name, "--forward", "--text", text_file, infer, "--json", "--tolerance", "1e-4"
        )
        assert verified.code == 0, verified.stderr
        assert json.loads(verified.stdout)["forward"]["same_argmax"] == 1
    assert neuralink("restore", tmp_path / "bundled", "-o", tmp_path / "restored", "-q").code == 0
    assert files_of(tmp_path / "restored") == files_of(model)
    index = json.loads((tmp_path / "bundled" / "model.flash.json").read_text())
    assert {" ".join(part["role"] for part in block["parts"]) for block in index["blocks"]} == {kind.roles}

    by_file = ("--architecture", tmp_path / "mine.json", "-q")
    saved = neuralink("relayout", model, "--placement", placement, "-o", tmp_path / "by-file", *by_file)
    assert saved.code == 0, saved.stderr
    assert files_of(tmp_path / "by-file") == files_of(tmp_path / "bundled")


@pytest.mark.usefixtures("nothing_built_in")
@pytest.mark.parametrize("model_type", ["olmo2", "gpt_bigcode"])
def test_running(
    neuralink: Neuralink,
    tmp_path: Path,
    model_type: str,
    text_file: Path,
    tokenizer: list[Path],
    nothing_built_in: None,
) -> None:
    model = build(tmp_path / "model", model_type, tokenizer)
    trace, placement, layout = tmp_path / "trace", tmp_path / "placement", tmp_path / "layout"
    infer = "--infer-architecture"
    neuralink("profile", model, "--dataset", text_file, "-o", trace, "--active-ratio", "0.5", infer)
    neuralink("cluster", trace, "-o", placement)
    neuralink("relayout", model, "--placement", placement, "-o", layout, "--resident", "gate", infer)
    arguments = ("run", layout, "--prompt", "The river", "--max-new-tokens", "5", "--dram", "50%", "--compare", model)
    unknown = neuralink(*arguments)
    assert f"architecture {model_type!r} is not known" in unknown.error
    ran = neuralink(*arguments, infer, "--json")
    assert ran.code == 0, ran.stderr
    masked = json.loads(ran.stdout)["comparison"]["masked"]
    assert masked["same"] == masked["tokens"] == 5
    assert ran.stderr.count("please review") == 1


def test_a_built_in_type_is_inferred_all_the_same(neuralink: Neuralink, tmp_path: Path) -> None:
    config = {"architectures": ["OPTForCausalLM"], "ffn_dim": 37}
    model = write_checkpoint(tmp_path / "model", config=config)
    outcome = neuralink("architectures", "--infer", model)
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["name"] == "opt"
    assert outcome.stderr == "neuralink: 'opt' is built in: --infer-architecture is not needed, and may know less\n"


def test_a_model_that_cannot_be_inferred(neuralink: Neuralink, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    outcome = neuralink("architectures", "--infer", model, "-q")
    assert outcome.code == 4
    assert "do not fit hidden size 20 and intermediate size 80 of config.json" in outcome.error
    assert "docs/architectures.md" in outcome.error


@pytest.mark.parametrize(
    "command", ["profile M --dataset D -o O", "relayout M --placement P -o O", "verify M L", "run L --prompt x"]
)
@pytest.mark.parametrize("order", [1, -1])
def test_only_one_of_two_says_what_the_architecture_is(neuralink: Neuralink, command: str, order: int) -> None:
    options = [("--architecture", "x.json"), ("--infer-architecture",)][::order]
    outcome = neuralink(*command.split(), *options[0], *options[1])
    assert outcome.error == "--architecture and --infer-architecture both choose the architecture; drop one of them"


def test_a_revision_needs_a_model(neuralink: Neuralink) -> None:
    assert "--infer MODEL" in neuralink("architectures", "--revision", "main").error
