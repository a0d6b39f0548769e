"""A checkpoint in FP8 with block scales through all stages."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Neuralink
from tests.scaled import FP8, quantised_copy

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_from_fp8_to_text(neuralink: Neuralink, tmp_path: Path) -> None:
    quantised_copy(EXAMPLES / "tiny-relu", tmp_path / "model", FP8)
    trace, placement, layout = (tmp_path / name for name in ("t.safetensors", "p.safetensors", "layout"))
    text = EXAMPLES / "text/heldout.txt"
    formats = ("--weights", "q8_0", "--resident", "gate")
    for command in (
        ("profile", tmp_path / "model", "--dataset", text, "--max-tokens", 600, "-o", trace),
        ("cluster", trace, "-o", placement, *formats),
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
