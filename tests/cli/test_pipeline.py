"""From a transformers model to a layout and back: every supported family, in several dtypes, single and sharded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from neuralink_cli.activations.hf_packages import quiet_transformers
from neuralink_cli.cli.entry import run
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import files_of
from tests.cli.conftest import Neuralink
from tests.models import ENCODERS, FAMILIES, GATED, LAYERS, NEURONS, TEXT, build_model

# Every family, every dtype, both shardings; not every combination.
COMBINATIONS = [
    ("opt", "float32", False),
    ("opt", "bfloat16", True),
    ("llama", "float16", True),
    ("llama", "bfloat16", False),
    ("mistral", "float32", True),
    ("qwen2", "bfloat16", True),
    ("qwen3", "float16", False),
    ("gemma", "float32", True),
    ("gpt2", "float16", False),
    ("gpt2", "bfloat16", True),
    ("bert", "float32", False),
    ("bert", "float16", True),
    ("roberta", "bfloat16", False),
]
LAYOUTS = {
    "bundled": (),
    "gate": ("--resident", "gate", "--alignment", "512"),
    "permuted": ("--layout", "permuted"),
}


@dataclass(frozen=True)
class Run:
    """A model and everything that was made of it."""

    family: str
    model: Path
    placement: Path
    layouts: dict[str, Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda c: f"{c[0]}-{c[1]}-{'sharded' if c[2] else 'single'}")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Run:
    family, dtype, shards = request.param
    folder = tmp_path_factory.mktemp(family)
    model = build_model(folder / "model", family, dtype=dtype, shards=shards)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    assert (model / "model.safetensors").exists() != shards
    trace, placement = folder / "trace", folder / "placement"

    def go(*arguments: object) -> None:
        assert run([*map(str, arguments), "-q"]) == 0

    ratio = () if family == "opt" else ("--active-ratio", "0.3")
    go("profile", model, "--dataset", text_file, "-o", trace, *ratio)
    go("cluster", trace, "-o", placement)
    for name, options in LAYOUTS.items():
        go("relayout", model, "--placement", placement, "-o", folder / name, *options)
    return Run(family, model, placement, {name: folder / name for name in LAYOUTS})


def outputs_of(run: Run, directory: Path) -> torch.Tensor:
    """Logits, or hidden states of an encoder, on the first words of the text."""
    kind: Any = AutoModel if run.family in ENCODERS else AutoModelForCausalLM
    with quiet_transformers():
        model = kind.from_pretrained(directory, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"][:, :48]
    with torch.inference_mode():
        output = model(input_ids=tokens)
    return output.last_hidden_state if run.family in ENCODERS else output.logits


def test_the_combinations_cover_what_they_must() -> None:
    assert {family for family, _, _ in COMBINATIONS} == set(FAMILIES)
    assert len({(dtype, shards) for _, dtype, shards in COMBINATIONS}) == 6


def test_the_blocks_are_those_of_the_model(made: Run) -> None:
    with Placement(made.placement) as placement:
        assert [block.id for block in placement.info.blocks] == [f"layers.{layer}" for layer in range(LAYERS)]
        for block in placement.blocks.values():
            assert sorted(block.order.tolist()) == list(range(NEURONS[made.family]))
            assert 0 < block.frequency.max() <= 1
    index = json.loads((made.layouts["gate"] / "model.flash.json").read_text())
    roles = ["up", "down"] if made.family in GATED else ["down"]
    assert [[part["role"] for part in block["parts"]] for block in index["blocks"]] == [roles] * LAYERS


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_verifies_and_gives_the_model_back(
    neuralink: Neuralink, tmp_path: Path, made: Run, name: str
) -> None:
    verified = neuralink("verify", made.model, made.layouts[name], "--json", "-q")
    assert verified.code == 0, verified.stderr
    assert json.loads(verified.stdout)["mode"] == "full"
    assert neuralink("restore", made.layouts[name], "-o", tmp_path / "restored", "-q").code == 0
    assert files_of(tmp_path / "restored") == files_of(made.model)


def test_the_permuted_model_computes_the_same(made: Run) -> None:
    expected, found = (outputs_of(made, directory) for directory in (made.model, made.layouts["permuted"]))
    assert expected.shape == found.shape
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_permuted_model_is_really_permuted(made: Run) -> None:
    differing = 0
    for path in made.model.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(made.layouts["permuted"] / path.name, "pt") as after:
            assert before.metadata() == after.metadata() == {"format": "pt"}
            for name in before.keys():  # noqa: SIM118
                differing += not torch.equal(before.get_tensor(name), after.get_tensor(name))
    assert differing >= 2 * LAYERS


@pytest.mark.parametrize("name", ["bundled", "gate"])
def test_transformers_does_not_take_a_bundled_layout_for_a_model(made: Run, name: str) -> None:
    with quiet_transformers(), pytest.raises(OSError, match=r"model\.safetensors|no file named"):
        AutoModel.from_pretrained(made.layouts[name])


@pytest.mark.parametrize("made", [("llama", "bfloat16", False), ("bert", "float16", True)], indirect=True)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_compares_what_the_models_compute(neuralink: Neuralink, made: Run, text_file: Path, name: str) -> None:
    before = files_of(made.layouts[name].parent)
    outcome = neuralink("verify", made.model, made.layouts[name], "--forward", "--text", text_file, "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    figures = json.loads(outcome.stdout)["forward"]
    assert figures["tokens"] > 50
    assert figures["max_abs_difference"] <= 1e-5 * figures["reference_scale"]
    assert figures["same_argmax"] == 1
    assert files_of(made.layouts[name].parent) == before
