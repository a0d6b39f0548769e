"""Checkpoints that come quantised through all stages: FP8 with block scales, and packed codes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_random_placement
from tests.cli.conftest import Neuralink
from tests.scaled import FP8, PACKED4, mxfp4_gpt_oss, quantised_copy
from tests.tiny_models import TEXT

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_from_fp8_to_text(neuralink: Neuralink, tmp_path: Path) -> None:
    quantised_copy(EXAMPLES / "tiny-relu", tmp_path / "model", FP8)
    trace, placement, layout = (tmp_path / name for name in ("t.safetensors", "p.safetensors", "layout"))
    text = EXAMPLES / "text/heldout.txt"
    formats = ("--weights", "q8_0", "--resident", "gate")
    for command in (
        ("profile", tmp_path / "model", "--dataset", text, "--max-tokens", 600, "-o", trace),
        ("cluster", trace, "-o", placement, "--effort", "fast", *formats),
        ("relayout", tmp_path / "model", "--placement", placement, "-o", layout, *formats),
    ):
        done = neuralink(*command, "-q")
        assert done.code == 0, done.stderr
    verified = neuralink("verify", tmp_path / "model", layout, "--forward", "--text", text, "--json", "-q")
    assert verified.code == 0, verified.stderr
    forward = json.loads(verified.stdout)["forward"]
    assert abs(forward["perplexity_increase"]) < 0.01
    assert 0 < forward["mean_kl"] < 0.001
    # What runs is the layout's model, not codes without their scales.
    run = neuralink(
        "run", layout, "--prompt", "The river", "--perplexity", text, "--perplexity-tokens", 300, "--json", "-q"
    )
    assert run.code == 0, run.stderr
    refused = neuralink("relayout", tmp_path / "model", "--placement", placement, "-o", tmp_path / "out", "-q")
    assert refused.code == 4
    assert "use --weights and --dense-weights with q8_0" in refused.error


def test_packed_codes_to_text(neuralink: Neuralink, tmp_path: Path) -> None:
    quantised_copy(EXAMPLES / "tiny-relu", tmp_path / "model", PACKED4, (1, 32))
    placement = write_random_placement(tmp_path / "model", tmp_path / "placement")
    formats = ("--weights", "q4_0", "--resident", "gate")
    command = ("relayout", tmp_path / "model", "--placement", placement, "-o", tmp_path / "layout", *formats, "-q")
    done = neuralink(*command)
    assert done.code == 0, done.stderr
    verified = neuralink("verify", tmp_path / "model", tmp_path / "layout", "-q")
    assert verified.code == 0, verified.stderr
    text = EXAMPLES / "text/heldout.txt"
    ran = neuralink("run", tmp_path / "layout", "--perplexity", text, "--perplexity-tokens", 300, "--json", "-q")
    assert ran.code == 0, ran.stderr
    # The source has 52.5 on more of the text; a model with weights left out is beyond 500.
    assert json.loads(ran.stdout)["perplexity"]["value"] < 80


def test_profile_says_what_packed_codes_need(
    neuralink: Neuralink, tmp_path: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised_copy(EXAMPLES / "tiny-relu", tmp_path / "model", PACKED4, (1, 32))
    find = importlib.util.find_spec

    def without_it(name: str, *more: Any) -> Any:
        return None if name == "compressed_tensors" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without_it)
    done = neuralink("profile", tmp_path / "model", "--dataset", EXAMPLES / "text/heldout.txt", "-o", outputs / "t")
    assert done.code == 7
    assert done.stderr.endswith("package of that name; pip install compressed-tensors\n")
    assert not any(outputs.iterdir())


def test_gpt_oss_from_mxfp4_to_text(neuralink: Neuralink, tmp_path: Path) -> None:
    _, model, _ = mxfp4_gpt_oss(tmp_path)
    trace, placement, layout = (tmp_path / name for name in ("t.safetensors", "p.safetensors", "layout"))
    (tmp_path / "text.txt").write_text(TEXT)
    formats = ("--weights", "down=q8_0", "--resident", "gate")
    for command in (
        ("profile", model, "--dataset", tmp_path / "text.txt", "--active-ratio", 0.3, "-o", trace),
        ("cluster", trace, "-o", placement, "--min-tokens", 20, "--effort", "fast", *formats),
        ("relayout", model, "--placement", placement, "-o", layout, *formats),
    ):
        done = neuralink(*command, "-q")
        assert done.code == 0, done.stderr
    verified = neuralink("verify", model, layout, "--forward", "--text", tmp_path / "text.txt", "--json", "-q")
    assert verified.code == 0, verified.stderr
    forward = json.loads(verified.stdout)["forward"]
    assert abs(forward["perplexity_increase"]) < 0.01
    # A layout with gate and up exchanged would have 0.4.
    assert 0 < forward["mean_kl"] < 0.02
    ran = neuralink(
        "run", layout, "--prompt", "The river", "--max-new-tokens", 8, "--perplexity", tmp_path / "text.txt",
        "--perplexity-tokens", 200, "--json", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert neuralink("inspect", layout, "--json").code == 0
    refused = neuralink("restore", layout, "-o", tmp_path / "out", "-q")
    assert (refused.code, "has rounded weights" in refused.error) == (4, True)
    refused = neuralink("relayout", model, "--placement", placement, "-o", tmp_path / "out", "-q")
    assert (refused.code, "its weights are quantised" in refused.error) == (4, True)
