"""Writes one large file from start to end, hashing and writing in the background while the caller makes more bytes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes
from neuralink_cli.files.bulk_io import PAGE, SequentialWrites, transfer_buffer
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.journal import Journal


class OutputFile:
    """A file that is hashed as it is written. Flushed to the device if the block ends without an exception.

    Args:
        progress: Called with the number of bytes just accepted.
        journal: Records the size of the file at every `mark`. If it knows the file from an earlier run, writing resumes
            where that run stopped.

    Attributes:
        size: Bytes written so far, including those of the earlier run.
    """

    def __init__(
        self, path: Path, progress: Callable[[int], object] | None = None, journal: Journal | None = None
    ) -> None:
        self._name = path.name
        self._progress = progress
        self._journal = journal
        self.size: int = 0
        self._digest: Any = hashlib.sha256()
        if journal is not None:
            self.size, self._digest = journal.reopen(path, progress)
        self._file = SequentialWrites(path, new=self.size == 0)
        self._stages = ExitStack()
        self._hasher = self._stages.enter_context(pipeline.stage("hash"))
        self._writer = self._stages.enter_context(pipeline.stage("write"))
        # Full buffers, each with its pending tasks.
        self._behind: deque[tuple[Bytes, deque[Future[Any]]]] = deque()
        # The buffer being filled: how many bytes are filled, how many of them the hasher has, and its pending tasks.
        self._buffer = _new_buffer()
        self._filled = self._hashed = self.size % PAGE
        self._tasks: deque[Future[Any]] = deque()
        if self._filled:
            with ByteFile(path) as before:
                before.read_at(self.size - self._filled, self._buffer[: self._filled])

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stages:
                if kind is None:
                    self._hand_over()
                    while self._behind:
                        self._settle()
            if kind is None:
                self._file.flush()
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        """Digest of everything written so far."""
        self._hash()
        return str(self._hasher.submit(self._digest.hexdigest).result())

    def write(self, data: npt.NDArray[Any] | bytes) -> None:
        """Append bytes. The caller may change `data` afterwards."""
        view = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
        done = 0
        while done < view.size:
            taken = min(self._buffer.size - self._filled, view.size - done)
            self._buffer[self._filled : self._filled + taken] = view[done : done + taken]
            self._filled += taken
            self.size += taken
            done += taken
            if self._filled == self._buffer.size:
                self._hand_over()
                self._buffer = self._free_buffer()
        if self._progress is not None:
            self._progress(view.size)

    def mark(self) -> None:
        """Record in the journal how much of the file is written."""
        if self._journal is not None:
            self._hash()
            self._add(self._hasher.submit(self._note, self._journal, self.size))

    def _note(self, journal: Journal, size: int) -> None:
        journal.add(self._name, size, self._digest.hexdigest())

    def _hash(self) -> None:
        self._add(self._hasher.submit(self._digest.update, self._buffer[self._hashed : self._filled].data))
        self._hashed = self._filled

    def _add(self, task: Future[Any]) -> None:
        # A buffer may take thousands of small sections, whose tasks are larger than they are.
        while self._tasks and self._tasks[0].done():
            self._tasks.popleft().result()
        self._tasks.append(task)

    def _hand_over(self) -> None:
        self._hash()
        data = self._buffer[: self._filled]
        self._add(self._writer.submit(self._file.write, data, self.size - self._filled))
        self._behind.append((self._buffer, self._tasks))
        self._tasks, self._filled, self._hashed = deque(), 0, 0

    def _free_buffer(self) -> Bytes:
        in_flight = len(self._behind) * pipeline.PIECE
        if in_flight >= pipeline.BEHIND or all(task.done() for task in self._behind[0][1]):
            return self._settle()
        return _new_buffer()

    def _settle(self) -> Bytes:
        """Wait until the oldest buffer is hashed and written."""
        buffer, tasks = self._behind.popleft()
        for task in tasks:
            task.result()
        return buffer


def _new_buffer() -> Bytes:
    return transfer_buffer(pipeline.PIECE)[: pipeline.PIECE]
