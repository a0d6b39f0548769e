"""`neuralink drift` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint, write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import relayout

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with old and new traces."""
    folder = tmp_path_factory.mktemp("drift")
    model = write_checkpoint(folder / "model", "opt")
    write_random_trace(model, folder / "old", seed=0)
    write_random_trace(model, folder / "new", seed=1)
    return folder


@pytest.fixture
def placement(neuralink: Neuralink, folder: Path) -> Path:
    if not (folder / "placement").exists():
        assert neuralink("cluster", folder / "old", "-o", folder / "placement", "-q").code == 0
        relayout(folder / "model", folder / "placement", folder / "flash")
        relayout(folder / "model", folder / "placement", folder / "permuted", layout="permuted")
    return folder / "placement"


def test_says_in_words_what_became_of_the_gain(neuralink: Neuralink, folder: Path, placement: Path) -> None:
    outcome = neuralink("drift", placement, "--trace", folder / "old", "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "120 new tokens (480 that made the order are left out), modelled on ufs4.0; 95%"
    row = next(line for line in lines if line.startswith("gain over the original order")).split("  ")
    assert row[1].strip() == row[2].strip()
    assert "thresholds were calibrated so that 30.00% fire" in lines
    assert "as good as when it was made" in outcome.stdout


def test_layouts_of_all_kinds_have_the_figures_of_their_placement(
    neuralink: Neuralink, folder: Path, placement: Path
) -> None:
    documents = {}
    for name in ("placement", "flash", "permuted"):
        outcome = neuralink("drift", folder / name, "--trace", folder / "new", "--json", "-q")
        assert outcome.code == 0
        documents[name] = json.loads(outcome.stdout)
    assert documents["placement"]["left_out"] == 0
    assert documents["placement"]["gain_then"] is not None
    for key in ("gain", "gain_over_naive", "gain_then", "active_ratio", "moved_most", "tokens", "change"):
        assert documents["flash"][key] == documents["permuted"][key] == documents["placement"][key]
    assert documents["permuted"]["blocks"] == documents["placement"]["blocks"]
    assert all(block["gain_then"] is None for block in documents["flash"]["blocks"])


def test_a_gate_for_continuous_integration(neuralink: Neuralink, folder: Path, placement: Path) -> None:
    arguments = ("drift", folder / "flash", "--trace", folder / "new", "-q")
    gain = json.loads(neuralink(*arguments, "--json").stdout)["gain"]
    assert gain["low"] < gain["value"] < gain["high"]
    assert neuralink(*arguments, "--fail-below", gain["high"]).code == 0
    failed = neuralink(*arguments, "--fail-below", gain["high"] + 0.01)
    assert failed.code == 1
    assert "neurons that fire" in failed.stdout
    assert failed.stderr.startswith(f"neuralink: error: {folder / 'flash'}: the gain has fallen to {gain['value']:.2f}")


def test_reordering_is_measured(neuralink: Neuralink, folder: Path, placement: Path) -> None:
    outcome = neuralink(
        "drift", placement, "--trace", folder / "new", "--reorder", "--effort", "fast", "--jobs", 1, "--json", "-q"
    )
    assert outcome.code == 0
    made = json.loads(outcome.stdout)["reordered"]
    assert (made["order"], made["effort"], made["tokens"]) == ("refined", "fast", 120)
    # Neurons fire in other groups than in the old trace.
    assert made["gain"]["value"] > made["gain_before"]["value"]
    assert made["saving"]["value"] > 1
    table = neuralink("drift", placement, "--trace", folder / "new", "--reorder", "--effort", "fast")
    assert "Ordered again on this trace (refined, effort fast), measured on 120 held-out" in table.stdout
    # Nothing is written, so no disk is needed.
    assert "of memory" in table.stderr
    assert "of disk" not in table.stderr


def test_what_does_not_go_together(neuralink: Neuralink, folder: Path, placement: Path, tmp_path: Path) -> None:
    def fails(code: int, message: str, *arguments: object) -> None:
        outcome = neuralink("drift", *arguments, "-q")
        assert outcome.code == code
        assert message in outcome.error

    fails(2, "--effort is for --reorder", placement, "--trace", folder / "new", "--effort", "max")
    fails(2, "--jobs is for --reorder; pass --reorder too", placement, "--trace", folder / "new", "--jobs", "2")
    fails(3, "is a trace, but only layouts and placements can drift", folder / "old", "--trace", folder / "new")
    fails(3, "is a checkpoint, but only layouts", folder / "model", "--trace", folder / "new")
    fails(3, "absent", placement, "--trace", tmp_path / "absent")
    other = write_checkpoint(tmp_path / "other", "opt", seed=9)
    stranger = write_random_trace(other, tmp_path / "stranger")
    fails(5, "pass a trace of the same checkpoint", placement, "--trace", stranger)
