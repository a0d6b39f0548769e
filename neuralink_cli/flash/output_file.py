"""Writes one large file from start to end while its SHA-256 is taken beside the writing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from neuralink_cli.checkpoint.durable import write_all

Bytes = npt.NDArray[np.uint8]


class OutputFile:
    """A new file whose bytes are hashed as they are written. Flushed to the device when the block ends well.

    Args:
        progress: Called with the number of bytes just written.
    """

    def __init__(self, path: Path, progress: Callable[[int], object] | None = None) -> None:
        self._handle = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._progress = progress
        self.size = 0

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        if kind is None:
            os.fsync(self._handle.fileno())
        self._handle.close()

    @property
    def sha256(self) -> str:
        """Digest of everything written so far."""
        return self._digest.hexdigest()

    def write(self, data: Bytes | bytes) -> None:
        """Append bytes."""
        view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
        hashed = self._hasher.submit(self._digest.update, view)
        write_all(self._handle, view)
        hashed.result()
        self.size += len(view)
        if self._progress is not None:
            self._progress(len(view))
