"""The runtime in C keeps its promise of memory, and answers damage, cut files and wrong requests with errors."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli import devices
from tests.checkpoints import write_checkpoint, write_random_placement
from tests.damage import FLASH
from tests.examples.conftest import CRuntime
from tests.examples.test_c_runtime_models import TINY_RELU, build, lay_out
from tests.layouts import relayout

NVME = str(resources.files(devices) / "profiles/nvme.json")
INDEX = "model.flash.json"
PROMPT = " ".join(map(str, range(1, 30)))


def go(program: Path, *arguments: object, requests: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *map(str, arguments)], input=requests, capture_output=True, text=True, check=False, timeout=120
    )


def answers(text: str, kind: str) -> list[dict[str, Any]]:
    lines = (line.partition(" ") for line in text.splitlines())
    return [json.loads(rest) for word, _, rest in lines if word == kind]


def answer_after_a_cut(command: list[str], layout: Path, first: str, requests: str) -> str:
    """What the program answers to requests after one that worked, when the file has been cut in between."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(first + "\n")
            process.stdin.flush()
            while not (line := process.stdout.readline()).startswith(("figures ", "logits ")):
                assert line
            with (layout / FLASH).open("r+b") as file:
                file.truncate(1_000_000)
            answer, _ = process.communicate(requests, timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    return answer


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout of some 17 MB of bundles, all of which fire now and then."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 4, "initializer_range": 0.05}
    return lay_out(folder, build(folder / "model", "Llama", "float16", **sizes), threshold=0.03)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layouts with routed experts whose gates are larger than all else that is not in flash."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 3}
    kinds: dict[str, dict[str, int]] = {
        "Mixtral": {"intermediate_size": 768, "num_local_experts": 8, "num_experts_per_tok": 2},
        "Qwen2Moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 512,
                     "shared_expert_intermediate_size": 512},
    }  # fmt: skip
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in kinds}
    return {
        kind: lay_out(folder, build(folder / "model", kind, "float16", **sizes, **kinds[kind]), threshold=0.03)
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return lay_out(folder, build(folder / "model", "Qwen3", "float16", head_dim=16), threshold=0.02, weights="q8_0")


@pytest.fixture(scope="module")
def tiny_relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("tiny_relu"), TINY_RELU, threshold=0.0)


@pytest.mark.parametrize(
    ("megabytes", "options"),
    [(17, ()), (24, ("--reads", "threads")), (24, ("--no-direct", "--map-dense")), (200, ("--batch", 16))],
)
def test_the_promise_of_memory_is_kept(
    c_runtime: CRuntime, large: Path, megabytes: int, options: tuple[object, ...]
) -> None:
    promise = megabytes * 1_000_000
    result = go(
        c_runtime.fast / "flash_run", "--json", "--dram", promise, *options, large, requests=f"generate 30 {PROMPT}\n"
    )
    assert result.returncode == 0, result.stderr
    (memory,), (figures,) = answers(result.stdout, "memory"), answers(result.stdout, "figures")
    assert memory["least_bytes"] <= memory["planned_bytes"] <= promise
    assert figures["peak_bytes"] <= 1.05 * memory["planned_bytes"]
    # Nor does it plan for much that it does not use: two megabytes are the programs, and tokens that did not come.
    assert figures["peak_bytes"] >= 0.95 * memory["planned_bytes"] - 2_000_000
    if megabytes == 200:
        assert memory["cached_bundles"] == memory["bundles"] == 4 * 4096
    else:
        assert memory["planned_bytes"] > 0.99 * promise


def test_a_cache_smaller_than_a_tokens_cycle_is_told(c_runtime: CRuntime, large: Path) -> None:
    """It is used all the same: S3-FIFO keeps what fires often."""
    program = c_runtime.fast / "flash_run"

    def plan(dram: object) -> tuple[dict[str, Any], str]:
        (memory,) = answers(go(program, "--json", "--dram", dram, "--plan", large).stdout, "memory")
        return memory, go(program, "--dram", dram, "--plan", large).stderr

    cycle = 0.0
    for block in json.loads((large / INDEX).read_text())["blocks"]:
        place = block["frequency"]
        frequency = np.fromfile(large / FLASH, "<f4", place["bytes"] // 4, offset=place["offset"])
        cycle += float(frequency.sum()) * block["stride"]
    few, told = plan("19MB")
    assert few["cycle_bytes"] == pytest.approx(cycle, rel=1e-3)
    assert few["cache_bytes"] < few["cycle_bytes"]
    enough = few["cycle_dram_bytes"]
    # What the process itself takes differs from run to run.
    assert any(f"--dram {enough // 1_000_000 + more}MB would take them" in told for more in (0, 1, 2))
    assert plan(enough + 300_000)[0]["cache_bytes"] >= few["cycle_bytes"] > plan(int(enough * 0.97))[0]["cache_bytes"]
    assert "would take them" not in plan(2 * enough)[1]
    assert f"--dram {math.ceil(100 * cycle / few['flash_bytes'])}% would take them" in plan("5%")[1]


def test_too_little_memory_is_refused_with_what_would_do(c_runtime: CRuntime, large: Path) -> None:
    program = c_runtime.fast / "flash_run"
    refused = go(program, "--json", "--dram", "3MB", "--plan", large)
    assert refused.returncode == 1
    assert "3000000 bytes of memory are too few: this model takes at least" in refused.stderr
    (memory,) = answers(refused.stdout, "memory")
    # Some pages more, as what the process itself takes differs from run to run.
    least = memory["least_bytes"] + 300_000
    assert go(program, "--dram", least, large, requests="generate 2 1 2 3\n").returncode == 0
    assert go(program, "--dram", "3MB", large).returncode == 1


@pytest.mark.parametrize("options", [(), ("--no-direct",), ("--batch", "1", "--threads", "3")])
@pytest.mark.parametrize("name", ["large", "tiny_relu"])
def test_weights_that_do_not_fit_are_read_anew_and_give_the_same_tokens(
    c_runtime: CRuntime, request: pytest.FixtureRequest, name: str, options: tuple[str, ...]
) -> None:
    """The head of tiny-relu is its embedding, of which single rows are needed as well."""
    layout = request.getfixturevalue(name)
    requests = f"generate 8 {PROMPT}\nperplexity 5 6 7 8\nlogits 3 4 5\n"
    whole = go(c_runtime.fast / "flash_run", "--dram", "100%", *options, layout, requests=requests)
    plan = go(c_runtime.fast / "flash_run", "--json", "--dram", 1, "--plan", *options, layout)
    (memory,) = answers(plan.stdout, "memory")
    dram = memory["least_bytes"] + {"large": 1_500_000, "tiny_relu": 600_000}[name]
    found = go(c_runtime.fast / "flash_run", "--json", "--dram", dram, *options, layout, requests=requests)
    (memory,), (figures, measured) = answers(found.stdout, "memory"), answers(found.stdout, "figures")
    tokens = [line for line in whole.stdout.splitlines() if line.startswith("token ")]
    assert [line for line in found.stdout.splitlines() if line.startswith("token ")] == tokens
    assert len(tokens) == 8
    logits = [[float(word) for word in done.stdout.splitlines()[-1].split()[1:]] for done in (whole, found)]
    assert logits[0] == pytest.approx(logits[1], abs=1e-4 * max(map(abs, logits[0])))
    assert memory["streamed_bytes"] > 0
    # Once a token, and what is read ahead.
    read = figures["tokens"]["bytes_streamed"]
    assert 6 * memory["streamed_bytes"] <= read <= 8 * memory["streamed_bytes"] + dram // 16
    assert max(figures["peak_bytes"], measured["peak_bytes"]) <= 1.05 * dram
    means = [_perplexity(done.stdout) for done in (whole, found)]
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def _perplexity(text: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith("perplexity "))
    assert line.split()[2] == "3"
    return float(line.split()[1])


@pytest.mark.parametrize(("kind", "spare"), [("Mixtral", 300_000), ("Mixtral", 2_000_000), ("Qwen2Moe", 300_000)])
def test_rows_of_routed_experts_that_do_not_fit_are_read_when_a_token_is_routed_to_them(
    c_runtime: CRuntime, experts: dict[str, Path], kind: str, spare: int
) -> None:
    requests = f"generate 9 {PROMPT}\nperplexity 5 6 7 8\n"
    # With sanitizers what the process holds at first differs by half a megabyte from run to run.
    for program, differs in ((c_runtime.fast / "flash_run", 0), (c_runtime.checked / "flash_run", 600_000)):
        whole = go(program, "--json", "--dram", "100%", experts[kind], requests=requests)
        (held,) = answers(whole.stdout, "memory")
        (plan,) = answers(go(program, "--json", "--dram", 1, "--plan", experts[kind]).stdout, "memory")
        # What is not there in any case: rows of all experts, less the buffers that they are read into.
        assert plan["least_bytes"] < held["least_bytes"] - held["resident_bytes"] // 2
        dram = plan["least_bytes"] + spare + differs
        found = go(program, "--json", "--dram", dram, experts[kind], requests=requests)
        assert found.returncode == 0, found.stderr[-3000:]
        (memory,), figures = answers(found.stdout, "memory"), answers(found.stdout, "figures")
        assert memory["resident_bytes"] < held["resident_bytes"]
        assert memory["planned_bytes"] <= dram
        tokens = [[line for line in done.stdout.splitlines() if line.startswith("token ")] for done in (whole, found)]
        assert tokens[0] == tokens[1]
        assert len(tokens[0]) == 9
        assert _perplexity(found.stdout) == pytest.approx(_perplexity(whole.stdout), rel=1e-6)
        # The plan has what is read on average, were all experts as likely; and some is read ahead.
        assert 8 * 0.7 < figures[0]["tokens"]["bytes_streamed"] / memory["streamed_bytes"] < 9 * 1.3
        if program.parent == c_runtime.fast:
            assert max(of["peak_bytes"] for of in figures) <= 1.05 * dram


def test_of_the_experts_only_those_that_are_used_are_read(c_runtime: CRuntime, experts: dict[str, Path]) -> None:
    program, layout = c_runtime.fast / "flash_run", experts["Mixtral"]
    (held,) = answers(go(program, "--json", "--dram", "100%", "--plan", layout).stdout, "memory")
    # All but a megabyte of the rows, which is more than enough for the buffers.
    found = go(program, "--json", "--dram", held["least_bytes"] - 1_000_000, layout, requests="generate 9 1 2 3\n")
    (memory,), (figures,) = answers(found.stdout, "memory"), answers(found.stdout, "figures")
    missing = held["resident_bytes"] - memory["resident_bytes"]
    assert missing > 1_000_000
    assert memory["dense_bytes"] > held["dense_bytes"] - 320 * 128 * 2 - 4096  # no more than the embedding
    assert memory["streamed_bytes"] == pytest.approx(missing * 2 / 8, rel=0.02)
    assert figures["tokens"]["bytes_streamed"] < 8 * missing * 0.6


@pytest.mark.parametrize(
    ("name", "first_request"), [("large", "generate 1 1 2 3"), ("large", "logits 1 2 3"), ("Mixtral", "logits 1 2 3")]
)
def test_weights_that_cannot_be_read_anew_are_an_error(
    c_runtime: CRuntime, large: Path, experts: dict[str, Path], tmp_path: Path, name: str, first_request: str
) -> None:
    layout = Path(shutil.copytree(experts.get(name, large), tmp_path / "layout"))
    plan = go(c_runtime.fast / "flash_run", "--json", "--dram", 1, "--plan", layout)
    (memory,) = answers(plan.stdout, "memory")
    # The checked program is larger.
    command = [
        str(c_runtime.fast / "flash_run"),
        "--dram",
        str(memory["least_bytes"] + 1_000_000),
        "--json",
        str(layout),
    ]
    answer = answer_after_a_cut(command, layout, first_request, "generate 30 4 5 6\ngenerate 3 4 5 6\n")
    assert answer.count("error 4 ") == 2


def test_shrinking_gives_memory_back(c_runtime: CRuntime, large: Path) -> None:
    requests = f"generate 8 {PROMPT}\nshrink 24000000\ngenerate 8 {PROMPT}\nshrink 1000\ngenerate 8 {PROMPT}\n"
    result = go(c_runtime.fast / "flash_run", "--json", "--dram", "100%", large, requests=requests)
    planned = [memory["planned_bytes"] for memory in answers(result.stdout, "memory")]
    assert len(planned) == 2
    assert planned[1] <= 24_000_000 < 30_000_000 < planned[0]
    tokens = [line for line in result.stdout.splitlines() if line.startswith("token ")]
    assert tokens[:8] == tokens[8:16] == tokens[16:]
    assert result.stdout.count("error 5 the model takes at least") == 1


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2Moe"])
def test_no_damage_crashes_it(c_runtime: CRuntime, small: Path, tmp_path: Path, kind: str) -> None:
    layout = small
    if kind == "Qwen2Moe":
        options = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        model = build(tmp_path / "model", kind, "bfloat16", shared_expert_intermediate_size=32, **options)
        layout = lay_out(tmp_path, model, threshold=0.02)
    layout = Path(shutil.copytree(layout, tmp_path / "with_device"))
    shutil.copy(NVME, layout / "device.json")
    scratch = Path(shutil.copytree(layout, tmp_path / "scratch"))
    result = go(c_runtime.checked / "c_runtime_fuzz", layout, scratch, 1, 700)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = {int(code): int(count) for code, count in map(str.split, result.stdout.splitlines())}
    assert sum(counts.values()) == 700
    # It gets everywhere: layouts that work, bad ones, and files that were cut.
    assert all(counts[code] > 0 for code in (0, 2, 4))


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("config.json", {"model_type": "gemma"}, 'model_type is not "opt"'),
    "sizes": ("config.json", {"num_attention_heads": 3}, "no multiple of num_attention_heads"),
    "layers": ("config.json", {"num_hidden_layers": 5}, "the layout has no model.decoder.layers.4."),
    "no layers": ("config.json", {"num_hidden_layers": None}, "num_hidden_layers is not a whole number"),
    "biases": ("config.json", {"enable_bias": False}, "self_attn.q_proj.bias, and config.json says that there is none"),
    "a type": (INDEX, {"model": {"model_type": "gemma"}}, 'models of type "gemma" are not supported'),
    "no type": (INDEX, {"model": {}}, 'models of type "" are not supported'),
    "rounded": (INDEX, {"dense": [{"place": {"tensor": "model.decoder.embed_tokens.weight"}, "weights": "q9",
                                   "columns": 128}]}, "is in an unknown format"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_by_name(c_runtime: CRuntime, tiny_relu: Path, tmp_path: Path, name: str) -> None:
    file, change, complaint = CHANGES[name]
    layout = Path(shutil.copytree(tiny_relu, tmp_path / "layout"))
    (layout / file).write_text(json.dumps(json.loads((layout / file).read_text()) | change))
    result = go(c_runtime.checked / "flash_run", "--json", layout)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout.startswith("error ")


def test_outputs_that_are_no_numbers_choose_no_token(c_runtime: CRuntime, tiny_relu: Path, tmp_path: Path) -> None:
    layout = Path(shutil.copytree(tiny_relu, tmp_path / "layout"))
    content = bytearray((layout / FLASH).read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    norm = json.loads(content[8:data])["model.decoder.final_layer_norm.bias"]
    start = data + norm["data_offsets"][0]
    content[start : start + 2] = {"F16": b"\x00\x7c", "BF16": b"\x80\x7f"}[norm["dtype"]]
    (layout / FLASH).write_bytes(content)
    for request in ("generate 4 1 2 3\n", "perplexity 1 2 3\n"):
        result = go(c_runtime.checked / "flash_run", "--json", layout, requests=request)
        assert result.stdout.endswith("error 2 the outputs of the model are not numbers: check its weights\n")


def test_values_of_up_that_are_clamped_are_refused(c_runtime: CRuntime, tiny_relu: Path, tmp_path: Path) -> None:
    """As those of gpt-oss: what it does not know of a block, it must not leave out."""
    layout = Path(shutil.copytree(tiny_relu, tmp_path / "layout"))
    index = json.loads((layout / INDEX).read_text())
    index["blocks"][2]["up_values"] = {"limit": 7, "plus": 1}
    (layout / INDEX).write_text(json.dumps(index))
    result = go(c_runtime.checked / "flash_run", "--json", layout)
    assert result.returncode == 1
    assert "layers.2 clamps the values of up or adds to them, which is not computed here" in result.stderr


def test_gpt_oss_is_refused_with_what_there_is(c_runtime: CRuntime, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "gpt_oss")
    placement = write_random_placement(model, tmp_path / "placement")
    relayout(model, placement, tmp_path / "layout", resident="gate")
    result = go(c_runtime.checked / "flash_run", "--json", tmp_path / "layout")
    assert result.returncode == 1
    assert 'models of type "gpt_oss" are not supported: the attention of opt, llama' in result.stderr


def test_a_file_that_is_cut_while_it_is_open_is_an_error(c_runtime: CRuntime, large: Path, tmp_path: Path) -> None:
    layout = Path(shutil.copytree(large, tmp_path / "layout"))
    command = [str(c_runtime.checked / "flash_run"), "--dram", "0%", "--json", str(layout)]
    answer = answer_after_a_cut(command, layout, "generate 1 1 2 3", "generate 3 4 5 6\ngenerate 3 4 5 6\n")
    assert answer.count("error 4 the file ended while it was being read") == 2


@pytest.mark.parametrize(
    "request_line",
    ["generate", "generate 3", "generate 0 1", "generate x 1", "generate 3 1 x", "generate 2 1 -1", "logits", "shout 1",
     "perplexity", "perplexity 5",
     "shrink", "shrink 5 5", "generate 3 1024", "generate 3 99999999999", "generate 250 " + "7 " * 257],
)  # fmt: skip
def test_wrong_requests_are_answered_and_the_next_one_works(
    c_runtime: CRuntime, tiny_relu: Path, request_line: str
) -> None:
    result = go(c_runtime.checked / "flash_run", tiny_relu, requests=f"{request_line}\n\ngenerate 1 5\n")
    first, last = result.stdout.splitlines()
    assert first.startswith("error 1 ")
    assert last.startswith("token ")
    assert result.returncode == 1


@pytest.mark.parametrize(
    "options",
    [(), ("a", "b"), ("--dram",), ("--dram", "x", "a"), ("--dram", "0", "a"), ("--dram", "101%", "a"),
     ("--lram", "1", "a"),
     ("--batch", "-1", "a"), ("--stop", "1,x", "a"), ("--reads", "telepathy", "a"), ("--top-p", "0", "a"),
     ("--temperature", "nan", "a"), ("--cache", "lru", "a"), ("--seed", "", "a")],
)  # fmt: skip
def test_wrong_usage(c_runtime: CRuntime, options: tuple[str, ...]) -> None:
    result = go(c_runtime.checked / "flash_run", *options)
    assert result.returncode == 2
    assert "usage: flash_run" in result.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--kernels", "abacus"), "no kernels abacus"),
        (("--context", "257"), "more than the 256 positions"),
        (("--queue-depth", "5000"), "1,024 reads in flight"),
    ],
)
def test_options_that_do_not_fit(
    c_runtime: CRuntime, tiny_relu: Path, options: tuple[str, ...], complaint: str
) -> None:
    result = go(c_runtime.checked / "flash_run", *options, tiny_relu)
    assert result.returncode == 1
    assert complaint in result.stderr
