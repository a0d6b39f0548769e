"""Large sequential reads and writes that bypass the page cache (direct I/O) where the file system supports it.

The page cache copies every byte once more and has to find free memory for every page. Direct transfers avoid both.
With buffers in huge pages, the device moves megabytes at a time. Where direct I/O fails, transfers go through the page
cache as usual.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from neuralink_cli.arrays import Bytes

# Offsets, sizes and addresses of direct transfers must be multiples of this; no device asks for more.
PAGE = 4096
_HUGE_PAGE = 1 << 21
_DIRECT = getattr(os, "O_DIRECT", 0)
# Linux transfers at most 2 GiB minus a page per call.
_MOST = 1 << 30
# macOS has only fsync.
_flush_data = getattr(os, "fdatasync", os.fsync)
# Without direct writes, at most this many bytes wait in the page cache: more would stall the flush at the end.
_WRITE_BEHIND = 1 << 27


def aligned_buffer(size: int) -> Bytes:
    """A new uint8 array that starts on a page boundary, as direct transfers need. Its content is arbitrary."""
    whole = np.empty(size + PAGE, dtype=np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + size]


def transfer_buffer(size: int) -> Bytes:
    """Memory for transfers of `size` bytes: page-aligned, with a page of room before and after.

    Its content is arbitrary. The memory is freed when its last view is gone.
    """
    size += 2 * PAGE
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned_buffer(size)
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    # Fails on a system built without huge pages.
    with contextlib.suppress(OSError):
        # Of the last one, of which little is used, the system would take all.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.madvise(mmap.MADV_HUGEPAGE, start, size - size % _HUGE_PAGE)
    return whole[start : start + size]


class DirectReads:
    """Reads ranges of a file, bypassing the page cache. Any thread may read.

    Args:
        opened: A descriptor of the same file, to notice if `path` is another file by now.
    """

    def __init__(self, path: Path, opened: int) -> None:
        self._descriptor = -1
        if _DIRECT:
            try:
                self._descriptor = os.open(path, os.O_RDONLY | _DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):
                    raise
        if self._descriptor >= 0 and not os.path.sameopenfile(self._descriptor, opened):
            self.close()

    def close(self) -> None:
        """Close the file; harmless when closed already."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, offset: int, size: int, buffer: Bytes) -> Bytes | None:
        """Read `size` bytes at `offset` into a buffer from `transfer_buffer(size)`; return the part that holds them.

        Returns None if the file system does not support it, or if the file ends too early.

        Raises:
            OSError: Reading fails.
        """
        if self._descriptor < 0:
            return None
        lead = offset % PAGE
        view = buffer[: lead + size + -(lead + size) % PAGE].data
        done = 0
        while done < lead + size:
            try:
                count = os.preadv(self._descriptor, [view[done : done + _MOST]], offset - lead + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return None
            done += count
            if count == 0 or (count % PAGE and done < lead + size):
                return None
        return buffer[lead : lead + size]


class SequentialWrites:
    """Writes a file in order from a page boundary, in whole pages except for the last write.

    Raises:
        OSError: The file cannot be created or opened.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0)
        self._direct = bool(_DIRECT)
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The file system may have created the file before it refused.
            self._descriptor = os.open(path, flags & ~os.O_EXCL, 0o666)
            self._direct = False

    def write(self, data: Bytes, offset: int) -> None:
        """Write page-aligned memory to a multiple of the page size."""
        pages = data.size - data.size % PAGE if self._direct else 0
        done = self._write_pages(data[:pages], offset)
        if done < data.size:
            self._leave_direct()
            _write_all(self._descriptor, data[done:], offset + done)
        if not self._direct and offset // _WRITE_BEHIND != (offset + data.size) // _WRITE_BEHIND:
            _flush_data(self._descriptor)

    def flush(self) -> None:
        """Flush everything to the device."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write_pages(self, data: Bytes, offset: int) -> int:
        """Write directly as far as the file system allows; return the number of bytes written."""
        done = 0
        try:
            while done < data.size:
                done += os.pwrite(self._descriptor, data[done : done + _MOST].data, offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return done

    def _leave_direct(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._direct = False


def _write_all(descriptor: int, data: Bytes, offset: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(descriptor, data[done : done + _MOST].data, offset + done)
