"""Direct transfers, and what takes their place where the file system has none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.files import bulk_io
from neuralink_cli.files.bulk_io import PAGE, DirectReads, SequentialWrites, transfer_buffer
from neuralink_cli.files.byte_file import ByteFile


def refuse_open(patch: pytest.MonkeyPatch) -> None:
    """As a file system without direct transfers does."""
    plain = os.open

    def refusing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, *args, **options)

    patch.setattr(os, "open", refusing)


def refuse_transfers(patch: pytest.MonkeyPatch) -> None:
    """As a file system that changes its mind, or wants other multiples."""
    import fcntl

    for name in ("preadv", "pwrite"):
        plain = getattr(os, name)

        def refusing(descriptor: int, *args: Any, plain: Callable[..., int] = plain) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return plain(descriptor, *args)

        patch.setattr(os, name, refusing)


@pytest.fixture(params=["direct", "cannot be opened", "cannot transfer", "other system"], autouse=True)
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cannot be opened":
        refuse_open(monkeypatch)
    elif request.param == "cannot transfer":
        refuse_transfers(monkeypatch)
    elif request.param == "other system":
        monkeypatch.setattr(bulk_io, "_DIRECT", 0)
    name: str = request.param
    return name


@pytest.mark.parametrize("size", [0, 1, PAGE, (1 << 21) + 5])
def test_buffers_are_aligned_and_have_room(size: int) -> None:
    buffer = transfer_buffer(size)
    assert buffer.ctypes.data % PAGE == 0
    assert buffer.size >= size + 2 * PAGE
    buffer[:] = 1


def test_reads_any_range(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    content = random.integers(0, 256, 5 * PAGE + 123, dtype=np.uint8)
    path = tmp_path / "x"
    path.write_bytes(content.tobytes())
    edges = [0, 1, 8, PAGE - 8, PAGE, 2 * PAGE + 16, content.size - 1, content.size]
    with ByteFile(path) as file:
        for start in edges:
            for stop in edges:
                if start <= stop:
                    data = file.read_range(start, stop - start, transfer_buffer(stop - start))
                    assert np.array_equal(data, content[start:stop])
                    assert start % 8 or data.ctypes.data % 8 == 0
                    assert start % 8 == 0 or data.ctypes.data % 8 == 0


def test_a_file_that_was_cut_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 * PAGE))
    with ByteFile(path) as file:
        os.truncate(path, PAGE + 10)
        for start in (0, PAGE, PAGE + 8, 2 * PAGE):
            with pytest.raises(InputError, match="file ended while it was being read"):
                file.read_range(start, 3 * PAGE - start, transfer_buffer(3 * PAGE))


def test_a_device_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(PAGE))

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ByteFile(path) as file:
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(InputError, match="reading failed"):
            file.read_range(0, PAGE, transfer_buffer(PAGE))


@pytest.mark.parametrize("tail", [0, 1, PAGE - 1])
def test_what_is_written_is_there(tmp_path: Path, tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_io, "_WRITE_BEHIND", 2 * PAGE)
    monkeypatch.setattr(bulk_io, "_MOST", 2 * PAGE)
    random = np.random.default_rng(0)
    content = transfer_buffer(8 * PAGE)[: 7 * PAGE + tail]
    content[:] = random.integers(0, 256, content.size, dtype=np.uint8)
    file = SequentialWrites(tmp_path / "x", new=True)
    file.write(content[: 4 * PAGE], 0)
    file.write(content[4 * PAGE :], 4 * PAGE)
    file.flush()
    file.close()
    assert (tmp_path / "x").read_bytes() == content.tobytes()
    again = SequentialWrites(tmp_path / "x", new=False)
    again.write(content[:PAGE], 2 * PAGE)
    again.close()
    assert (tmp_path / "x").read_bytes()[2 * PAGE : 3 * PAGE] == content[:PAGE].tobytes()


def test_a_new_file_replaces_none_and_follows_no_link(tmp_path: Path, file_system: str) -> None:
    (tmp_path / "x").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("x")
    if file_system != "cannot be opened":
        with pytest.raises(FileExistsError):
            SequentialWrites(tmp_path / "x", new=True)
    for new in (True, False):
        with pytest.raises(OSError, match=r"exists|symbolic links"):
            SequentialWrites(tmp_path / "link", new=new)
    assert (tmp_path / "x").read_bytes() == b"precious"


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    with (tmp_path / "x").open("rb") as opened:
        reads = DirectReads(tmp_path / "x", opened.fileno())
    reads.close()
    reads.close()
    assert reads.read(0, 10, transfer_buffer(10)) is None


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_keeps_its_bytes_when_its_name_goes_to_another(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * PAGE)
    with ByteFile(path) as file:
        path.unlink()
        if replaced:
            path.write_bytes(b"b" * PAGE)
        assert file.read_range(0, PAGE, transfer_buffer(PAGE)).tobytes() == b"a" * PAGE
