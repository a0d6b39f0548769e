"""Copies of whole files: streamed, hashed on the way, with their permissions, on the device at the end."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from neuralink_cli.errors import InputError, OutputError
from neuralink_cli.files.durable import copy_file
from neuralink_cli.files.input_file import digest_of
from tests.faults import faults, file_size_limit, flushed

SIZES = (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20)


@pytest.mark.parametrize("size", SIZES)
def test_copy_and_digest_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "link").symlink_to("file")
    expected = hashlib.sha256(content).hexdigest()
    copied: list[int] = []
    read: list[int] = []
    with flushed() as forgotten:
        assert copy_file(tmp_path / "link", tmp_path / "copy", copied.append) == (size, expected)
        assert "copy" not in forgotten(tmp_path)
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_bytes() == content
    assert digest_of(tmp_path / "link", read.append) == expected
    assert sum(copied) == sum(read) == size


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o444, 0o777])
def test_permissions_are_those_of_the_file_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "file").chmod(mode)
    before = os.umask(0o077)
    try:
        copy_file(tmp_path / "file", tmp_path / "copy")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == mode


def test_the_copy_runs_with_nobodys_rights(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "file").chmod(0o6755)
    copy_file(tmp_path / "file", tmp_path / "copy")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o755


def test_a_pipe_is_not_waited_for_and_nothing_is_overwritten(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda: copy_file(tmp_path / "pipe", tmp_path / "copy"), lambda: digest_of(tmp_path / "pipe")):
        with pytest.raises(InputError, match="pipe: is a pipe, not a regular file"):
            read()
    with pytest.raises(InputError, match=r"absent: cannot be opened \(No such file or directory\)"):
        copy_file(tmp_path / "absent", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    for name in ("file", "copy"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "copy"


def test_no_failure_of_the_disk_goes_unnoticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    hit = 0
    for _ in faults(lambda: copy_file(tmp_path / "file", tmp_path / "copy")):
        hit += 1
        (tmp_path / "copy").unlink(missing_ok=True)
    assert hit == 5  # One to create it, three writes, one flush.
    with file_size_limit(2 << 20), pytest.raises(OutputError, match="full: cannot be written"):
        copy_file(tmp_path / "file", tmp_path / "full")
