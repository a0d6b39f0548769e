"""`verify --forward` computes blocks again as the layout describes them, which may be wrong with every byte right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.cli.exit_codes import MISMATCH, UNSUPPORTED
from tests.checkpoints import blocks_of, write_random_placement
from tests.cli.conftest import Neuralink
from tests.conftest import ModelFactory

EXAMPLE = Path(__file__).parent.parent.parent / "examples/tiny-relu"
GATE, PERMUTED = ("--resident", "gate"), ("--layout", "permuted")
ROUNDED = (*GATE, "--weights", "q8_0")


def described(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A built-in description with something changed in it, as a user's file."""
    folder = resources.files("neuralink_cli.architectures")
    document = json.loads(folder.joinpath(f"descriptions/{name}.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def laid_out(
    neuralink: Neuralink, model: Path, tmp_path: Path, *options: object, activation: str | None = None
) -> Path:
    with Checkpoint(model) as checkpoint:
        blocks = blocks_of(checkpoint)
    if activation is not None:
        blocks = tuple(replace(block, activation=activation) for block in blocks)
    placement = write_random_placement(model, tmp_path / "placement", blocks=blocks)
    done = neuralink("relayout", model, "--placement", placement, "-o", tmp_path / "layout", *options, "-q")
    assert done.code == 0, done.stderr
    return tmp_path / "layout"


def test_a_layout_with_another_activation_is_found_out(
    model: ModelFactory, text_file: Path, tmp_path: Path, neuralink: Neuralink
) -> None:
    wrong = ("--architecture", described("llama", tmp_path, activation={"default": "relu"}))
    layout = laid_out(neuralink, model("llama"), tmp_path, *GATE, *wrong, activation="relu")
    assert neuralink("verify", model("llama"), layout, "-q").code == 0
    for how in ((), wrong):
        refused = neuralink("verify", model("llama"), layout, "--forward", "--text", text_file, *how, "-q")
        assert refused.code == UNSUPPORTED
        assert f"block 'layers.0' computes something else than the layout {layout} says" in refused.error
        assert "with activation 'silu' instead of 'relu' it would agree" in refused.error
    as_json = neuralink("verify", model("llama"), layout, "--forward", "--text", text_file, "--json", "-q")
    assert as_json.code == UNSUPPORTED
    assert json.loads(as_json.stdout)["verified"] is False
    assert "computes something else than the layout" in json.loads(as_json.stdout)["problem"]


@pytest.mark.parametrize("options", [GATE, PERMUTED])
def test_gate_and_up_exchanged(
    model: ModelFactory, text_file: Path, tmp_path: Path, neuralink: Neuralink, options: tuple[str, ...]
) -> None:
    plain = described("phi3", tmp_path)
    [block] = json.loads(plain.read_text())["blocks"]
    exchanged: Mapping[str, Any] = {**block, "gate": block["up"], "up": block["gate"]}
    wrong = ("--architecture", described("phi3", tmp_path, blocks=[exchanged]))
    layout = laid_out(neuralink, model("phi3"), tmp_path, *options, *wrong)
    forward = ("verify", model("phi3"), layout, "--forward", "--text", text_file, "-q")
    same = neuralink(*forward, *wrong)
    assert same.code == UNSUPPORTED
    assert "block 'layers.0' computes something else than" in same.error
    other = neuralink(*forward)
    if options == PERMUTED:
        # Which of the two is the gate makes no difference there.
        assert other.code == 0
    else:
        assert other.code == MISMATCH
        assert "has the weights of block 'layers.0' elsewhere than the model's architecture says" in other.error


@pytest.mark.parametrize(("options", "blocks"), [(PERMUTED, "layers.0, layers.1"), (ROUNDED, "layers.0, layers.3")])
def test_the_summary_says_what_was_computed_again(
    model: ModelFactory,
    text_file: Path,
    tmp_path: Path,
    neuralink: Neuralink,
    options: tuple[str, ...],
    blocks: str,
) -> None:
    source = EXAMPLE if options == ROUNDED else model("qwen2")
    layout = laid_out(neuralink, source, tmp_path, *options)
    command = ("verify", source, layout, "--forward", "--text", text_file)
    said = neuralink(*command, "-q")
    assert said.code == 0, said.stderr
    words = " ".join(said.stdout.split())
    assert words.endswith(f" the model computes what the layout says in the blocks that were computed again: {blocks}")
    stated = json.loads(neuralink(*command, "--json", "-q").stdout)["forward"]["described_blocks"]
    assert ", ".join(stated) == blocks


def test_an_activation_that_nobody_knows_is_not_computed_again(
    model: ModelFactory, text_file: Path, tmp_path: Path, neuralink: Neuralink
) -> None:
    own = ("--architecture", described("llama", tmp_path, activation={"default": "my-own"}))
    layout = laid_out(neuralink, model("llama"), tmp_path, *own, activation="my-own")
    said = neuralink("verify", model("llama"), layout, "--forward", "--text", text_file, *own)
    assert said.code == 0, said.stderr
    assert "  no block could be computed again as the layout describes it\n" in said.stdout
    assert "is not tested: activation 'my-own'" in said.stderr
