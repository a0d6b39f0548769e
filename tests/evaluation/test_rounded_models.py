"""Layouts of rounded weights as models: what `run` computes, and how far it is from the source."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuralink_cli.architectures.choice import choose_architecture
from neuralink_cli.calibration.batches import text_batch
from neuralink_cli.checkpoint.checkpoint import Checkpoint
from neuralink_cli.checkpoint.model_description import describe
from neuralink_cli.cli import exit_codes
from neuralink_cli.errors import InputError, NeuralinkError, OptionError, UnsupportedError, VerificationError
from neuralink_cli.evaluation import model_distance
from neuralink_cli.evaluation.model_distance import ModelDistance, measure_distance
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.rewriting.restore import loadable
from neuralink_cli.runtime.session import RunRequest, run_layout
from neuralink_cli.sparse_models.loading import load_flash_model
from neuralink_cli.sparse_models.settings import RunSettings
from neuralink_cli.storage.budget import parse_budget
from tests.checkpoints import write_random_placement
from tests.cli.conftest import Neuralink, neuralink
from tests.layouts import relayout

__all__ = ["neuralink"]
MODEL = Path(__file__).parent.parent.parent / "examples/tiny-relu"
TEXT = MODEL.parent / "text/heldout.txt"


@pytest.fixture(scope="module")
def placement(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Neurons fire above 0, so that a sparse model computes what the dense one does."""
    return write_random_placement(MODEL, tmp_path_factory.mktemp("rounded") / "placement", threshold=0.0)


@pytest.mark.parametrize("weights", ["q4_0", "up=iq4_nl,down=source"])
def test_a_layout_runs_with_the_weights_that_its_bytes_stand_for(tmp_path: Path, placement: Path, weights: str) -> None:
    relayout(MODEL, placement, tmp_path / "layout", weights=weights, resident="gate")
    ids = torch.arange(5, 69)[None]
    with loadable(tmp_path / "layout") as decoded, quiet_transformers():
        dense = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32).eval()
    with quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with load_flash_model(tmp_path / "layout") as model, torch.inference_mode():
        found, expected, other = (each(input_ids=ids).logits for each in (model, dense, source))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - other).abs().max() > 1e-2


def test_tokens_are_not_compared_with_those_of_other_weights(tmp_path: Path, placement: Path) -> None:
    relayout(MODEL, placement, tmp_path / "layout", weights="q4_0", resident="gate")
    request = RunRequest(tmp_path / "layout", RunSettings(parse_budget("20%")), prompt="The river", compare=str(MODEL))
    with pytest.raises(OptionError, match=r"weights are rounded.*verify --forward"):
        run_layout(request)


def test_forward_measures_and_gates(neuralink: Neuralink, tmp_path: Path, placement: Path) -> None:
    layout, exact = tmp_path / "layout", tmp_path / "exact"
    relayout(MODEL, placement, layout, weights="q4_0")
    relayout(MODEL, placement, exact)
    command = ("verify", MODEL, layout, "--forward", "--text", TEXT, "--forward-tokens", 256, "-q")
    passed = neuralink(*command, "--max-kl", 1, "--max-perplexity-increase", "50%", "--json")
    assert passed.code == 0, passed.stderr
    document = json.loads(passed.stdout)
    assert not document["exact"]
    forward = document["forward"]
    assert forward["tokens"] == 254
    gate = forward["gate"]
    assert 0.8 < gate["recall"] < 1 < gate["read_ratio"] + 0.2 < 1.5
    assert 0 < gate["lost_signal"] < 0.1
    assert 0 < forward["mean_kl"] < forward["p99_kl"]
    assert forward["perplexity_increase"] == pytest.approx(forward["layout_perplexity"] / forward["perplexity"] - 1)
    failed = neuralink(*command, "--max-kl", 1e-6)
    assert failed.code == exit_codes.VERIFICATION
    assert "the mean KL divergence is" in failed.error
    for arguments, told in (
        (("verify", MODEL, layout, "--max-kl", 1), "need --forward"),
        (("verify", MODEL, exact, "--forward", "--text", TEXT, "--max-kl", 1), "for layouts with rounded weights"),
        ((*command, "--max-perplexity-increase", "-3%"), "neither a percentage like 2%"),
    ):
        wrong = neuralink(*arguments)
        assert wrong.code == exit_codes.USAGE
        assert told in wrong.stderr


def test_the_distance_is_that_of_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch, on random logits."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 50, (2, 20))
    logits = {name: random.normal(0, 3, (2, 20, 50)).astype(np.float32) for name in ("a", "b")}
    monkeypatch.setattr(model_distance, "run_model", lambda directory, *_: iter(logits[directory.name]))
    monkeypatch.setattr(model_distance, "saved_without_head", lambda *_: False)
    with Checkpoint(MODEL) as checkpoint:
        architecture = choose_architecture(describe(checkpoint))
    batches = [text_batch(row[None], np.ones((1, 20), dtype=bool)) for row in ids]
    found = measure_distance(Path("a"), Path("b"), batches, architecture)
    a, b = (torch.from_numpy(logits[name][:, :-1].reshape(-1, 50)).double() for name in ("a", "b"))
    target = torch.from_numpy(ids[:, 1:].reshape(-1))
    each = torch.nn.functional.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert found.tokens == 38
    assert found.mean_kl == pytest.approx(float(each.mean()), rel=1e-5)
    assert found.p99_kl == pytest.approx(float(each.quantile(0.99)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(torch.nn.functional.cross_entropy(a, target)), rel=1e-5)
    assert found.layout_perplexity == pytest.approx(math.exp(torch.nn.functional.cross_entropy(b, target)), rel=1e-5)
    assert found.same_first_choice == float((a.argmax(1) == b.argmax(1)).double().mean())


@pytest.mark.parametrize(("broken", "error"), [("a", InputError), ("b", VerificationError)])
def test_outputs_that_are_no_numbers_have_no_distance(
    monkeypatch: pytest.MonkeyPatch, broken: str, error: type[NeuralinkError]
) -> None:
    """Without a limit too. If the source gives none either, its layout is not to blame."""
    logits = {name: np.zeros((1, 20, 50), np.float32) for name in ("a", "b")}
    logits[broken][0, 5, 7] = np.inf
    monkeypatch.setattr(model_distance, "run_model", lambda directory, *_: iter(logits[directory.name]))
    monkeypatch.setattr(model_distance, "saved_without_head", lambda *_: False)
    with Checkpoint(MODEL) as checkpoint:
        architecture = choose_architecture(describe(checkpoint))
    batches = [text_batch(np.arange(20)[None], np.ones((1, 20), dtype=bool))]
    with pytest.raises(error, match="not numbers"):
        measure_distance(Path("a"), Path("b"), batches, architecture)


def test_without_a_head_there_are_no_predictions_to_compare(tmp_path: Path) -> None:
    """Hidden states would be taken for logits."""
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["OPTModel"]}))
    with Checkpoint(MODEL) as checkpoint:
        architecture = choose_architecture(describe(checkpoint))
    with pytest.raises(UnsupportedError, match="is saved without the head that predicts tokens"):
        measure_distance(tmp_path, tmp_path, [], architecture)


def test_what_is_not_a_number_passes_no_limit() -> None:
    lost = ModelDistance(10, 5.0, math.nan, math.nan, math.nan, 0.0)
    lost.check(Path("x"), max_increase=None, max_kl=None)
    with pytest.raises(VerificationError, match="KL"):
        lost.check(Path("x"), max_increase=None, max_kl=1.0)
    with pytest.raises(VerificationError, match="perplexity"):
        lost.check(Path("x"), max_increase=0.02, max_kl=None)
