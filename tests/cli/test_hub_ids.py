"""Models and datasets by hub id through every command: from the cache, and from a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.placement.placement import Placement
from tests.checkpoints import files_of
from tests.cli.conftest import Neuralink
from tests.hub import COMMIT, Hub, running_hub, write_cached
from tests.layouts import LayoutFactory
from tests.processes import run_command
from tests.tiny_models import TEXT, build_model

DATA_COMMIT = "d" * 40
ORIGIN = {"id": "org/tiny", "revision": COMMIT}


@dataclass(frozen=True)
class Cached:
    """A model on the hub, in the cache as tag v1, and the same files in a local directory."""

    folder: Path
    local: Path
    snapshot: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(tmp_path_factory.mktemp("opt") / "model", "opt", shards=True)
    (model / "README.md").write_text("# Tiny\n")
    return model


@pytest.fixture
def cached(hub_cache: Path, tmp_path: Path, tiny: Path) -> Cached:
    snapshot = write_cached(hub_cache, "model", "org/tiny", files_of(tiny), ref="v1")
    rows = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    write_cached(hub_cache, "dataset", "org/text", {"train.jsonl": rows.encode()}, commit=DATA_COMMIT)
    assert all(path.is_symlink() for path in snapshot.iterdir())
    return Cached(tmp_path, tiny, snapshot)


def go(neuralink: Neuralink, *arguments: object) -> Any:
    outcome = neuralink(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.fixture
def profiled(neuralink: Neuralink, cached: Cached) -> Path:
    trace = cached.folder / "trace"
    summary = go(neuralink, "profile", "org/tiny", "--revision", "v1", "--dataset", "org/text", "-o", trace)
    assert summary["origin"] == ORIGIN
    return trace


@pytest.fixture
def placed(neuralink: Neuralink, cached: Cached, profiled: Path) -> Path:
    go(neuralink, "cluster", profiled, "-o", cached.folder / "placement", "--effort", "fast")
    return cached.folder / "placement"


def test_trace_and_placement_say_where_everything_came_from(profiled: Path, placed: Path) -> None:
    with Trace(profiled) as trace:
        assert trace.document["origin"] == ORIGIN
        assert trace.document["model"].keys() == {"fingerprint", "model_type", "architecture"}
        (source,) = trace.info.sources
        assert (source.name, source.parameters["revision"]) == ("org/text", DATA_COMMIT)
    with Placement(placed) as placement:
        assert placement.document["origin"] == ORIGIN
        assert [entry["revision"] for entry in placement.info.trace["sources"]] == [DATA_COMMIT]


@pytest.mark.parametrize("layout", ["bundled", "permuted"])
def test_a_layout_of_a_hub_model_is_whole_and_says_where_it_came_from(
    neuralink: Neuralink, cached: Cached, placed: Path, layout: str
) -> None:
    output, restored = cached.folder / "layout", cached.folder / "restored"
    model = ("org/tiny", "--revision", COMMIT)
    written = go(neuralink, "relayout", *model, "--placement", placed, "-o", output, "--layout", layout)
    assert written["origin"] == ORIGIN
    assert not any(path.is_symlink() for path in output.rglob("*"))
    index = json.loads((output / ("model.flash.json" if layout == "bundled" else "model.permuted.json")).read_text())
    assert index["origin"] == ORIGIN
    assert [source["revision"] for source in index["provenance"]["sources"]] == [DATA_COMMIT]
    card = (output / "README.md").read_text()
    assert card.startswith("# Tiny\n")
    assert f"- Source model: `opt`, `org/tiny` at commit `{COMMIT}`, fingerprint `" in card
    assert f"- Calibrated on: org/text at commit `{DATA_COMMIT}` (" in card
    for source in (model, (cached.local,)):
        assert go(neuralink, "verify", *source, output)["mode"] == "full"
    go(neuralink, "restore", output, "-o", restored)
    assert not any(path.is_symlink() for path in restored.rglob("*"))
    assert files_of(restored) == files_of(cached.local)


def test_a_local_copy_is_the_same_model(neuralink: Neuralink, cached: Cached, profiled: Path, placed: Path) -> None:
    folder, data = cached.folder, ("--dataset", "org/text")
    go(neuralink, "profile", cached.local, *data, "--thresholds-from", profiled, "-o", folder / "local trace")
    with Trace(folder / "local trace") as local, Trace(profiled) as hub:
        assert local.info.origin is None
        assert {**local.document, "origin": ORIGIN, "content_sha256": ""} == {**hub.document, "content_sha256": ""}
    layouts = {}
    for name, model in (("hub", ("org/tiny", "--revision", "v1")), ("local", (cached.local,))):
        go(neuralink, "relayout", *model, "--placement", placed, "-o", folder / name)
        layouts[name] = json.loads((folder / name / "model.flash.json").read_text())
    assert [layouts[name]["origin"] for name in ("hub", "local")] == [ORIGIN, None]
    assert layouts["hub"]["file"] == layouts["local"]["file"]
    assert go(neuralink, "bench", folder / "local", "--trace", profiled)


def test_traces_of_hub_and_local_copy_merge(neuralink: Neuralink, cached: Cached, profiled: Path) -> None:
    text = cached.folder / "other.txt"
    text.write_text(TEXT)
    go(neuralink, "profile", cached.local, "--dataset", text, "-o", cached.folder / "local")
    for inputs in ((cached.folder / "local", profiled), (profiled, cached.folder / "local")):
        go(neuralink, "merge", *inputs, "-o", cached.folder / "merged", "--overwrite")
        with Trace(cached.folder / "merged") as merged:
            assert merged.document["origin"] == ORIGIN
            assert {s.parameters["revision"] for s in merged.info.sources} == {None, DATA_COMMIT}


def test_inspect_takes_a_hub_id_and_says_how_to_go_on_with_it(neuralink: Neuralink, cached: Cached) -> None:
    found = go(neuralink, "inspect", "org/tiny", "--revision", "v1")
    local = go(neuralink, "inspect", cached.local)
    assert (found["origin"], local["origin"]) == (ORIGIN, None)
    assert found["path"] == str(cached.snapshot)
    same = ("kind", "bytes", "blocks", "architecture", "needs")
    assert [found[key] for key in same] == [local[key] for key in same]
    assert found["next"][0]["command"].startswith(f"neuralink profile org/tiny --revision {COMMIT} --dataset")
    assert f"org/tiny at commit {COMMIT}" in neuralink("inspect", "org/tiny", "--revision", "v1", "-q").stdout
    refused = neuralink("inspect", cached.local, "--revision", "v1", "-q")
    assert refused.code == 2
    assert "is a local path" in refused.error
    # What must be a file is not looked for on the hub.
    assert "no such file" in neuralink("inspect", "model.trace.safetensors", "-q").error.lower()


def test_another_hub_model_is_another_model(
    neuralink: Neuralink, cached: Cached, hub_cache: Path, placed: Path
) -> None:
    other = build_model(cached.folder / "other", "opt", seed=5)
    write_cached(hub_cache, "model", "org/tiny", files_of(other), commit="e" * 40, ref="main")
    outcome = neuralink("relayout", "org/tiny", "--placement", placed, "-o", cached.folder / "layout")
    assert outcome.code == 5
    assert "was made for the model with fingerprint " in outcome.stderr


def test_run_compares_with_a_hub_model(neuralink: Neuralink, cached: Cached, placed: Path) -> None:
    layout = cached.folder / "layout"
    go(neuralink, "relayout", cached.local, "--placement", placed, "-o", layout, "--resident", "gate")
    prompt = (layout, "--prompt", "The river", "--max-new-tokens", "4")
    report = go(neuralink, "run", *prompt, "--compare", "org/tiny", "--revision", "v1")
    assert report["comparison"]["masked"]["same"] == report["comparison"]["masked"]["tokens"]
    assert neuralink("run", *prompt, "--revision", "v1").error.startswith("--revision is for the model of --compare")


@pytest.mark.parametrize("command", ["profile", "relayout", "verify"])
def test_what_is_nowhere_is_bad_input(
    neuralink: Neuralink, layouts: LayoutFactory, outputs: Path, command: str
) -> None:
    made = layouts.bundled()
    arguments: dict[str, tuple[object, ...]] = {
        "profile": ("--dataset", made.model / "README.md", "-o", outputs / "x"),
        "relayout": ("--placement", made.placement, "-o", outputs / "x"),
        "verify": (made.layout,),
    }
    outcome = neuralink(command, "no-such/model", *arguments[command])
    assert outcome.code == 3
    assert outcome.error.startswith("no-such/model: is neither a local path nor completely in the local cache of the ")
    outcome = neuralink(command, made.model, "--revision", "main", *arguments[command])
    assert outcome.code == 2
    assert outcome.error.startswith("--revision is for models of the Hugging Face hub, and ")
    assert not any(outputs.iterdir())


class TestWithAHub:
    """Processes of their own, with a library of their own, which learns where the hub is when it is imported."""

    @pytest.fixture
    def hub(self) -> Iterator[Hub]:
        with running_hub() as hub:
            yield hub

    def run(self, hub: Hub, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        def prepare() -> None:
            os.environ.update(hub.environment(folder / "cache"))
            for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
                del sys.modules[name]

        return run_command(*arguments, prepare=prepare)

    def test_a_model_is_fetched_once_and_kept(
        self, neuralink: Neuralink, hub: Hub, layouts: LayoutFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, placement = layouts.checkpoint("llama", shards=2)
        files = {**files_of(model), "additional_chat_templates/tools.jinja": b"{{ tools }}", "head.pt": b"x"}
        hub.repositories["model", "org/served"] = {**files, "pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}
        relayout = ("relayout", "org/served", "--placement", placement, "-o")
        first = self.run(hub, tmp_path, *relayout, tmp_path / "first")
        assert first.returncode == 0, first.stderr
        size = f"{len(files)} files, {sum(map(len, files.values())):,} bytes"
        assert first.stderr.startswith(
            f"neuralink: org/served: fetching commit {COMMIT} from the Hugging Face hub: {size}\n"
        )
        snapshot = tmp_path / "cache" / "models--org--served" / "snapshots" / COMMIT
        assert files_of(snapshot) == files
        assert "Fetching" not in first.stderr

        hub.requests.clear()
        second = self.run(hub, tmp_path, *relayout, tmp_path / "second", "--revision", COMMIT)
        assert second.returncode == 0, second.stderr
        assert second.stderr.startswith(f"neuralink: org/served@{COMMIT}: commit {COMMIT} is in the local cache\n")
        assert not [request for request in hub.requests if "/resolve/" in request]
        assert files_of(tmp_path / "first") == files_of(tmp_path / "second")

        whole = self.run(hub, tmp_path, *relayout, tmp_path / "whole", "--all-files")
        assert whole.returncode == 0, whole.stderr
        assert f"fetching commit {COMMIT} from the Hugging Face hub: 2 files, 2 bytes\n" in whole.stderr
        assert (tmp_path / "whole/onnx/model.onnx").read_bytes() == b"x"

        hub.repositories.clear()
        gone = self.run(hub, tmp_path, "verify", "org/served", tmp_path / "first")
        assert gone.returncode == 0, gone.stderr
        assert f"of the Hugging Face hub; using commit {COMMIT} from the local cache\n" in gone.stderr
        assert self.run(hub, tmp_path, "verify", "org/served", tmp_path / "first", "-q").stderr == ""

    def test_what_a_hub_does_not_give_is_bad_input(self, hub: Hub, layouts: LayoutFactory, tmp_path: Path) -> None:
        made = layouts.bundled()
        for name in ("org/served", "org/gated"):
            hub.repositories["model", name] = files_of(made.model)
        hub.gated.add("org/gated")
        for arguments, message in (
            (
                ("org/absent",),
                "org/absent: is neither a local path nor a model of the Hugging Face hub; check the name; ",
            ),
            (("org/served", "--revision", "v9"), "org/served: has no revision 'v9'; see "),
            (("org/gated",), "org/gated: is gated, and you have no access; accept its licence on "),
        ):
            outcome = self.run(hub, tmp_path, "verify", *arguments, made.layout)
            assert (outcome.returncode, outcome.stdout) == (3, "")
            assert outcome.stderr.startswith(f"neuralink: error: {message}")
            assert outcome.stderr.count("\n") == 1

    def test_without_a_connection_there_is_the_cache(self, hub: Hub, layouts: LayoutFactory, tmp_path: Path) -> None:
        made = layouts.bundled()
        hub.address = "http://127.0.0.1:9"
        outcome = self.run(hub, tmp_path, "verify", "org/tiny", made.layout)
        assert outcome.returncode == 3
        assert (
            "nor completely in the local cache of the Hugging Face hub, and the hub cannot be reached ("
            in outcome.stderr
        )
        write_cached(tmp_path / "cache", "model", "org/tiny", files_of(made.model))
        outcome = self.run(hub, tmp_path, "verify", "org/tiny", made.layout)
        assert outcome.returncode == 0
        assert "neuralink: org/tiny: the hub cannot be reached (" in outcome.stderr
        assert f"); using commit {COMMIT} from the local cache\n" in outcome.stderr
