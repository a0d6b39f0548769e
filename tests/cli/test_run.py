"""`neuralink run` on the embedded example: the dense model's tokens, figures on stderr, JSON, and bad input."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuralink_cli.cli.entry import run
from neuralink_cli.models.hf_packages import quiet_transformers
from neuralink_cli.storage.cache import POLICIES
from tests.cli.conftest import Neuralink
from tests.cli.test_help import command_of
from tests.tiny_models import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-relu"
HELD_OUT = EXAMPLES / "text/heldout.txt"
PROMPT = "ROMEO:\nWhat light"
TOKENS = 40


@dataclass(frozen=True)
class Layouts:
    """Layouts of the example: one that can be run, and one that keeps nothing in DRAM."""

    gate: Path
    none: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("tiny")

    def go(*arguments: object) -> None:
        assert run([*map(str, arguments), "-q", "--json"]) == 0

    calibration = ("--dataset", EXAMPLES / "text/calibration.txt", "--max-tokens", 2048, "--num-samples", 0)
    go("profile", MODEL, *calibration, "-o", folder / "trace")
    go("cluster", folder / "trace", "-o", folder / "placement", "--resident", "gate", "--effort", "fast")
    for resident in ("gate", "none"):
        go("relayout", MODEL, "--placement", folder / "placement", "-o", folder / resident, "--resident", resident)
    return Layouts(folder / "gate", folder / "none")


@pytest.fixture(scope="module")
def dense() -> tuple[list[int], str]:
    """The dense model's tokens and text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with quiet_transformers(), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        output = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :]
    return output.tolist(), tokenizer.decode(output, skip_special_tokens=True)


def result_of(neuralink: Neuralink, *arguments: object) -> Any:
    outcome = neuralink("run", *arguments, "--json", "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    return json.loads(outcome.stdout)


def test_the_text_is_the_dense_models_and_the_figures_are_on_stderr(
    neuralink: Neuralink, made: Layouts, dense: tuple[list[int], str]
) -> None:
    outcome = neuralink("run", made.gate, "--prompt", PROMPT, "--max-new-tokens", TOKENS)
    assert outcome.code == 0
    assert outcome.stdout == dense[1] + "\n"
    lines = outcome.stderr.splitlines()
    assert all(line.startswith("neuralink: ") for line in lines)
    assert lines[0].startswith("neuralink: takes about ")
    assert re.search(r"^neuralink: prompt: \d+ tokens in [0-9.]+ s \([0-9.]+ tokens/s\), \d+% of it", lines[1])
    assert re.search(rf"^neuralink: text:   {TOKENS - 1} tokens .*% of them in DRAM, [0-9.]+ reads, ", lines[2])
    assert re.search(r"^neuralink: DRAM: .* of cache and .* of resident rows, for .* in flash; the blocks", lines[3])
    assert lines[3].endswith("; the blocks cover 100 % of the FFN bytes")


@pytest.mark.parametrize("dram", ["2%", "20%", "100%", "0", "100kB"])
def test_the_tokens_do_not_depend_on_the_budget(
    neuralink: Neuralink, made: Layouts, dense: tuple[list[int], str], dram: str
) -> None:
    result = result_of(
        neuralink, made.gate, "--prompt", PROMPT, "--dram", dram, "--max-new-tokens", TOKENS, "--device-profile", "nvme"
    )
    assert result["new_tokens"] == dense[0]
    assert result["text"] == dense[1]
    assert result["exact"] is True
    figures = result["tokens"]
    assert figures["tokens"] == TOKENS - 1
    assert (figures["hit_rate"] > 0) == (dram != "0")
    assert 0 < figures["io_share"] < 1
    assert figures["bytes_useful_per_token"] <= figures["bytes_read_per_token"]
    assert figures["neurons_per_token"] < 4 * 768


def test_a_comparison_with_perplexity(neuralink: Neuralink, made: Layouts, dense: tuple[list[int], str]) -> None:
    arguments = (made.gate, "--prompt", PROMPT, "--max-new-tokens", TOKENS, "--compare", MODEL)
    measured = ("--perplexity", HELD_OUT, "--perplexity-tokens", 300)
    result = result_of(neuralink, *arguments, *measured)
    compared = result["comparison"]
    assert compared["masked"] == compared["dense"]
    assert (compared["masked"]["same"], compared["masked"]["logit_gap"]) == (TOKENS, None)
    assert result["perplexity"]["value"] == pytest.approx(compared["dense_perplexity"]["value"], rel=1e-4)
    assert result["perplexity"]["tokens"] == 300 - 2
    said = neuralink("run", *arguments, *measured).stderr
    assert f"compare: {TOKENS} of {TOKENS} tokens equal the dense model's\n" in said
    assert re.search(r"perplexity: ([0-9.]+) on 298 tokens, dense \1 \([+-]0\.0", said)


def test_the_prompt_may_come_from_a_file(neuralink: Neuralink, made: Layouts, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    found = [
        result_of(neuralink, made.gate, "--max-new-tokens", 4, *prompt)["new_tokens"]
        for prompt in (("--prompt", PROMPT), ("--prompt-file", tmp_path / "prompt.txt"))
    ]
    assert found[0] == found[1]


def test_perplexity_alone(neuralink: Neuralink, made: Layouts) -> None:
    outcome = neuralink("run", made.gate, "--perplexity", HELD_OUT, "--perplexity-tokens", 100)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert re.search(r"perplexity: [0-9.]+ on 99 tokens\n", outcome.stderr)


def test_other_tokens_than_the_dense_model_are_exit_code_1(neuralink: Neuralink, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "opt")
    (tmp_path / "text.txt").write_text("The river rises in the hills above the town and runs past the mill.\n" * 20)
    assert neuralink("profile", model, "--dataset", tmp_path / "text.txt", "-o", tmp_path / "t").code == 0
    assert neuralink("cluster", tmp_path / "t", "-o", tmp_path / "p", "--effort", "fast").code == 0
    layout = tmp_path / "layout"
    assert neuralink("relayout", model, "--placement", tmp_path / "p", "-o", layout, "--resident", "gate").code == 0
    # Bundles that were damaged after the digests were made.
    block = json.loads((layout / "model.flash.json").read_text())["blocks"][0]["bundles"]
    with (layout / "model.flash.safetensors").open("r+b") as file:
        file.seek(block["offset"])
        file.write(bytes(block["bytes"]))
    outcome = neuralink("run", layout, "--prompt", "The river", "--max-new-tokens", 30, "--compare", model, "-q")
    assert outcome.code == 1
    assert re.search(r"layout: token \d+ differs from the dense model's", outcome.stderr)


def test_what_cannot_be_run(neuralink: Neuralink, made: Layouts, tmp_path: Path) -> None:
    def error(code: int, *arguments: object) -> str:
        outcome = neuralink("run", *arguments)
        assert outcome.code == code, outcome.stderr
        return outcome.error

    prompt = ("--prompt", PROMPT)
    assert "`neuralink relayout --resident gate`" in error(2, made.none, *prompt)
    assert "there is nothing to do" in error(2, made.gate)
    assert "cannot be combined" in error(2, made.gate, *prompt, "--prompt-file", tmp_path / "x")
    assert "few for this layout; allow at least" in error(2, made.gate, *prompt, "--dram", "0.01%")
    assert "is not a valid size; write it like 20%, 64MB or 1.5GiB" in error(2, made.gate, *prompt, "--dram", "much")
    assert "--max-new-tokens" in error(2, made.gate, *prompt, "--max-new-tokens", 4000)
    assert "is neither a file nor built in" in error(2, made.gate, *prompt, "--device-profile", "floppy")
    assert "has neither model.flash.json" in error(3, MODEL, *prompt)
    assert "no such directory" in error(3, tmp_path / "absent", *prompt)
    assert "cannot be read (No such file" in error(3, made.gate, "--prompt-file", tmp_path / "absent")
    other = build_model(tmp_path / "other", "opt")
    assert "has fingerprint" in error(5, made.gate, *prompt, "--compare", other)


def test_the_caches_are_those_that_there_are() -> None:
    option = next(parameter for parameter in command_of("run").params if parameter.name == "cache")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(POLICIES)
