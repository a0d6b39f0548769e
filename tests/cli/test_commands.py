"""What the torch-free commands print and write when all is well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.architectures.architecture import builtin_architectures
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import files_of, write_random_trace
from tests.cli.conftest import Neuralink, Outcome
from tests.damage import KINDS
from tests.layouts import LayoutFactory

ROOT = Path(__file__).parents[2]


def result_of(outcome: Outcome) -> Any:
    """The JSON on stdout of a command that went well."""
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_the_pipeline_without_torch(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint("llama", shards=2)
    trace = write_random_trace(model, tmp_path / "trace")
    placement, layout = tmp_path / "placement", tmp_path / "layout"

    clustered = result_of(neuralink("cluster", trace, "-o", placement, "--json"))
    with Placement(placement) as opened:
        assert clustered["content_sha256"] == opened.content_sha256
        assert [block["name"] for block in clustered["blocks"]] == ["layers.0", "layers.1"] == list(opened.blocks)
    assert clustered["output"] == str(placement)

    written = result_of(neuralink("relayout", model, "--placement", placement, "-o", layout, "--json"))
    assert written == {
        "output": str(layout), "written": True, "layout": "bundled", "resident": "none",
        "weights": "source", "dense_weights": "source", "alignment": 4096, "blocks": 2,
        "neurons": 74, "weight_bytes": (layout / "model.flash.safetensors").stat().st_size,
        "total_bytes": written["total_bytes"], "peak_block_bytes": 37 * 3 * 20 * 4,
        "companions": 2, "left_out": 0, "left_out_bytes": 0, "origin": None, "gate_recall": None,
        "coverage": {"ffn_bytes": 2 * 3 * 37 * 20 * 4, "covered_bytes": 2 * 3 * 37 * 20 * 4, "left_alone": []},
    }  # fmt: skip
    small = sum((layout / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    assert written["total_bytes"] == written["weight_bytes"] + small

    for options, mode in (((), "full"), (("--quick",), "quick")):
        verified = result_of(neuralink("verify", model, layout, "--json", *options))
        assert (verified["verified"], verified["layout"], verified["mode"]) == (True, "bundled", mode)
        assert verified["coverage"] == written["coverage"]

    restored = result_of(neuralink("restore", layout, "-o", tmp_path / "restored", "--json"))
    assert (restored["output"], restored["coverage"]) == (str(tmp_path / "restored"), written["coverage"])
    assert files_of(tmp_path / "restored") == files_of(model)


def test_what_people_see(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint("opt")
    trace = write_random_trace(model, tmp_path / "trace")
    clustered = neuralink("cluster", trace, "-o", tmp_path / "placement", "-q")
    assert (clustered.code, clustered.stderr) == (0, "")
    for word in ("layers.0", "layers.1", "total", "original", "linked"):
        assert word in clustered.stdout
    written = neuralink("relayout", model, "--placement", tmp_path / "placement", "-o", tmp_path / "out", "-q")
    assert written.stdout.startswith(f"{tmp_path / 'out'}: bundled layout of 2 blocks takes ")
    assert (written.code, written.stderr) == (0, "")
    verified = neuralink("verify", model, tmp_path / "out", "-q")
    covers = "the blocks cover 100 % of the FFN bytes\n"
    assert verified.stdout.startswith(f"verified: {tmp_path / 'out'} (bundled, full)\n  {covers}")
    assert "every source tensor byte for byte" in verified.stdout
    restored = neuralink("restore", tmp_path / "out", "-o", tmp_path / "restored", "-q")
    assert restored.stdout.startswith(f"{tmp_path / 'restored'}: 15 tensors, ")
    assert restored.stdout.endswith(f"\n{covers}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(
    neuralink: Neuralink, outputs: Path, layouts: LayoutFactory, kind: str, as_json: bool
) -> None:
    model, placement = layouts.checkpoint()
    arguments = ("relayout", model, "--placement", placement, "-o", outputs / "out", "--layout", kind)
    planned = neuralink(*arguments, "--dry-run", *(["--json"] if as_json else []))
    assert planned.code == 0
    assert planned.stderr.startswith("neuralink: reads ")
    assert planned.stderr.count("\n") == 1
    assert not any(outputs.iterdir())
    if as_json:
        plan = json.loads(planned.stdout)
        assert plan["written"] is False
        estimate = plan.pop("estimate")
        read = ("model.safetensors", "config.json", "tokenizer.json")
        assert estimate["bytes_read"] == sum((model / name).stat().st_size for name in read)
        assert estimate["bytes_written"] == plan["total_bytes"]
        assert estimate["seconds"] is None
        assert {**plan, "written": True} == result_of(neuralink(*arguments, "--json"))
        weights = (outputs / "out").glob("*.safetensors")
        assert plan["weight_bytes"] == sum(path.stat().st_size for path in weights)
    else:
        assert f"{outputs / 'out'}: {kind} layout of 2 blocks would take " in planned.stdout
        assert "\nmemory_bytes " in planned.stdout


def test_what_is_left_out_is_named_in_one_line(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    original, placement = layouts.checkpoint()
    model = Path(shutil.copytree(original, tmp_path / "model"))
    (model / "onnx").mkdir()
    for name, size in (("onnx/model.onnx", 2000), ("pytorch_model.bin", 3000), ("value_head.pt", 10)):
        (model / name).write_bytes(bytes(size))
    arguments = ("relayout", model, "--placement", placement, "--overwrite", "-o", tmp_path / "out")
    told = neuralink(*arguments, "--json")
    assert [line for line in told.stderr.splitlines() if "left out" in line] == [
        "neuralink: left out: 2 files, 5.0 kB (pytorch_model.bin, onnx/model.onnx): other copies of the weights; "
        "--all-files takes everything along"
    ]
    summary = result_of(told)
    assert (summary["companions"], summary["left_out"], summary["left_out_bytes"]) == (3, 2, 5000)
    assert neuralink(*arguments, "-q").stderr == ""
    everything = neuralink(*arguments, "--json", "--all-files")
    assert "left out" not in everything.stderr
    assert (result_of(everything)["companions"], result_of(everything)["left_out"]) == (5, 0)
    assert neuralink("restore", tmp_path / "out", "-o", tmp_path / "back").code == 0
    assert files_of(tmp_path / "back") == files_of(model)


def test_a_dry_run_finds_what_the_run_would(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    model, placement = layouts.checkpoint()
    (tmp_path / "out").mkdir()
    outcome = neuralink("relayout", model, "--placement", placement, "-o", tmp_path / "out", "--dry-run")
    assert outcome.code == 6
    assert "already exists" in outcome.error


@pytest.mark.parametrize("kind", KINDS)
def test_overwriting_replaces_a_layout_of_either_kind(
    neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory, kind: str
) -> None:
    model, placement = layouts.checkpoint()
    output = tmp_path / "out"
    for before in KINDS:
        arguments = ("relayout", model, "--placement", placement, "-o", output, "-q", "--overwrite", "--layout")
        assert neuralink(*arguments, before).code == 0
        assert neuralink(*arguments, kind).code == 0
        assert files_of(output) == files_of(layouts.of_kind(kind).layout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_stage_overwrites_if_asked(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint()
    traces = [write_random_trace(model, tmp_path / f"trace-{seed}", seed=seed) for seed in (0, 1)]
    for command in (("merge", traces[0]), ("merge", *traces), ("cluster", traces[0]), ("cluster", traces[1])):
        assert neuralink(*command, "-o", tmp_path / "out", "--overwrite", "-q").code == 0
    with Placement(tmp_path / "out") as placement:
        assert placement.info.trace["sources"][0]["sha256"] == "01" * 32


def test_merged_traces_hold_all_tokens(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    model, _ = layouts.checkpoint()
    traces = [write_random_trace(model, tmp_path / f"trace-{seed}", seed=seed) for seed in (0, 1)]
    merged = result_of(neuralink("merge", *traces, "-o", tmp_path / "merged", "--json"))
    assert merged["tokens"] == 1200
    assert [source["tokens"] for source in merged["sources"]] == [600, 600]


def test_merge_and_bench_say_what_the_blocks_cover(
    neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory
) -> None:
    model, placement = layouts.checkpoint()
    known = {"covered_bytes": 1998, "ffn_bytes": 2000}
    new = write_random_trace(model, tmp_path / "new", coverage=known)
    # A trace from before this was recorded.
    old = write_random_trace(model, tmp_path / "old", seed=1)
    sentence = "the blocks cover 99.9 % of the FFN bytes"
    for traces in ((new, old), (old, new), (new,)):
        arguments = ("merge", *traces, "-o", tmp_path / "merged", "--overwrite", "-q")
        assert result_of(neuralink(*arguments, "--json"))["coverage"] == known
        assert neuralink(*arguments).stdout.endswith(f"\n{sentence}\n")
    bench = ("bench", placement, "--cache", "none", "-q", "--trace")
    assert result_of(neuralink(*bench, tmp_path / "merged", "--json"))["coverage"] == known
    assert neuralink(*bench, tmp_path / "merged").stdout.splitlines()[1] == sentence
    # Where it is not known, nothing is claimed.
    assert result_of(neuralink(*bench, old, "--json"))["coverage"] is None
    assert "cover" not in neuralink(*bench, old).stdout
    merge_old = neuralink("merge", old, "-o", tmp_path / "merged", "--overwrite", "-q")
    assert merge_old.stdout.endswith("600 tokens of 1 source\n")


def test_a_dataset_too_small_to_hold_anything_out(neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory) -> None:
    """Nothing is known of it alone, in the table of the terminal as on the card; the others are told as ever."""
    model, _ = layouts.checkpoint()
    traces = [write_random_trace(model, tmp_path / f"trace-{n}", tokens=n, seed=n % 7) for n in (600, 2)]
    placement, layout = tmp_path / "placement", tmp_path / "layout"
    assert neuralink("merge", *traces, "-o", tmp_path / "merged").code == 0
    clustered = neuralink("cluster", tmp_path / "merged", "-o", placement, "-q")
    assert clustered.code == 0, clustered.stderr
    rows = [line.split() for line in clustered.stdout.splitlines() if line.startswith("text.txt")]
    assert len(rows) == 2
    untold = [row for row in rows if "-" in row]
    assert [set(row[3:]) for row in untold] == [{"-"}]
    assert neuralink("relayout", model, "--placement", placement, "-o", layout, "-q").code == 0
    cells = [line.strip("| ").split(" | ") for line in (layout / "README.md").read_text().splitlines() if "|" in line]
    table = {tuple(row[2:]) == ("-",) * (len(row) - 2) for row in cells if row[0] == "text.txt"}
    assert table == {True, False}
    assert neuralink("verify", model, layout, "-q").code == 0


def test_architectures_are_listed(neuralink: Neuralink) -> None:
    known = builtin_architectures()
    listed = result_of(neuralink("architectures", "--json"))
    assert listed == [{"name": a.name, "task": a.task, "model_types": list(a.model_types)} for a in known]
    table = neuralink("architectures").stdout.splitlines()[1:]
    assert [line.split() for line in table] == [[t, a.name, a.task] for a in known for t in a.model_types]


# Runs command lines, and tells which of the heavy packages that took.
SCRIPT = """
import json, sys
from neuralink_cli.cli.entry import run
for arguments in json.loads(sys.argv[1]):
    code = run(arguments)
    assert code == 0, (arguments, code)
heavy = ("torch", "transformers", "datasets", "huggingface_hub", "matplotlib", "dask", "distributed")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def torch_free_stages(model: Path, trace: Path, folder: Path) -> list[list[str]]:
    """Command lines that write into a folder."""
    merged, placement = folder / "trace", folder / "placement"
    lines: list[list[object]] = [
        ["merge", trace, "-o", merged, "-q"],
        ["cluster", merged, "-o", placement, "-q"],
    ]
    for kind in KINDS:
        layout = folder / kind
        lines += [
            ["relayout", model, "--placement", placement, "-o", layout, "--layout", kind, "-q"],
            ["verify", model, layout, "-q"],
            ["restore", layout, "-o", folder / f"restored-{kind}", "-q"],
        ]
    return [[*map(str, line)] for line in lines]


def test_every_torch_free_stage_is_that_and_gives_the_same_bytes_whatever_the_hash_seed(
    neuralink: Neuralink, tmp_path: Path, layouts: LayoutFactory
) -> None:
    model, _ = layouts.checkpoint("llama", dtype="BF16", shards=2)
    trace = write_random_trace(model, tmp_path / "trace")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for line in torch_free_stages(model, trace, here):
        assert neuralink(*line).code == 0
    # Sets are in another order there than here.
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(torch_free_stages(model, trace, there))],
        env={**os.environ, "PYTHONHASHSEED": "77", "NUMBA_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "[]\n")
    assert files_of(there) == files_of(here)
    for kind in KINDS:
        assert files_of(here / f"restored-{kind}") == files_of(model)
