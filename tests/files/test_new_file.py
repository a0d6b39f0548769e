from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.errors import OutputError
from neuralink_cli.files.durable import new_directory, new_file, require_free
from neuralink_cli.signals import Terminated, stopping_signals
from tests.faults import deaths, faults, flushed


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_new_file(path: Path, *, overwrite: bool = True) -> None:
    with new_file(path, overwrite=overwrite) as handle:
        handle.write(b"new")
        handle.write(b" content")


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with new_file(path) as handle:
        handle.write(b"12")
        assert not path.exists()
        assert names_in(tmp_path) == [".x.partial"]
    assert path.read_bytes() == b"12"
    assert names_in(tmp_path) == ["x"]


def test_a_file_can_be_named_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_new_file(Path("x"))
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_leaves_no_file_or_the_old_one(tmp_path: Path, exists: bool, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    if exists:
        path.write_bytes(b"old")
    with pytest.raises(error), new_file(path, overwrite=True) as handle:
        handle.write(b"new")
        raise error
    assert names_in(tmp_path) == (["x"] if exists else [])
    assert not exists or path.read_bytes() == b"old"


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="x: already exists; choose another output or pass --overwrite"):
        write_new_file(path, overwrite=False)
    assert path.read_bytes() == b"old"
    write_new_file(path)
    assert path.read_bytes() == b"new content"
    assert names_in(tmp_path) == ["x"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(OutputError, match="already exists"), new_file(path) as handle:
        handle.write(b"new")
        path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's"
    assert names_in(tmp_path) == ["x"]


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "absent")
    with pytest.raises(OutputError, match="already exists"):
        write_new_file(tmp_path / "x", overwrite=False)


def test_overwriting_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "x").symlink_to("target")
    write_new_file(tmp_path / "x")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert (tmp_path / "x").read_bytes() == b"new content"


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match="x: is a directory, but the output is a file"):
        write_new_file(tmp_path / "x")
    # Known before any work is done.
    with pytest.raises(OutputError, match="x: is a directory, but the output is a file"):
        require_free(tmp_path / "x", overwrite=True)
    assert names_in(tmp_path) == ["x"]


def test_a_file_being_written_by_another_run_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with new_file(path) as handle:
        with pytest.raises(OutputError, match="x: another run is writing this output; wait for it to end"):
            write_new_file(path)
        handle.write(b"first")
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("a_third_began", [False, True])
def test_a_run_that_ends_between_our_opening_and_locking_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a_third_began: bool
) -> None:
    path, partial = tmp_path / "x", tmp_path / ".x.partial"
    partial.write_bytes(b"another's")
    flock = fcntl.flock

    def flock_late(descriptor: int, operation: int) -> None:
        if not path.exists():
            partial.rename(path)
            if a_third_began:
                partial.write_bytes(b"a third's")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with new_file(path, overwrite=True) as handle:
        handle.write(b"new content")
        assert path.read_bytes() == b"another's"
    assert path.read_bytes() == b"new content"
    assert names_in(tmp_path) == ["x"]


def test_takes_over_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".x.partial").write_bytes(b"something much longer than the new content")
    write_new_file(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new content"
    assert names_in(tmp_path) == ["x"]


def test_a_link_in_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / ".x.partial").symlink_to("target")
    with pytest.raises(OutputError, match="x: cannot be written"):
        write_new_file(tmp_path / "x")
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_the_content_is_on_the_device_before_the_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    seen = []
    with flushed() as forgotten:

        def watched(path: Path, target: Path) -> Path:
            seen.append((path.name, target.name, forgotten(path)))
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", watched)
        write_new_file(tmp_path / "x")
        assert seen == [(".x.partial", "x", [])]
        assert forgotten(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_every_failure_while_writing_a_file(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "x"
    if exists:
        path.write_bytes(b"old")
    operations = 0
    for disk in faults(lambda: write_new_file(path)):
        operations += 1
        # After the rename, all that can fail is to make it durable.
        complete = disk.done.count("replace") == 1 and disk.done[-1] != "replace"
        assert names_in(tmp_path) == (["x"] if exists or complete else [])
        assert not path.exists() or path.read_bytes() == (b"new content" if complete else b"old")
        path.unlink(missing_ok=True)
        if exists:
            path.write_bytes(b"old")
    assert operations >= 5
    assert path.read_bytes() == b"new content"


def test_every_death_while_writing_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    seen = set()
    for _ in deaths(lambda: write_new_file(path)):
        seen.add(path.read_bytes())
        assert set(names_in(tmp_path)) <= {"x", ".x.partial"}
        path.write_bytes(b"old")
    assert seen == {b"old", b"new content"}
    assert names_in(tmp_path) == ["x"]


class Finaliser:
    """What Python drops the exceptions of; here that of a signal."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """What is done about signals is as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_signal_that_python_drops_still_stops_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))
    path = tmp_path / "out"
    opened: Any = new_file(path) if kind == "file" else new_directory(path, replaceable=lambda _: True)
    with pytest.raises(Terminated), stopping_signals():
        with opened:
            Finaliser()
            assert dropped == [Terminated]
        pytest.fail("it took its place")
    assert names_in(tmp_path) == []
    # Where nothing is to be stopped any more, outputs are written as ever.
    write_new_file(path)
    assert path.read_bytes() == b"new content"
