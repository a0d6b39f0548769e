"""What files and directories have in common."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.errors import OutputError
from neuralink_cli.files.durable import (
    new_directory,
    new_file,
    remove_unfinished,
    require_free,
    require_space,
    write_all,
)
from tests.checkpoints import files_of

Usage = namedtuple("Usage", "total used free")


def write_file(path: Path) -> None:
    with new_file(path, overwrite=True) as handle:
        handle.write(b"content")


def write_directory(path: Path) -> None:
    with new_directory(path, overwrite=True, replaceable=lambda _: True) as directory:
        (directory / "x").write_bytes(b"content")


BOTH: tuple[Callable[[Path], None], ...] = (write_file, write_directory)


def test_the_folder_of_the_output_must_exist(tmp_path: Path) -> None:
    for write in BOTH:
        with pytest.raises(OutputError, match=f"its folder does not exist; create {tmp_path / 'absent'} first"):
            write(tmp_path / "absent" / "x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="its folder does not exist"):
        require_free(tmp_path / "file" / "x", overwrite=False)
    assert files_of(tmp_path) == {"file": b""}


def test_writes_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        write_file(tmp_path / "file")
        write_directory(tmp_path / "folder")
    assert files_of(tmp_path) == {"file": b"content", "folder/x": b"content"}


def test_what_a_killed_run_left_can_be_removed_unless_a_run_is_writing(tmp_path: Path) -> None:
    remove_unfinished(tmp_path / "out")
    with new_file(tmp_path / "out") as handle:
        handle.write(b"content")
        remove_unfinished(tmp_path / "out")
    assert files_of(tmp_path) == {"out": b"content"}
    (tmp_path / ".out.partial").write_bytes(b"half")
    remove_unfinished(tmp_path / "out")
    assert files_of(tmp_path) == {"out": b"content"}


def test_says_what_is_wrong_with_the_folder_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "open", refuse)
    for write in BOTH:
        with pytest.raises(OutputError, match=r"x: cannot be written \(Permission denied\)"):
            write(tmp_path / "x")


def test_writes_everything_though_the_system_takes_a_part_at_a_time(tmp_path: Path) -> None:
    class Slow(FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:3])

    with Slow(tmp_path / "x", "w") as handle:
        write_all(handle, b"0123456789")
        write_all(handle, memoryview(b""))
        write_all(handle, memoryview(b"ab"))
    assert (tmp_path / "x").read_bytes() == b"0123456789ab"


def test_space_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10_000, 0, 4_999)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_space(tmp_path / "x", 4_999)
    with pytest.raises(
        OutputError, match="x: needs 5,000 bytes of disk, 4,999 are free; free some space or write elsewhere"
    ):
        require_space(tmp_path / "x", 5_000)
    assert asked == [tmp_path, tmp_path]
