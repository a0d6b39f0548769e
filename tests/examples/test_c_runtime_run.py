"""`neuralink run --engine c`: the torch engine's tokens and figures, text as it comes, and errors in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.runtime import c_engine
from tests.cli.conftest import Neuralink
from tests.examples.conftest import CRuntime
from tests.examples.test_c_runtime_models import TINY_RELU, lay_out
from tests.tiny_models import build_model

PROMPT = "ROMEO:\nWhat light"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("tiny_relu"), TINY_RELU, threshold=0.0)


@pytest.fixture
def engine(c_runtime: CRuntime) -> tuple[object, ...]:
    return ("--engine", "c", "--engine-path", c_runtime.fast)


def test_it_gives_what_the_torch_engine_gives(
    neuralink: Neuralink,
    engine: tuple[object, ...],
    layout: Path,
) -> None:
    command = ("run", layout, "--prompt", PROMPT, "--max-new-tokens", 50, "--dram", "15%")
    by_torch = json.loads(neuralink(*command, "--json").stdout)
    outcome = neuralink(*command, *engine, "--compare", TINY_RELU, "--json")
    by_c: dict[str, Any] = json.loads(outcome.stdout)
    # By the frequencies of this random placement half of the neurons fire.
    assert "of bundles: most are read again; --dram 50% would take them" in outcome.stderr
    assert by_c.keys() == by_torch.keys()
    for key in ("coverage", "text", "prompt_tokens", "new_tokens", "exact", "dtype"):
        assert by_c[key] == by_torch[key], key
    for phase in ("prompt", "tokens"):
        assert by_c[phase].keys() == by_torch[phase].keys()
        for key in ("tokens", "neurons_per_token"):
            assert by_c[phase][key] == by_torch[phase][key]
    assert by_c["dram"].keys() == by_torch["dram"].keys()
    assert by_c["dram"]["cache_bytes"] == by_torch["dram"]["cache_bytes"]
    assert by_c["dram"]["peak_bytes"] < 1.05 * by_c["dram"]["planned_bytes"] < by_torch["dram"]["peak_bytes"]
    assert by_c["comparison"]["masked"]["same"] == 50


def test_reads_are_planned_for_a_device(neuralink: Neuralink, engine: tuple[object, ...], layout: Path) -> None:
    command = ("run", layout, "--prompt", PROMPT, "--max-new-tokens", 20, "--dram", "0%", "--json")
    other = ("--device-profile", "oneplus-15r")
    usual, by_c, by_torch = (json.loads(neuralink(*command, *of).stdout) for of in (engine, (*engine, *other), other))
    assert usual["new_tokens"] == by_c["new_tokens"] == by_torch["new_tokens"]
    reads = [of["tokens"]["reads_per_token"] for of in (usual, by_c, by_torch)]
    # The program cuts long reads into pieces.
    assert reads[0] > reads[1] >= reads[2]


def test_the_text_is_that_of_the_json(neuralink: Neuralink, engine: tuple[object, ...], layout: Path) -> None:
    command = ("run", layout, "--prompt", PROMPT, "--max-new-tokens", 30, "--dram", "10MB", *engine)
    spoken = neuralink(*command)
    assert spoken.stdout == json.loads(neuralink(*command, "--json").stdout)["text"] + "\n"
    assert "tokens/s" in spoken.stderr
    assert "in use" in spoken.stderr


def test_sampling_takes_its_options(neuralink: Neuralink, engine: tuple[object, ...], layout: Path) -> None:
    command = ("run", layout, "--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 1.5, *engine, "--json")

    def draw(*options: object) -> Any:
        return json.loads(neuralink(*command, *options).stdout)["new_tokens"]

    assert draw("--seed", 1) == draw("--seed", 1) != draw("--seed", 2)
    assert draw("--seed", -1, "--top-k", 1) == draw("--seed", 3, "--top-p", 0.000001)


def test_text_ends_where_the_generation_config_says(
    neuralink: Neuralink,
    engine: tuple[object, ...],
    tmp_path: Path,
) -> None:
    layout = lay_out(tmp_path, build_model(tmp_path / "model", "llama"), threshold=0.05)
    command = ("run", layout, "--prompt", "The river", "--max-new-tokens", 20, "--dram", "50%", "--json")
    tokens = json.loads(neuralink(*command, *engine).stdout)["new_tokens"]
    (layout / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, tokens[3]]}))
    stopped = [json.loads(neuralink(*command, *of).stdout)["new_tokens"] for of in (engine, ())]
    assert stopped[0] == stopped[1] == tokens[: tokens.index(tokens[3]) + 1]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--dtype", "bfloat16"), "computes in float32, not bfloat16"),
        (("--cache", "lru"), "has no cache 'lru'"),
        (("--dram", "1MB"), "1000000 bytes of memory are too few: this model takes at least"),
        (("--max-new-tokens", 900), "are more than the 256 positions"),
        (("--engine-path", "/nowhere"), "there is no program flash_run"),
        (("--engine-path", TINY_RELU / "README.md"), "cannot be started"),
        (("--engine", "torch"), "--engine-path is for the runtime in C"),
        (("--activations", "int8", "--compare", TINY_RELU), "with rounded activations tokens need not be those"),
    ],
)
def test_what_it_cannot_do_is_an_error(
    neuralink: Neuralink, engine: tuple[object, ...], layout: Path, options: tuple[object, ...], complaint: str
) -> None:
    outcome = neuralink("run", layout, "--prompt", PROMPT, *engine, *options)
    assert complaint in outcome.error


def test_models_that_it_does_not_compute(neuralink: Neuralink, engine: tuple[object, ...], tmp_path: Path) -> None:
    layout = lay_out(tmp_path, build_model(tmp_path / "model", "granite"), threshold=0.05)
    outcome = neuralink("run", layout, "--prompt", PROMPT, "--max-new-tokens", 9, *engine)
    assert 'models of type "granite" are not supported' in outcome.error


def test_a_program_that_was_not_built_is_named(
    neuralink: Neuralink, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_engine, "_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = neuralink("run", layout, "--prompt", PROMPT, "--engine", "c")
    assert "the runtime in C is not built" in outcome.error
    assert "make -C" in outcome.error


@pytest.mark.parametrize(
    ("says", "complaint"),
    [("nonsense", "answered 'nonsense'"), ("token x", "answered 'token x'"), ("", "stopped before it answered")],
)
def test_a_program_that_says_something_else(
    neuralink: Neuralink, layout: Path, tmp_path: Path, says: str, complaint: str
) -> None:
    program = tmp_path / "flash_run"
    program.write_text(f"#!/bin/sh\necho '{says}'\n" if says else "#!/bin/sh\n")
    program.chmod(0o755)
    outcome = neuralink("run", layout, "--prompt", PROMPT, "--engine", "c", "--engine-path", program)
    assert complaint in outcome.error


@pytest.mark.parametrize("weights", [None, "q4_0"])
def test_perplexity_is_that_of_the_torch_engine(
    neuralink: Neuralink, engine: tuple[object, ...], layout: Path, tmp_path: Path, weights: str | None
) -> None:
    """On windows of 256 tokens, the last of which is shorter; in batches, with weights that do not fit in memory."""
    if weights is not None:
        layout = lay_out(tmp_path, TINY_RELU, threshold=0.0, weights=weights, dense_weights="q8_0")
    text = tmp_path / "text.txt"
    text.write_text((TINY_RELU / "README.md").read_text())
    command = ("run", layout, "--perplexity", text, "--perplexity-tokens", 300, "--json")
    by_torch = json.loads(neuralink(*command).stdout)
    by_c = json.loads(neuralink(*command, *engine, "--dram", "10%").stdout)
    assert by_c["perplexity"]["tokens"] == by_torch["perplexity"]["tokens"] == 298
    assert by_c["perplexity"]["value"] == pytest.approx(by_torch["perplexity"]["value"], rel=1e-5)
    assert by_c["text"] is None
    assert by_c.keys() == by_torch.keys()
    assert by_c["dram"]["peak_bytes"] < 1.05 * by_c["dram"]["planned_bytes"]


def test_activations_are_the_programs(neuralink: Neuralink, layout: Path, tmp_path: Path) -> None:
    program = tmp_path / "flash_run"
    program.write_text('#!/bin/sh\necho "error 3 $*"\n')
    program.chmod(0o755)
    command = ("run", layout, "--prompt", PROMPT, "--activations", "int8")
    assert " --activations int8 " in neuralink(*command, "--engine", "c", "--engine-path", program).error
    assert "--activations int8 is for the runtime in C" in neuralink(*command).error


def test_rounded_weights_run_too(
    neuralink: Neuralink,
    engine: tuple[object, ...],
    tmp_path: Path,
) -> None:
    layout = lay_out(tmp_path, TINY_RELU, threshold=0.0, weights="q4_0")
    command = ("run", layout, "--prompt", PROMPT, "--max-new-tokens", 20, "--json")
    assert json.loads(neuralink(*command, *engine).stdout)["text"] == json.loads(neuralink(*command).stdout)["text"]
