"""Whatever fails and whenever the run dies: the old layout or the new one is there, complete."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.errors import NeuralinkError
from neuralink_cli.layout.open_layout import open_layout
from neuralink_cli.rewriting.restore import restore_layout
from tests.checkpoints import files_of
from tests.damage import FLASH, INDEX, KINDS
from tests.faults import deaths, faults, file_size_limit, flushed, hold_flushes
from tests.layouts import LayoutFactory, Made, relayout, verify
from tests.processes import Command

# Both kinds as they are written here; the old output is a bundled layout aligned otherwise.
OPTIONS: dict[str, dict[str, Any]] = {"bundled": {"alignment": 512}, "permuted": {"layout": "permuted"}}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def is_new(layout: Path) -> bool:
    """Whether a layout is what the run was to write."""
    if (layout / INDEX["permuted"]).exists():
        return True
    return int(json.loads((layout / INDEX["bundled"]).read_text())["alignment"]) == 512


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_leaves_no_layout_or_a_complete_one(
    tmp_path: Path, layouts: LayoutFactory, kind: str, shards: int
) -> None:
    model, placement = layouts.checkpoint(shards=shards)
    output = tmp_path / "out"
    operations = 0
    for _ in faults(lambda: relayout(model, placement, output, **OPTIONS[kind])):
        operations += 1
        assert names_in(tmp_path) in ([], ["out"])
        if output.exists():
            assert verify(model, output).mode == "full"
            shutil.rmtree(output)
    assert operations > 20
    assert verify(model, output).mode == "full"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_leaves_the_old_layout_or_the_new_one(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    old = layouts.bundled()
    output = Path(shutil.copytree(old.layout, tmp_path / "out"))
    before = files_of(output)
    seen = []
    for _ in faults(lambda: relayout(old.model, old.placement, output, overwrite=True, **OPTIONS[kind])):
        assert names_in(tmp_path) == ["out"]
        seen.append(is_new(output))
        if seen[-1]:
            assert verify(old.model, output).mode == "full"
            shutil.rmtree(output)
            shutil.copytree(old.layout, output)
        else:
            assert files_of(output) == before
    assert len(seen) > 20
    # Once the new one is in place, only the flush of its folder is left to fail.
    assert seen == sorted(seen)
    assert seen.count(True) <= 2
    assert is_new(output)


@pytest.mark.parametrize("kind", KINDS)
def test_every_death_leaves_the_old_layout_or_the_new_one(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    old = layouts.bundled()
    output = Path(shutil.copytree(old.layout, tmp_path / "out"))
    before = files_of(output)
    seen = []
    for _ in deaths(lambda: relayout(old.model, old.placement, output, overwrite=True, **OPTIONS[kind]), step=2):
        assert set(names_in(tmp_path)) <= {"out", ".out.partial"}
        seen.append(is_new(output))
        if seen[-1]:
            assert verify(old.model, output).mode == "full"
            shutil.rmtree(output)
            shutil.copytree(old.layout, output)
        else:
            assert files_of(output) == before
    assert len(seen) > 20
    assert set(seen) == {False, True}
    # The run that was left in peace took over what the dead ones left.
    assert names_in(tmp_path) == ["out"]
    assert is_new(output)
    assert verify(old.model, output).mode == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_a_death_without_an_old_layout_leaves_nothing_that_looks_finished(
    tmp_path: Path, layouts: LayoutFactory, kind: str
) -> None:
    # Made here, because what is compiled and imported on the way would be once more in every process.
    model, placement = layouts.bundled().model, layouts.bundled().placement
    output = tmp_path / "out"
    for _ in deaths(lambda: relayout(model, placement, output, **OPTIONS[kind]), first=2, step=2):
        assert names_in(tmp_path) in ([], ["out"], [".out.partial"])
        if output.exists():
            assert verify(model, output).mode == "full"
            shutil.rmtree(output)
    assert verify(model, output).mode == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_leaves_the_old_layout(tmp_path: Path, layouts: LayoutFactory, kind: str) -> None:
    old = layouts.bundled()
    output = Path(shutil.copytree(old.layout, tmp_path / "out"))
    before = files_of(output)
    relayout(old.model, old.placement, tmp_path / "new", **OPTIONS[kind])
    largest = max(path.stat().st_size for path in (tmp_path / "new").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "new")
    random = np.random.default_rng(0)
    for limit in (1, 4096, *random.integers(4097, largest, 10).tolist(), largest - 1):
        with file_size_limit(limit), pytest.raises((OSError, NeuralinkError)):
            relayout(old.model, old.placement, output, overwrite=True, **OPTIONS[kind])
        assert names_in(tmp_path) == ["out"]
        assert files_of(output) == before
    with file_size_limit(largest):
        relayout(old.model, old.placement, output, overwrite=True, **OPTIONS[kind])
    assert is_new(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["relayout", "restore"])
def test_everything_is_on_the_device_before_it_has_its_name(
    tmp_path: Path, layouts: LayoutFactory, monkeypatch: pytest.MonkeyPatch, kind: str, stage: str
) -> None:
    made = layouts.of_kind(kind, shards=2)
    rename = Path.rename
    seen = []
    with flushed() as forgotten:

        def watched(path: Path, target: Path) -> Path:
            seen.append((target.name, forgotten(path)))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", watched)
        if stage == "relayout":
            relayout(made.model, made.placement, tmp_path / "out", layout=kind)
        else:
            with open_layout(made.layout) as layout:
                restore_layout(layout, tmp_path / "out")
        assert seen == [("out", [])]
        # And then the folder that holds the name.
        assert forgotten(tmp_path) == []


# A process of its own, killed from outside


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A layout that takes a while to write."""
    factory = LayoutFactory(tmp_path_factory.mktemp("large"))
    return factory.bundled("opt", neurons=6144, hidden=512)


@pytest.fixture
def run_in_background(tmp_path: Path, large: Made) -> Iterator[Callable[..., Command]]:
    """Starts to overwrite `tmp_path / "out"`, and comes back when writing has begun."""
    started: list[Command] = []

    def start(*options: str, prepare: Callable[[], object] = lambda: None) -> Command:
        partial = tmp_path / ".out.partial"
        if partial.exists() and "--resume" not in options:
            shutil.rmtree(partial)
        arguments = ["relayout", large.model, "--placement", large.placement, "-o", tmp_path / "out", "--overwrite"]
        arguments += ["--alignment", 512, "--quiet", *options]
        process = Command(*arguments, prepare=prepare)
        started.append(process)
        while not (partial / FLASH).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_killed_at_any_moment_leaves_the_old_layout_or_the_new_one(
    tmp_path: Path, large: Made, run_in_background: Callable[..., Command]
) -> None:
    output = Path(shutil.copytree(large.layout, tmp_path / "out"))
    for delay in np.random.default_rng(0).uniform(0, 0.12, 4):
        process = run_in_background()
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert set(names_in(tmp_path)) <= {"out", ".out.partial"}
        assert verify(large.model, output).mode == "full"
    process = run_in_background()
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert "bundled layout of 2 blocks" in stdout
    assert names_in(tmp_path) == ["out"]
    assert is_new(output)
    assert verify(large.model, output).mode == "full"


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_that_is_stopped_clears_up(
    tmp_path: Path,
    large: Made,
    run_in_background: Callable[..., Command],
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    shutil.copytree(large.layout, tmp_path / "out")
    process = run_in_background(prepare=hold_flushes)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert stderr.strip() == f"neuralink: error: {word}; nothing unfinished was left behind"
    assert names_in(tmp_path) == ["out"]
    assert not is_new(tmp_path / "out")
    assert verify(large.model, tmp_path / "out", quick=True).mode == "quick"


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_that_is_stopped_can_be_resumed(
    tmp_path: Path,
    large: Made,
    run_in_background: Callable[..., Command],
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    shutil.copytree(large.layout, tmp_path / "out")
    process = run_in_background("--resume", prepare=hold_flushes)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert stderr == f"neuralink: error: {word}; what was written is kept; run the same command again to continue\n"
    assert names_in(tmp_path) == [".out.partial", "out"]
    assert not is_new(tmp_path / "out")
    process = run_in_background("--resume")
    assert process.communicate()[1] == ""
    assert names_in(tmp_path) == ["out"]
    assert is_new(tmp_path / "out")
    assert verify(large.model, tmp_path / "out").mode == "full"


def test_a_run_killed_at_any_moment_can_be_resumed(
    tmp_path: Path, large: Made, run_in_background: Callable[..., Command]
) -> None:
    relayout(large.model, large.placement, tmp_path / "expected", alignment=512)
    shutil.copytree(large.layout, tmp_path / "out")
    for delay in np.random.default_rng(0).uniform(0, 0.12, 4):
        process = run_in_background("--resume")
        time.sleep(delay)
        process.kill()
        process.communicate()
    run_in_background("--resume").communicate()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
