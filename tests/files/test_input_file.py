"""Inputs are regular files: nothing keeps a command waiting, and what cannot be opened is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neuralink_cli.errors import InputError, OutputError
from neuralink_cli.files.durable import new_file, require_free, write_file
from neuralink_cli.files.input_file import read_input, require_reachable
from tests.faults import file_size_limit


def test_reads_a_file_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some")
    (tmp_path / "link").symlink_to("file")
    assert read_input(tmp_path / "file") == read_input(tmp_path / "link") == b"some"


def test_a_pipe_a_device_a_folder_and_a_bad_name_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device"), (tmp_path, "directory")):
        with pytest.raises(InputError, match=f"is a {kind}, not a regular file"):
            read_input(path)
    for name, reason in (("x" * 300, "File name too long"), ("a\0b", "null"), ("absent", "No such file")):
        with pytest.raises(InputError, match=reason):
            read_input(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "loop", "a\0b"):
        with pytest.raises(InputError):
            require_reachable(tmp_path / name)
    require_reachable(tmp_path / "absent")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_device_or_pipe_is_never_replaced_nor_a_link_to_one(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        for directory in (False, True):
            with pytest.raises(OutputError, match="which is never replaced"):
                require_free(path, overwrite, directory=directory)
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(OutputError, match="File name too long"):
        require_free(tmp_path / ("x" * 300), overwrite)


def test_a_full_disk_is_told_with_the_name_of_the_output(tmp_path: Path) -> None:
    with file_size_limit(10):
        with (
            pytest.raises(OutputError, match=r"out: cannot be written \(File too large\)"),
            new_file(tmp_path / "out") as file,
        ):
            while True:
                file.write(b"123456")
        with pytest.raises(OutputError, match="small: cannot be written"):
            write_file(tmp_path / "small", bytes(11))
    assert not (tmp_path / "out").exists()
