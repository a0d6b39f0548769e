"""`neuralink diff` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint, write_random_placement, write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory, Made

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def made(layouts: LayoutFactory) -> Made:
    return layouts.bundled()


@pytest.fixture(scope="module")
def trace(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_trace(made.model, tmp_path_factory.mktemp("trace") / "t.safetensors")


def test_an_order_and_another_one(neuralink: Neuralink, made: Made, trace: Path, tmp_path: Path) -> None:
    other = write_random_placement(made.model, tmp_path / "other", seed=2)
    outcome = neuralink("diff", made.placement, other, "--trace", trace, "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert lines[:3] == [f"A: placement {made.placement}", f"B: placement {other}", "the same model"]
    assert max(len(line) for line in lines[3:]) <= 80
    document = json.loads(neuralink("diff", made.placement, other, "--trace", trace, "--json", "-q").stdout)
    cost = document["cost"]
    ratio = cost["ratio"]
    assert f"A over B: {ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" in outcome.stdout
    assert ratio["value"] == pytest.approx(cost["first_seconds"] / cost["second_seconds"])
    assert cost["device"] == "ufs4.0"
    turned = json.loads(neuralink("diff", other, made.placement, "--trace", trace, "--json", "-q").stdout)
    assert turned["cost"]["ratio"]["value"] == pytest.approx(1 / ratio["value"])
    assert turned["neighbours_kept"] == pytest.approx(document["neighbours_kept"])
    elsewhere = neuralink("diff", other, made.placement, "--trace", trace, "--device", "nvme", "--json", "-q")
    assert json.loads(elsewhere.stdout)["cost"]["device"] == "nvme"


def test_the_same_is_said_to_be_the_same(neuralink: Neuralink, made: Made, trace: Path) -> None:
    for path in (made.layout, made.placement, trace):
        outcome = neuralink("diff", path, path, "-q")
        assert outcome.code == 0
        assert "the same content, as far as digests say" in outcome.stdout


def test_another_model_is_compared_but_not_costed(
    neuralink: Neuralink, made: Made, trace: Path, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", "opt", seed=9)
    stranger = write_random_placement(model, tmp_path / "stranger", seed=1)
    outcome = neuralink("diff", made.placement, stranger, "-q")
    assert outcome.code == 0
    assert "DIFFERENT MODELS" in outcome.stdout
    failed = neuralink("diff", made.placement, stranger, "--trace", trace, "-q")
    assert failed.code == 5
    assert "pass a trace of the same checkpoint" in failed.error


def test_what_does_not_go_together(neuralink: Neuralink, made: Made, trace: Path) -> None:
    def fails(code: int, message: str, *arguments: object) -> None:
        outcome = neuralink("diff", *arguments, "-q")
        assert outcome.code == code
        assert message in outcome.error

    fails(2, "--device needs --trace", made.layout, made.layout, "--device", "nvme")
    fails(2, "but traces have no order", trace, trace, "--trace", trace)
    fails(3, "is a checkpoint, which cannot be compared", made.model, made.layout)
    fails(5, "compare two traces, or two placements or layouts", made.layout, trace)
