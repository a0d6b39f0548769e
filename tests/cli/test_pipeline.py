"""From a transformers model to a layout and back: every supported family, in several dtypes, single and sharded."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from neuralink_cli.architectures.architecture import find_architecture
from neuralink_cli.cli.exit_codes import UNSUPPORTED
from neuralink_cli.evaluation.output_comparison import comparison_batches, run_model
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import files_of
from tests.cli.conftest import Neuralink
from tests.families import FAMILY, LAYERS
from tests.stages import LAYOUTS, MIN_TOKENS, STAGES, TABLE, Stages, generate, make_layouts
from tests.tiny_models import FAMILIES, TEXT

DTYPES = ("float32", "bfloat16", "float16")
# Every family, every dtype, both shardings; not every combination.
COMBINATIONS = [
    ("opt", "bfloat16", True),
    ("llama", "bfloat16", False),
    ("gpt2", "bfloat16", True),
    ("bert", "float16", True),
    *((family, DTYPES[k % 3], k % 2 == 1) for k, family in enumerate(FAMILIES)),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda c: f"{c[0]}-{c[1]}-{'sharded' if c[2] else 'single'}")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    family, dtype, shards = request.param
    stages = make_layouts(family, tmp_path_factory.mktemp(family), dtype=dtype, shards=shards)
    assert (stages.model / "model.safetensors").exists() != shards
    assert set(stages.codes.values()) == {0}
    # What this family had imported need not be searched for garbage either.
    gc.freeze()
    return stages


def test_the_table_in_the_docs_says_what_goes(made: Stages) -> None:
    """The other stages are run by the tests below; of these two the table is the only word."""
    columns = [column.strip() for column in TABLE.read_text().partition("| model type")[2].split("\n")[0].split("|")]
    family = FAMILY[made.family]
    kind = family.renamed or family.model_type
    start = f"| `{kind}` | {'' if made.family == kind else made.family} |"
    row = next(line for line in TABLE.read_text().split("\n") if line.startswith(start))
    said = dict(zip(columns[1:], [cell.strip() for cell in row.split("|")[2:]], strict=True))
    said.pop("", None)
    code = generate(made) if family.task == "causal-lm" else None
    assert code in (None, 0, UNSUPPORTED)
    assert said == {
        "as": "" if made.family == kind else made.family,
        "task": family.task,
        **dict.fromkeys(STAGES, "yes"),
        "run": {None: "", 0: "yes", UNSUPPORTED: "no"}[code],
    }


def outputs_of(stages: Stages, directory: Path) -> list[torch.Tensor]:
    """Logits or hidden states, on the first words of the text or on images."""
    family = FAMILY[stages.family]
    architecture = find_architecture(family.renamed or family.model_type, directory)
    batches = comparison_batches(directory, architecture, TEXT[:200])
    outputs = run_model(directory, batches, architecture, "cpu", "float32", False)
    return [torch.from_numpy(output) for output in outputs]


def test_the_combinations_cover_what_they_must() -> None:
    assert {family for family, _, _ in COMBINATIONS} == set(FAMILIES)
    assert len({(dtype, shards) for _, dtype, shards in COMBINATIONS}) == 6


def test_the_blocks_are_those_of_the_model(made: Stages) -> None:
    family = FAMILY[made.family]
    with Placement(made.placement) as placement:
        assert {block.id: block.neurons for block in placement.info.blocks} == family.neurons
        for block in placement.info.blocks:
            arrays = placement.blocks[block.id]
            assert sorted(arrays.order.tolist()) == list(range(block.neurons))
            assert 0 <= arrays.frequency.max() <= 1
            if ".experts." in block.id and block.tokens < MIN_TOKENS:
                assert arrays.order.tolist() == list(range(block.neurons))
                assert block.order == "original"
            else:
                assert arrays.frequency.max() > 0
    index = json.loads((made.layouts["gate"] / "model.flash.json").read_text())
    roles = ["up", "down"] if family.gated else ["down"]
    assert [[part["role"] for part in block["parts"]] for block in index["blocks"]] == [roles] * len(family.neurons)
    experts = [int(name.rpartition(".")[2]) if ".experts." in name else None for name in family.neurons]
    assert [block["expert"] for block in index["blocks"]] == experts


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_verifies_and_gives_the_model_back(
    neuralink: Neuralink, tmp_path: Path, made: Stages, name: str
) -> None:
    verified = neuralink("verify", made.model, made.layouts[name], "--json", "-q")
    assert verified.code == 0, verified.stderr
    assert json.loads(verified.stdout)["mode"] == "full"
    assert neuralink("restore", made.layouts[name], "-o", tmp_path / "restored", "-q").code == 0
    assert files_of(tmp_path / "restored") == files_of(made.model)


def test_the_permuted_model_computes_the_same(made: Stages) -> None:
    expected, found = (outputs_of(made, directory) for directory in (made.model, made.layouts["permuted"]))
    for before, after in zip(expected, found, strict=True):
        assert before.shape == after.shape
        assert torch.isfinite(before).all()
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_the_permuted_model_is_really_permuted(made: Stages) -> None:
    differing = 0
    for path in made.model.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(made.layouts["permuted"] / path.name, "pt") as after:
            assert before.metadata() == after.metadata() == {"format": "pt"}
            for name in before.keys():  # noqa: SIM118
                differing += not torch.equal(before.get_tensor(name), after.get_tensor(name))
    assert differing >= LAYERS


@pytest.mark.parametrize("name", ["bundled", "gate"])
def test_transformers_does_not_take_a_bundled_layout_for_a_model(made: Stages, name: str) -> None:
    # The ones that come with code of their own are not even looked at without it.
    kind: type[Exception] = OSError
    complaint = r"model\.safetensors|no file named"
    if FAMILY[made.family].renamed is not None:
        kind, complaint = (ValueError, "trust_remote_code")
    with quiet_transformers(), pytest.raises(kind, match=complaint):
        AutoModel.from_pretrained(made.layouts[name])


@pytest.mark.parametrize("made", [("llama", "bfloat16", False), ("bert", "float16", True)], indirect=True)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_compares_what_the_models_compute(neuralink: Neuralink, made: Stages, name: str) -> None:
    before = files_of(made.layouts[name].parent)
    outcome = neuralink(
        "verify", made.model, made.layouts[name], "--forward", "--text", made.model.parent / "text.txt", "--json", "-q"
    )
    assert outcome.code == 0, outcome.stderr
    figures = json.loads(outcome.stdout)["forward"]
    assert figures["tokens"] > 50
    assert figures["max_abs_difference"] <= 1e-5 * figures["reference_scale"]
    assert figures["same_argmax"] == 1
    assert files_of(made.layouts[name].parent) == before
