"""An open file with positional reads. Any number of threads may read at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from neuralink_cli.arrays import Bytes
from neuralink_cli.errors import InputError
from neuralink_cli.files.bulk_io import PAGE, DirectReads
from neuralink_cli.files.input_file import open_input, why
from neuralink_cli.files.mapping import map_file

File = TypeVar("File", bound="ByteFile")

# Linux transfers at most 2 GiB minus a page per call.
_MAX_READ = 1 << 30
# Weights are moved as integers of at most this many bytes.
_WIDEST = 8


class ByteFile:
    """Reads ranges of one file. Use as a context manager.

    Attributes:
        size: Bytes of the file when it was opened.

    Raises:
        InputError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._direct: DirectReads | None = None
        self._lock = threading.Lock()
        self._descriptor = open_input(path)
        self.size = os.fstat(self._descriptor).st_size

    def __enter__(self: File) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless when closed already."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._direct is not None:
            self._direct.close()

    def read_at(self, offset: int, buffer: Bytes) -> None:
        """Fill a contiguous uint8 buffer from an absolute file offset.

        Raises:
            InputError: The file ends too early (it was truncated while open) or reading fails.
        """
        view = buffer.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + _MAX_READ]], offset + done)
            except OSError as error:
                raise InputError(f"reading failed ({error.strerror})", where=self.path) from None
            if count == 0:
                raise InputError("file ended while it was being read", where=self.path)
            done += count

    def map_range(self, offset: int, size: int) -> Bytes:
        """Map a range of the file into memory, as uint8 `[size]`; it stays mapped until its last view is gone.

        Pages come from the page cache when they are touched. Writing to one gives this process a copy of it.

        Raises:
            InputError: The system cannot map it.
        """
        try:
            return map_file(self._descriptor, offset, size)
        except OSError as error:
            raise InputError(f"cannot be mapped into memory ({why(error)})", where=self.path) from None

    def read_range(self, offset: int, size: int, buffer: Bytes) -> Bytes:
        """Read `size` bytes at a file offset into a buffer from `transfer_buffer`; return the part that holds them.

        Bypasses the page cache if the file system supports it.

        Raises:
            InputError: As `read_at`.
        """
        # Data at an odd file offset is aligned in memory, where whole elements are moved.
        lead = offset % PAGE if offset % _WIDEST == 0 else 0
        data = buffer[lead : lead + size]
        try:
            direct = self._open_direct().read(offset, size, buffer) if lead == offset % PAGE else None
        except OSError as error:
            raise InputError(f"reading failed ({error.strerror})", where=self.path) from None
        if direct is None:
            self.read_at(offset, data)
        return data

    def _open_direct(self) -> DirectReads:
        with self._lock:
            if self._direct is None:
                self._direct = DirectReads(self.path, self._descriptor)
            return self._direct
