"""Experts, encoders with decoders, and models of images against what their layouts say of the blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from neuralink_cli.architectures.architecture import Architecture, find_architecture
from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.file_names import FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.errors import MismatchError, UnsupportedError
from neuralink_cli.evaluation.layout_description import LayoutDescription
from neuralink_cli.evaluation.output_comparison import comparison_batches
from neuralink_cli.layout.index import DIGEST_KEY, index_text
from neuralink_cli.models.loading import load_model
from neuralink_cli.models.model_class import TASKS_WITH_HEAD
from neuralink_cli.profiling.hooked_blocks import hooked_blocks
from tests.checkpoints import blocks_of, write_random_placement
from tests.families import FAMILY
from tests.layouts import relayout
from tests.tiny_models import TEXT, build_model

# A layer of rounded weights needs a multiple of 32.
HIDDEN = 32
KINDS: Mapping[str, Mapping[str, Any]] = {
    "bundled": {"alignment": 512},
    "permuted": {"layout": "permuted"},
    "q8_0": {"alignment": 512, "resident": "gate", "weights": "q8_0"},
}
# How many blocks are computed again: one of each kind in the first layer that has it, and one in the last.
FAMILIES = {"mixtral-fused": 2, "qwen2_moe": 3, "deepseek_v3": 3, "gpt_oss": 2, "t5-gated": 4, "vit": 2}

Change = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Running:
    """A model in memory, a layout of each kind, and what the model is run on."""

    family: str
    directory: Path
    architecture: Architecture
    blocks: tuple[FFNBlock, ...]
    model: Any
    inputs: Mapping[str, Any]
    layouts: Mapping[str, Path]

    def compared(self, kind: str) -> tuple[str, ...]:
        """Ids of the blocks that compute what the layout says of them, once the model has run."""
        description = LayoutDescription(self.layouts[kind], self.directory, self.architecture)
        with description.watching(self.model), torch.inference_mode():
            self.model(**self.inputs)
        return description.compared


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Running:
    known, folder = FAMILY[request.param], tmp_path_factory.mktemp(request.param)
    width = "d_model" if known.task == "seq2seq" else "hidden_size"
    dtype = "bfloat16" if request.param == "gpt_oss" else "float32"
    directory = build_model(folder / "model", request.param, dtype=dtype, sizes={width: HIDDEN})
    placement = write_random_placement(directory, folder / "placement")
    layouts = {kind: folder / kind for kind in KINDS}
    for kind, options in KINDS.items():
        relayout(directory, placement, layouts[kind], **options)
    architecture = find_architecture(known.model_type, directory)
    with_head = known.task in TASKS_WITH_HEAD
    model = load_model(directory, architecture, with_head=with_head, device="cpu", dtype="float32")
    batch = comparison_batches(directory, architecture, TEXT)[0]
    with Checkpoint(directory) as checkpoint:
        blocks = blocks_of(checkpoint)
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    return Running(request.param, directory, architecture, blocks, model, inputs, layouts)


def kind_of(block: str) -> str:
    return re.sub("[0-9]+", "", block)


def kind_start(block: FFNBlock) -> str:
    """The id of a block, or of an expert what comes before its number: another of its layer may be computed again."""
    return block.id if block.expert is None else block.id.rpartition(".")[0]


def last_of_each_kind(running: Running) -> list[FFNBlock]:
    return list({kind_of(block.id): block for block in running.blocks}.values())


@pytest.fixture
def changed(running: Running) -> Any:
    """Changes what a layout says of a block for as long as the test runs."""
    before: dict[Path, str] = {}

    def change(kind: str, block: str, what: Change) -> None:
        path = running.layouts[kind] / (PERMUTED_INDEX if kind == "permuted" else FLASH_INDEX)
        before.setdefault(path, path.read_text())
        document = json.loads(before[path])
        del document[DIGEST_KEY]
        what(next(stated for stated in document["blocks"] if stated["id"] == block))
        path.write_text(index_text(document))

    yield change
    for path, text in before.items():
        path.write_text(text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_computed_again_and_agrees(running: Running, kind: str) -> None:
    compared = running.compared(kind)
    assert {*map(kind_of, compared)} == {kind_of(block.id) for block in running.blocks}
    assert len(compared) == FAMILIES[running.family]


@pytest.mark.parametrize("kind", KINDS)
def test_another_activation_of_one_block_is_found(running: Running, changed: Any, kind: str) -> None:
    for block in last_of_each_kind(running):
        changed(kind, block.id, lambda stated: stated.update(activation="relu"))
        with pytest.raises(UnsupportedError, match=f"block '{re.escape(block.id)}' computes something else than"):
            running.compared(kind)


@pytest.mark.parametrize("kind", ["bundled", "q8_0"])
def test_gate_and_up_of_one_block_exchanged(running: Running, changed: Any, kind: str) -> None:
    def exchange(stated: dict[str, Any]) -> None:
        matrices = [*stated["parts"], *(kept for kept in stated["resident"] if kept["kind"] == "rows")]
        gate, up = (next(held for held in matrices if held["role"] == role) for role in ("gate", "up"))
        for key in {"source", "source_start", "source_pitch", "source_lane"} & gate.keys():
            gate[key], up[key] = up[key], gate[key]

    for block in last_of_each_kind(running):
        if block.firing_part.role == "gate":
            changed(kind, block.id, exchange)
            with pytest.raises(MismatchError, match=f"has the weights of block '{re.escape(block.id)}' elsewhere"):
                running.compared(kind)


def test_a_scale_that_nobody_speaks_of(running: Running) -> None:
    with Checkpoint(running.directory) as checkpoint:
        shapes = {name: place.entry.shape for name, place in checkpoint.tensors.items()}
    for block in last_of_each_kind(running):
        [hooked] = hooked_blocks(running.model, [block], shapes, running.architecture, "intermediate")
        weight = hooked.module.weight if block.expert is None else hooked.module.down_proj
        kept = weight.clone()
        with torch.no_grad():
            weight.mul_(1.01)
        with pytest.raises(UnsupportedError, match=f"block '{re.escape(kind_start(block))}.* computes something else"):
            running.compared("bundled")
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("running", ["gpt_oss"], indirect=True)
def test_what_becomes_of_up_in_one_expert(running: Running, changed: Any) -> None:
    """Though others of its layer, of which one is computed again too, are as they are said to be."""
    for block in running.blocks[1:4]:
        changed("bundled", block.id, lambda stated: stated.update(up_values={"limit": 7, "plus": 0}))
        with pytest.raises(UnsupportedError, match=f"block '{re.escape(block.id)}' computes something else"):
            running.compared("bundled")
