"""Makes a chosen one of the operations that reach the disk fail, or the process die there."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli import signals
from neuralink_cli.errors import OutputError
from neuralink_cli.files import durable


def fail() -> None:
    """The device reports an error."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def die() -> None:
    """The process is killed, or the machine with it."""
    os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """Counts the operations that reach the disk, and acts in the one with number `at` (from 1) instead of doing it.

    Of a write that is hit, half still happens.
    """

    def __init__(self, at: int, act: Callable[[], None] = fail) -> None:
        self.at = at
        self.act = act
        self.done: list[str] = []

    @property
    def hit(self) -> bool:
        """Whether the operation came."""
        return len(self.done) >= self.at

    def step(self, name: str) -> None:
        """One more operation."""
        self.done.append(name)
        if len(self.done) == self.at:
            self.act()

    @contextlib.contextmanager
    def installed(self) -> Iterator[Disk]:
        """Watch the operations inside the block."""
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if len(disk.done) + 1 == disk.at:
                    super().write(memoryview(data)[: len(memoryview(data)) // 2])
                disk.step("write")
                return super().write(data)

        def open_path(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if mode != "xb":
                return whole_open(path, mode, *args, **options)
            disk.step("create")
            return File(path, "xb")

        def open_new_file(path: Path) -> File:
            disk.step("create")
            return File(path, "xb")

        def open_descriptor(descriptor: int, mode: str, *args: Any, **options: Any) -> Any:
            if "w" not in mode:
                return whole_fdopen(descriptor, mode, *args, **options)
            return File(descriptor, "r+b")

        def open_new(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_EXCL:
                disk.step("create")
            return plain_open(path, flags, *args, **options)

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if len(disk.done) + 1 == disk.at:
                half = len(memoryview(data)) // 2
                # Whole pages, which is what direct writes need.
                plain_pwrite(descriptor, memoryview(data)[: half - half % 4096], offset)
            disk.step("write")
            return plain_pwrite(descriptor, data, offset)

        plain_open, plain_pwrite = os.open, os.pwrite
        whole_open, whole_fdopen = Path.open, os.fdopen
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", open_path)
            patch.setattr(durable, "open_new", open_new_file)
            patch.setattr(os, "fdopen", open_descriptor)
            patch.setattr(os, "open", open_new)
            patch.setattr(os, "pwrite", pwrite)
            for owner, name in (
                (os, "fsync"),
                (os, "write"),
                (os, "truncate"),
                (shutil, "copyfile"),
                (Path, "mkdir"),
                (Path, "rename"),
                (Path, "replace"),
                (Path, "write_text"),
                (Path, "write_bytes"),
                (durable, "_exchange_atomically"),
            ):
                patch.setattr(owner, name, self._watched(name, getattr(owner, name)))
            yield self

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.step(name)
            return function(*args, **options)

        return watched


def faults(run: Callable[[], object], act: Callable[[], None] = fail) -> Iterator[Disk]:
    """Run again and again, the first operation failing, then the second, and so on, until a run needs no more of them.

    Yields after each run that was hit. The last run, which succeeded, is not yielded.
    """
    for at in range(1, 1000):
        disk = Disk(at, act)
        with disk.installed():
            try:
                run()
            except (OSError, OutputError) as error:
                assert os.strerror(errno.EIO) in str(error)
            else:
                if disk.hit:
                    raise AssertionError(f"the failure of operation {at}, {disk.done[-1]}, went unnoticed")
                return
        yield disk
    raise AssertionError("no end of it")


def dies(run: Callable[[], object], at: int) -> bool:
    """Run in a process of its own that is killed in operation number `at`; whether it came to that."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Disk(at, die).installed():
                run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def deaths(run: Callable[[], object], *, first: int = 1, step: int = 1) -> Iterator[int]:
    """As `faults`, but each run is a process of its own that is killed; yields after each kill.

    Args:
        first, step: Die at every `step`-th operation, from number `first` on: for runs of very many.
    """
    for at in range(first, 1000, step):
        if not dies(run, at):
            return
        yield at
    raise AssertionError("no end of it")


def hold_flushes() -> None:
    """From here on this process flushes no large file before a signal has come, so that it is not done by then."""
    fsync = os.fsync

    def held(descriptor: int) -> None:
        until = time.monotonic() + 60
        large = os.fstat(descriptor).st_size > 2**20
        while large and signals._state.first is None and time.monotonic() < until:
            time.sleep(0.001)
        fsync(descriptor)

    pytest.MonkeyPatch().setattr(os, "fsync", held)


@contextlib.contextmanager
def flushed() -> Iterator[Callable[[Path], list[str]]]:
    """Watches what is flushed to the device, and tells which files and folders under a path were not, as they are."""
    sizes: dict[int, int] = {}
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        status = os.fstat(descriptor)
        sizes[status.st_ino] = status.st_size
        fsync(descriptor)

    def forgotten(path: Path) -> list[str]:
        found = []
        for each in (path, *path.rglob("*")):
            status = each.stat()
            if status.st_ino not in sizes or (each.is_file() and sizes[status.st_ino] != status.st_size):
                found.append(str(each.relative_to(path)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        yield forgotten


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size`: the write that reaches it is cut short, the next one fails. As on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
