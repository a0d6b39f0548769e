"""A relayout that was killed goes on where it was, and its bytes are those of a run that nothing disturbed."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.errors import OutputError
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.journal import JOURNAL_FILE
from tests.checkpoints import files_of, write_random_placement
from tests.damage import FLASH, KINDS, flip
from tests.faults import Disk, deaths, dies, faults
from tests.layouts import LayoutFactory, Made, relayout, verify

WEIGHTS = {"bundled": FLASH, "permuted": "model-00001-of-00002.safetensors"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the small layouts here take many writes."""
    monkeypatch.setattr(pipeline, "PIECE", 4096)
    monkeypatch.setattr(pipeline, "AHEAD", 4 * 4096)
    monkeypatch.setattr(pipeline, "BEHIND", 4 * 4096)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def made(layouts: LayoutFactory, kind: str) -> Made:
    """A layout that nothing disturbed, as all are to be."""
    return layouts.of_kind(kind, "llama", shards=2, neurons=300)


@pytest.fixture
def partial(tmp_path: Path, made: Made, kind: str) -> Path:
    """What a run for `tmp_path / "out"` has left, most but not all of the weights."""

    def run() -> object:
        return relayout(made.model, made.placement, tmp_path / "out", layout=kind)

    with Disk(10_000).installed() as disk:
        run()
    shutil.rmtree(tmp_path / "out")
    # In the flush after the last write, until when the journal may lag behind.
    last = max(k for k, name in enumerate(disk.done, 1) if name == "write")
    assert dies(run, last + 1)
    partial = tmp_path / ".out.partial"
    path = partial / WEIGHTS[kind]
    os.truncate(path, path.stat().st_size * 3 // 4)
    return partial


@pytest.fixture
def found(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How many bytes the runs so far have found written."""
    caplog.set_level(logging.DEBUG, "neuralink_cli")

    def count() -> int:
        return sum(int(n) for n in re.findall(r": (\d+) bytes are already written", caplog.text))

    return count


def test_killed_anywhere(tmp_path: Path, made: Made, kind: str, found: Callable[[], int]) -> None:
    output = tmp_path / "out"
    seen = []
    for _ in deaths(lambda: relayout(made.model, made.placement, output, layout=kind), step=3):
        if not output.exists():
            before = found()
            relayout(made.model, made.placement, output, resume=True, layout=kind)
            seen.append(found() - before)
        assert files_of(output) == files_of(made.layout)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)
    assert len(seen) > 20
    # Those that died late left more.
    assert seen[0] == 0
    assert max(seen[-7:]) > max(seen[:7]) + 10_000


def test_killed_again_and_again(tmp_path: Path, made: Made, kind: str) -> None:
    """Each run dies a few operations after it began, and still one of them comes to an end."""
    output = tmp_path / "out"
    at = 12
    while dies(lambda: relayout(made.model, made.placement, output, resume=True, layout=kind), at):
        at += 1
        assert at < 80
    assert files_of(output) == files_of(made.layout)


def test_what_is_written_is_not_written_again(
    tmp_path: Path, made: Made, kind: str, partial: Path, found: Callable[[], int]
) -> None:
    size = (partial / WEIGHTS[kind]).stat().st_size
    with Disk(10_000).installed() as disk:
        relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)
    assert found() > 0.4 * size
    assert files_of(tmp_path / "out") == files_of(made.layout)
    with Disk(10_000).installed() as whole:
        relayout(made.model, made.placement, tmp_path / "again", layout=kind)
    assert disk.done.count("write") < 0.75 * whole.done.count("write")


def test_damage_to_what_is_left_is_found(tmp_path: Path, made: Made, kind: str, partial: Path) -> None:
    """Bytes that differ, that are missing, or that follow where nothing should."""
    random = np.random.default_rng(0)
    saved = Path(shutil.copytree(partial, tmp_path / "saved"))
    path = partial / WEIGHTS[kind]
    size = path.stat().st_size
    places = random.integers(0, size, 8).tolist()

    def cut(at: int) -> None:
        path.write_bytes(path.read_bytes()[:at])

    damages: list[Callable[[], object]] = [functools.partial(flip, path, at) for at in (0, size - 1, *places)]
    damages += [functools.partial(cut, at) for at in (0, 1, 4096, *places[:3])]
    damages += [lambda: path.write_bytes(path.read_bytes() + random.bytes(100_000)), path.unlink]
    for damage in damages:
        damage()
        relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)
        assert files_of(tmp_path / "out") == files_of(made.layout)
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(saved, partial)


def edit(partial: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = partial / JOURNAL_FILE
    path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n"))))


def with_version(lines: list[bytes], version: int) -> list[bytes]:
    first = json.loads(lines[0])
    assert first["version"] != version
    text = json.dumps({**first, "version": version}, sort_keys=True, separators=(",", ":"))
    return [text.encode(), *lines[1:]]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: with_version(lines, 2),
        lambda lines: [lines[0].replace(b"neuralink ", b"neuralink 9."), *lines[1:]],
        lambda lines: [*lines[:3], b"{", *lines[3:]],
        lambda lines: [*lines[:3], b'{"file":"model.flash.safetensors"}', *lines[3:]],
        lambda lines: [*lines[:3], b'{"file":1,"sha256":2,"size":[]}', *lines[3:]],
        lambda lines: [*lines[:3], b"null", *lines[3:]],
        lambda lines: [*lines[:3], b"\xff\xfe\0", *lines[3:]],
        lambda lines: lines[1:],
        lambda lines: [],
    ],
)
def test_a_journal_that_is_damaged_or_of_another_version_is_left_alone(
    tmp_path: Path,
    made: Made,
    kind: str,
    partial: Path,
    change: Callable[[list[bytes]], list[bytes]],
    caplog: pytest.LogCaptureFixture,
    found: Callable[[], int],
) -> None:
    edit(partial, change)
    relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)
    assert "starting afresh: what is left in" in caplog.text
    assert found() == 0
    assert files_of(tmp_path / "out") == files_of(made.layout)


def test_the_last_line_of_a_journal_may_be_cut(
    tmp_path: Path, made: Made, kind: str, partial: Path, found: Callable[[], int]
) -> None:
    path = partial / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-30])
    relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)
    assert found() > 10_000
    assert files_of(tmp_path / "out") == files_of(made.layout)


def test_lies_in_a_journal_are_not_believed(tmp_path: Path, made: Made, kind: str, partial: Path) -> None:
    """Sizes and digests that are not those of the file."""
    edit(partial, lambda lines: [re.sub(rb'"sha256":"..', b'"sha256":"zz', line) for line in lines])
    edit(partial, lambda lines: [lines[0], *(re.sub(rb'"size":', b'"size":1', line) for line in lines[1:])])
    relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)
    assert files_of(tmp_path / "out") == files_of(made.layout)


def test_another_placement_starts_afresh(
    tmp_path: Path, made: Made, kind: str, partial: Path, caplog: pytest.LogCaptureFixture, found: Callable[[], int]
) -> None:
    assert partial.exists()
    other = write_random_placement(made.model, tmp_path / "other", seed=7)
    relayout(made.model, other, tmp_path / "out", resume=True, layout=kind)
    assert "starting afresh" in caplog.text
    assert found() == 0
    relayout(made.model, other, tmp_path / "expected", layout=kind)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("options", [{"alignment": 512}, {"resident": "gate"}, {"layout": "permuted"}])
def test_other_options_start_afresh(
    tmp_path: Path, layouts: LayoutFactory, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neuralink_cli")
    model, placement = layouts.checkpoint("llama", shards=2)
    assert dies(lambda: relayout(model, placement, tmp_path / "out"), 30)
    relayout(model, placement, tmp_path / "out", resume=True, **options)
    assert "starting afresh" in caplog.text
    relayout(model, placement, tmp_path / "expected", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_a_changed_source_starts_afresh(
    tmp_path: Path, layouts: LayoutFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where the fingerprint, which samples the weights, is the same."""
    caplog.set_level(logging.INFO, "neuralink_cli")
    model, placement = layouts.checkpoint("llama", shards=2, neurons=300, hidden=100)
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    assert dies(lambda: relayout(copy, placement, tmp_path / "out"), 30)
    shard = copy / "model-00001-of-00002.safetensors"
    flip(shard, shard.stat().st_size - 50_000)
    relayout(copy, placement, tmp_path / "out", resume=True)
    assert "starting afresh" in caplog.text
    assert verify(copy, tmp_path / "out").mode == "full"


def test_without_resume_nothing_is_taken_over(
    tmp_path: Path, made: Made, kind: str, partial: Path, found: Callable[[], int]
) -> None:
    assert partial.exists()
    relayout(made.model, made.placement, tmp_path / "out", layout=kind)
    assert found() == 0
    assert files_of(tmp_path / "out") == files_of(made.layout)


def test_a_failure_leaves_what_can_be_resumed(tmp_path: Path, made: Made, kind: str) -> None:
    """With an old output in place, which stays until the end."""
    output = Path(shutil.copytree(made.layout, tmp_path / "out"))
    before = files_of(output)
    other = write_random_placement(made.model, tmp_path / "other", seed=7)
    relayout(made.model, other, tmp_path / "expected", layout=kind)
    operations = 0
    for _ in faults(lambda: relayout(made.model, other, output, resume=True, overwrite=True, layout=kind)):
        operations += 1
        assert files_of(output) in (before, files_of(tmp_path / "expected"))
    assert operations > 20
    assert files_of(output) == files_of(tmp_path / "expected")
    assert not (tmp_path / ".out.partial").exists()


def test_two_runs_cannot_resume_the_same(
    tmp_path: Path, made: Made, kind: str, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def meanwhile(*args: Any, **options: Any) -> Any:
        relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)

    before = files_of(partial)
    monkeypatch.setattr("neuralink_cli.rewriting.relayout.open_journal", meanwhile)
    with pytest.raises(OutputError, match="another run is writing this output"):
        relayout(made.model, made.placement, tmp_path / "out", resume=True, layout=kind)
    assert files_of(partial) == before
