"""Recall of rounded rows that decide firing: measured before a layout is written, stated in its index."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.architectures.find_blocks import find_blocks
from neuralink_cli.calibration.readers import read_token_sequences
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.cli import exit_codes
from neuralink_cli.errors import InputError, OptionError, UnsupportedError
from neuralink_cli.evaluation.gate_recall import rows_of_layout, rows_of_plan
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.layout.plan import RelayoutOptions
from neuralink_cli.layout.recall import MeasureRecall, require_measurable
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.placement.placement import Placement
from neuralink_cli.rewriting.planning import plan_relayout
from neuralink_cli.rewriting.relayout import relayout as relayout_command
from tests.checkpoints import write_random_placement
from tests.cli.conftest import Neuralink, neuralink
from tests.damage import edit
from tests.layouts import relayout, verify
from tests.rewriting.test_rounded_layouts import checkpoint as finite_checkpoint
from tests.scaled import FP8, quantised_copy

__all__ = ["neuralink"]
MODEL = Path(__file__).parent.parent.parent / "examples/tiny-relu"
TEXT = MODEL.parent / "text/heldout.txt"
FLASH, INDEX, CARD = "model.flash.safetensors", "model.flash.json", "README.md"


@pytest.fixture(scope="module")
def placement(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_placement(MODEL, tmp_path_factory.mktemp("recall") / "placement", threshold=0.0)


def firing_by_definition(decoded: dict[str, np.ndarray], sequences: list[np.ndarray]) -> dict[str, Any]:
    """Of every block: neurons that fire, those found, those read; their signal, and what is lost."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    counts = {name: np.zeros(5) for name in decoded}
    for layer, (name, rows) in enumerate(decoded.items()):
        module = model.model.decoder.layers[layer].fc1

        def hook(
            module: Any, inputs: Any, output: Any, rows: np.ndarray = rows, seen: np.ndarray = counts[name]
        ) -> None:
            other = inputs[0].numpy() @ rows.T + module.bias.numpy()
            value = output.numpy()
            missed = (value > 0) & ~(other > 0)
            seen += ((value > 0).sum(), ((value > 0) & (other > 0)).sum(), (other > 0).sum(),
                     value[value > 0].sum(dtype=np.float64), value[missed].sum(dtype=np.float64))  # fmt: skip

        module.register_forward_hook(hook)
    with torch.inference_mode():
        for ids in sequences:
            model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    return counts


def test_the_index_states_what_rounded_rows_let_fire(neuralink: Neuralink, tmp_path: Path, placement: Path) -> None:
    """By the definition, computed here; and nothing else of the layout changes."""
    made = ("--weights", "q4_0", "--rounding", "search", "--resident", "gate")
    plain, layout = tmp_path / "plain", tmp_path / "layout"
    assert neuralink("relayout", MODEL, "--placement", placement, "-o", plain, *made, "-q").code == 0
    asked = ("--recall-text", TEXT, "--recall-tokens", 200)
    told = neuralink("relayout", MODEL, "--placement", placement, "-o", layout, *made, *asked, "-q", "--json")
    assert told.code == 0, told.stderr
    index = json.loads((layout / INDEX).read_text())
    stated = index.pop("gate_recall")
    assert {**index, "document_sha256": ""} == {**json.loads((plain / INDEX).read_text()), "document_sha256": ""}
    assert (layout / FLASH).read_bytes() == (plain / FLASH).read_bytes()

    sequences = read_token_sequences(MODEL, TEXT.read_text(), sequences=2, length=128)
    assert stated["tokens"] == 256
    assert stated["tokens_sha256"] == hashlib.sha256(np.concatenate(sequences).astype("<i4").tobytes()).hexdigest()
    with BundledLayout(layout) as opened:
        decoded = {rows.block.id: rows.read() for rows in rows_of_layout(opened)}
    counts = firing_by_definition(decoded, sequences)
    assert [block["id"] for block in stated["blocks"]] == list(counts) == [f"layers.{i}" for i in range(4)]
    for figures, seen in zip(
        [stated["total"], *stated["blocks"]], [sum(counts.values()), *counts.values()], strict=True
    ):
        assert 0.8 < figures["recall"] < 1
        expected = {"recall": seen[1] / seen[0], "read_ratio": seen[2] / seen[0], "lost_signal": seen[4] / seen[3]}
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-4)

    summary = json.loads(told.stdout)["gate_recall"]
    assert summary["total"] == stated["total"]
    share = f"{stated['total']['recall']:.2%} of the neurons that fire are found"
    assert f"Rounded rows decide which neurons fire: on 256 tokens, {share}" in (layout / CARD).read_text()
    verified = neuralink("verify", MODEL, layout, "--quick", "-q")
    assert f"measured when it was written: on 256 tokens, {share}" in " ".join(verified.stdout.split())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"weights": "q4_0"}),
        ("gpt2", {"weights": "q4_0", "rounding": "search"}),
        ("llama", {"weights": "gate=q8_0,up=q4_0,down=source"}),
        ("llama", {"weights": "gate=iq4_nl", "resident": "gate"}),
    ],
)
def test_rows_are_rounded_as_they_will_be_written(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model, placed = finite_checkpoint(tmp_path, family, "F16")
    same_rows(model, placed, tmp_path / "layout", **options)


def test_rows_with_scales_are_rounded_as_they_will_be_written(tmp_path: Path) -> None:
    quantised_copy(MODEL, tmp_path / "model", FP8, (48, 80))
    placed = write_random_placement(tmp_path / "model", tmp_path / "placement", seed=1)
    same_rows(tmp_path / "model", placed, tmp_path / "layout", weights="q4_0", resident="gate")


def same_rows(model: Path, placed: Path, output: Path, **options: Any) -> None:
    relayout(model, placed, output, **options)
    with Checkpoint(model) as source, Placement(placed) as opened, BundledLayout(output) as layout:
        blocks = find_blocks(source, choose_architecture(describe(source)))
        plan = plan_relayout(source, blocks, opened, RelayoutOptions(**options))
        assert plan.bundled is not None
        before, after = rows_of_plan(plan.bundled, source), rows_of_layout(layout)
        assert [rows.block.id for rows in before] == [block.id for block in layout.index.blocks]
        for ours, theirs in zip(before, after, strict=True):
            assert np.array_equal(ours.read(), theirs.read())


def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(tmp_path: Path, placement: Path) -> None:
    def ran(*_: object) -> Any:
        raise AssertionError("the model ran")

    never = MeasureRecall(lambda plan, checkpoint: 123 << 40, ran)
    for options in (
        RelayoutOptions(),
        RelayoutOptions(layout="permuted"),
        RelayoutOptions(weights="down=q4_0"),
        RelayoutOptions(dense_weights="q8_0"),
    ):
        with pytest.raises(OptionError, match="--recall-text: no rows that decide firing are rounded"):
            relayout_command(MODEL, placement, tmp_path / "out", options, measure_recall=never)
    planned = relayout_command(
        MODEL, placement, tmp_path / "out", RelayoutOptions(weights="q4_0"), measure_recall=never, dry_run=True
    )
    assert planned.gate_recall is None
    # The model that will run takes more than all that writing does.
    assert planned.estimate.memory_bytes == 123 << 40
    assert not (tmp_path / "out").exists()

    with Checkpoint(MODEL) as source, Placement(placement) as opened:
        architecture = choose_architecture(describe(source))
        plan = plan_relayout(source, find_blocks(source, architecture), opened, RelayoutOptions(weights="q4_0")).bundled
        assert plan is not None
        info = opened.info
        require_measurable(plan, info, architecture, "--x")
        images = replace(architecture, task="image-encoder")
        for changed, told in (
            (replace(info, signal="intermediate"), "by the signal 'intermediate'"),
            (replace(info, model={**info.model, "code": "run"}), "code of its own"),
        ):
            with pytest.raises((OptionError, UnsupportedError), match=told):
                require_measurable(plan, changed, architecture, "--x")
        with pytest.raises(UnsupportedError, match="reads images"):
            require_measurable(plan, info, images, "--x")


@pytest.mark.parametrize(
    ("weights", "threshold", "told"), [("q4_0", 0.1, True), ("q4_0", 0.0, False), ("down=q4_0", 0.1, False)]
)
def test_it_is_told_that_recall_can_be_measured(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, weights: str, threshold: float, told: bool
) -> None:
    placed = write_random_placement(MODEL, tmp_path / "placement", threshold=threshold)
    with caplog.at_level("INFO", "neuralink_cli"):
        relayout_command(MODEL, placed, tmp_path / "out", RelayoutOptions(weights=weights), dry_run=True)
    assert ("--recall-text FILE measures what they miss" in caplog.text) == told


def test_a_text_without_firing_neurons_or_tokens_has_no_recall(neuralink: Neuralink, tmp_path: Path) -> None:
    placed = write_random_placement(MODEL, tmp_path / "placement", threshold=1e6)
    command = ("relayout", MODEL, "--placement", placed, "-o", tmp_path / "out", "--weights", "q4_0", "-q")
    silent = neuralink(*command, "--recall-text", TEXT, "--recall-tokens", 1)
    assert silent.code == exit_codes.INPUT
    assert "no neuron fires on the text" in silent.error
    (tmp_path / "empty.txt").write_text("")
    empty = neuralink(*command, "--recall-text", tmp_path / "empty.txt")
    assert empty.code == exit_codes.INPUT
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_told_of(
    neuralink: Neuralink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, placement: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    command = ("relayout", MODEL, "--placement", placement, "-o", tmp_path / "out", "--weights", "q4_0", "-q")
    missing = neuralink(*command, "--recall-text", TEXT)
    assert missing.code == exit_codes.MISSING_DEPENDENCY
    assert "pip install 'neuralink-cli[hf]'" in missing.error


def test_neurons_that_fire_by_another_signal_are_not_measured(tmp_path: Path) -> None:
    model, placed = finite_checkpoint(tmp_path, "llama", "F16")
    relayout(model, placed, tmp_path / "layout", weights="q4_0")
    edit(tmp_path / "layout", "bundled", lambda document: document.update(signal="intermediate"))
    with BundledLayout(tmp_path / "layout") as layout:
        assert rows_of_layout(layout) == ()


def test_recall_of_other_blocks_is_found(tmp_path: Path) -> None:
    model, placed = finite_checkpoint(tmp_path, "llama", "F16")
    relayout(model, placed, tmp_path / "layout", weights="q4_0")
    figures = {"recall": 0.9, "read_ratio": 1.0, "lost_signal": 0.01}

    def state(document: dict[str, Any], named: list[str], **others: int) -> None:
        blocks = [{"id": block, **figures, **others} for block in named]
        document["gate_recall"] = {"tokens": 5, "tokens_sha256": "ab" * 32, "total": figures, "blocks": blocks}

    edit(tmp_path / "layout", "bundled", partial(state, named=["layers.0"]))
    report = verify(model, tmp_path / "layout", quick=True)
    assert report.gate_recall is not None
    assert report.gate_recall.blocks["layers.0"].recall == 0.9
    for ids in (["layers.0", "layers.0"], ["layers.7"], []):
        edit(tmp_path / "layout", "bundled", partial(state, named=ids))
        with pytest.raises(InputError):
            verify(model, tmp_path / "layout", quick=True)
    edit(tmp_path / "layout", "bundled", partial(state, named=["layers.0"], routed=3))
    with pytest.raises(InputError, match="another block with some"):
        verify(model, tmp_path / "layout", quick=True)
