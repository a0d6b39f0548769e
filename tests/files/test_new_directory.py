from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from neuralink_cli.errors import OutputError
from neuralink_cli.files import durable
from neuralink_cli.files.durable import new_directory, sync_file
from tests.checkpoints import files_of
from tests.faults import deaths, faults

OLD = {"a": b"old a", "only-old/b": b"old b"}
NEW = {"a": b"new a", "c": b"new c"}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_old(path: Path) -> None:
    for name, content in OLD.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def write_new(path: Path, *, overwrite: bool = True) -> None:
    with new_directory(path, overwrite=overwrite, replaceable=lambda _: True) as directory:
        assert not any(directory.iterdir())
        for name, content in NEW.items():
            (directory / name).write_bytes(content)
            sync_file(directory / name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with new_directory(path, replaceable=lambda _: False) as directory:
        (directory / "a").write_bytes(b"1")
        assert not path.exists()
        assert names_in(tmp_path) == [".x.partial"]
    assert files_of(tmp_path) == {"x/a": b"1"}


def test_a_directory_can_be_named_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        write_new(Path("x"))
        assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_leaves_no_directory_or_the_old_one(
    tmp_path: Path, exists: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "x"
    if exists:
        write_old(path)
    with pytest.raises(error), new_directory(path, overwrite=True, replaceable=lambda _: True) as directory:
        (directory / "a").write_bytes(b"new")
        raise error
    assert names_in(tmp_path) == (["x"] if exists else [])
    assert not exists or files_of(path) == OLD


def test_an_existing_directory_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_old(path)
    with pytest.raises(OutputError, match="already exists; choose another output or pass --overwrite"):
        write_new(path, overwrite=False)
    assert files_of(path) == OLD
    write_new(path)
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}


def test_only_what_may_be_replaced_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_old(path)
    seen = []

    def replaceable(directory: Path) -> bool:
        seen.append(directory)
        return False

    with (
        pytest.raises(OutputError, match="is not an earlier output of this kind, so it is not deleted"),
        new_directory(path, overwrite=True, replaceable=replaceable),
    ):
        raise AssertionError
    assert seen == [path]
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in OLD.items()}


def test_what_must_not_be_replaced_any_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir()
    with (
        pytest.raises(OutputError, match="so it is not deleted"),
        new_directory(path, overwrite=True, replaceable=lambda _: False) as directory,
    ):
        (directory / "a").write_bytes(b"new")
        (path / "precious").write_bytes(b"put there meanwhile")
    assert files_of(tmp_path) == {"x/precious": b"put there meanwhile"}


def test_an_empty_directory_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with new_directory(tmp_path / "x", overwrite=True, replaceable=lambda _: False) as directory:
        (directory / "a").write_bytes(b"new")
    assert files_of(tmp_path) == {"x/a": b"new"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_only_a_directory_is_replaced_by_a_directory(tmp_path: Path, kind: str) -> None:
    write_old(tmp_path / "target")
    if kind == "file":
        (tmp_path / "x").write_bytes(b"precious")
    else:
        (tmp_path / "x").symlink_to("target", target_is_directory=True)
    with pytest.raises(OutputError, match="is not a directory; choose another output"):
        write_new(tmp_path / "x")
    assert files_of(tmp_path / "target") == OLD
    assert names_in(tmp_path) == ["target", "x"]


def test_a_directory_being_written_by_another_run_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with new_directory(path, replaceable=lambda _: True) as directory:
        (directory / "a").write_bytes(b"first")
        with pytest.raises(OutputError, match="another run is writing this output"):
            write_new(path)
    assert files_of(tmp_path) == {"x/a": b"first"}


def test_no_run_starts_while_another_clears_away_what_it_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being deleted has the name under which a new run would begin to write."""
    path = tmp_path / "x"
    write_old(path)
    rmtree = shutil.rmtree
    attempts = []

    def rmtree_with_company(directory: Path, *, ignore_errors: bool = False) -> None:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        attempts.append(directory)
        with pytest.raises(OutputError, match="another run is writing this output"):
            write_new(path)
        rmtree(directory, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree_with_company)
    write_new(path)
    assert [directory.name for directory in attempts] == [".x.partial"]
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}


def test_a_directory_is_not_replaced_while_another_run_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_old(path)
    with locked(path), pytest.raises(OutputError, match="another run is writing this output"):
        write_new(path)
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in OLD.items()}


def test_takes_over_the_directory_that_a_killed_run_left(tmp_path: Path) -> None:
    write_old(tmp_path / ".x.partial")
    (tmp_path / ".x.partial" / "link").symlink_to("only-old", target_is_directory=True)
    write_new(tmp_path / "x")
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}


def test_a_link_in_place_of_the_partial_directory_is_not_followed(tmp_path: Path) -> None:
    write_old(tmp_path / "target")
    (tmp_path / ".x.partial").symlink_to("target", target_is_directory=True)
    with pytest.raises(OutputError, match="x: cannot be written"):
        write_new(tmp_path / "x")
    assert files_of(tmp_path / "target") == OLD


def test_a_file_in_place_of_the_partial_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".x.partial").write_bytes(b"left by a run for a file")
    with pytest.raises(OutputError, match="x: cannot be written"):
        write_new(tmp_path / "x")


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("exists", [False, True])
def test_every_failure_while_writing_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, atomic: bool
) -> None:
    if not atomic:
        monkeypatch.setattr(durable, "_exchange_atomically", lambda *_: False)
    path = tmp_path / "x"
    if exists:
        write_old(path)
    seen = []
    for _ in faults(lambda: write_new(path)):
        assert names_in(tmp_path) in (["x"], *([] if exists else [[]]))
        seen.append(files_of(path) if path.exists() else {})
        assert seen[-1] in (NEW, OLD if exists else {})
        if path.exists():
            shutil.rmtree(path)
        if exists:
            write_old(path)
    assert len(seen) >= 7
    # Everything before the rename leaves what was there.
    assert [state == NEW for state in seen] == sorted(state == NEW for state in seen)
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}


def test_every_death_while_writing_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_old(path)
    states = []
    for _ in deaths(lambda: write_new(path)):
        states.append(files_of(path))
        assert states[-1] in (OLD, NEW)
        assert set(names_in(tmp_path)) <= {"x", ".x.partial"}
        shutil.rmtree(path)
        write_old(path)
    assert OLD in states
    assert NEW in states
    assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}


def test_where_directories_cannot_be_exchanged_at_once_no_death_loses_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_exchange_atomically", lambda *_: False)
    path = tmp_path / "x"
    write_old(path)
    for _ in deaths(lambda: write_new(path)):
        kept = [directory for directory in tmp_path.iterdir() if files_of(directory) in (OLD, NEW)]
        assert kept
        # The next run clears up, wherever the one before died.
        write_new(path)
        assert files_of(tmp_path) == {f"x/{name}": content for name, content in NEW.items()}
        shutil.rmtree(path)
        write_old(path)
