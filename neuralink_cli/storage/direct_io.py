"""Reads a file in many places at once, past the page cache where the file system supports it.

Neurons lie scattered, and storage reads scattered pieces fast only while many reads are in flight. With native
asynchronous I/O a few threads keep them in flight; without it, one thread per read in flight. All run compiled loops
without the GIL.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from neuralink_cli.arrays import Bytes, Offsets
from neuralink_cli.errors import InputError
from neuralink_cli.files.bulk_io import PAGE, aligned_buffer
from neuralink_cli.files.input_file import require_regular
from neuralink_cli.storage import io_kernels

File = TypeVar("File", bound="ScatteredFile")

# Reads ranges in turn: called with a descriptor, the turn, and the ranges.
Lane = Callable[..., None]
_LOGGER = logging.getLogger(__name__)
# Block sizes that direct reads may need.
_BLOCK_CHOICES = (512, 4096)
# Threads that share the asynchronous reads of a request, and how many reads make another thread worth its start.
_MOST_LANES = 4
_READS_PER_LANE = 16


class ScatteredFile:
    """An open file of which many ranges are read at once. Use as a context manager; safe for many threads.

    Attributes:
        size: Bytes of the file when it was opened.
        direct: Whether reads go past the page cache.
        block_bytes: Offsets, sizes and memory addresses of direct reads are multiples of this; 1 if not direct.

    Raises:
        InputError: The file cannot be opened, or `direct` is True and the file system has no direct I/O.
    """

    def __init__(self, path: Path, *, direct: bool | None = None, queue_depth: int = 32) -> None:
        if queue_depth < 1:
            raise ValueError(f"the queue must be at least 1 deep, not {queue_depth}")
        self.path = path
        self.queue_depth = queue_depth
        self._descriptor, self.block_bytes = _open(path, direct)
        self.direct = self.block_bytes > 1
        self.size = os.fstat(self._descriptor).st_size
        self._asynchronous = self.direct and io_kernels.asynchronous()
        self._contexts: list[int] = []
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._compile()

    def __enter__(self: File) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless when closed already. No read may be under way."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        while self._contexts:
            io_kernels.close_context(self._contexts.pop())
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, offsets: Offsets, sizes: Offsets, buffer: Bytes, places: Offsets) -> float:
        """Read range k, `sizes[k]` bytes from `offsets[k]` of the file, to `buffer[places[k]:]`, for all k.

        Ranges beyond the end of the file leave the buffer unchanged. With direct I/O everything must be on multiples of
        `block_bytes`, also the address of the buffer: see `aligned_buffer`.

        Args:
            offsets, sizes, places: int64 `[reads]`.
            buffer: Contiguous uint8.

        Returns:
            Seconds that the reads took.

        Raises:
            ValueError: A range lies outside the file or the buffer, or is not aligned.
            InputError: The device fails, or the file was truncated after it was opened.
        """
        if self._descriptor < 0:
            raise ValueError("the file is closed")
        offsets, sizes, places = (np.ascontiguousarray(a, dtype=np.int64) for a in (offsets, sizes, places))
        self._check(offsets, sizes, buffer, places)
        addresses = places + buffer.ctypes.data
        results = np.full(offsets.size, io_kernels.NOT_READ, dtype=np.int64)
        started = time.perf_counter()
        if offsets.size:
            own, *others = self._lanes(offsets.size)
            ranges = (np.zeros(1, dtype=np.int64), offsets, sizes, addresses, results)
            # Pass the buffer along, so that it outlives the reads if this thread is interrupted.
            futures = [self._pool().submit(_run, lane, buffer, self._descriptor, *ranges) for lane in others]
            own(self._descriptor, *ranges)
            for future in futures:
                if not future.cancel():
                    future.result()
            short = results < np.minimum(sizes, self.size - offsets)
            for k in np.flatnonzero(short).tolist():
                place = int(places[k])
                self._finish(int(offsets[k]), buffer[place : place + int(sizes[k])], int(results[k]))
        return time.perf_counter() - started

    def _check(self, offsets: Offsets, sizes: Offsets, buffer: Bytes, places: Offsets) -> None:
        if not offsets.shape == sizes.shape == places.shape == (offsets.size,):
            raise ValueError("offsets, sizes and places differ in shape")
        if not offsets.size:
            return
        if offsets.min() < 0 or sizes.min() < 1 or offsets.max() >= self.size:
            raise ValueError("a range lies outside the file")
        if places.min() < 0 or (places + sizes).max() > buffer.size:
            raise ValueError("a range lies outside the buffer")
        if not (buffer.dtype == np.uint8 and buffer.ndim == 1 and buffer.flags.c_contiguous and buffer.flags.writeable):
            raise ValueError("the buffer must be contiguous, writable uint8")
        if (
            self.direct
            and (int(np.bitwise_or.reduce(offsets | sizes | places)) | buffer.ctypes.data) % self.block_bytes
        ):
            raise ValueError(f"direct reads must be on multiples of {self.block_bytes}")

    def _lanes(self, reads: int) -> list[Lane]:
        """The loops that serve a request, each in its own thread, with at most `queue_depth` reads in flight."""
        if self._asynchronous:
            # A device that answers in batches would wait for a single thread; several take turns.
            count = max(min(_MOST_LANES, self.queue_depth, reads // _READS_PER_LANE), 1)
            depths = [self.queue_depth // count + (k < self.queue_depth % count) for k in range(count)]
            return [partial(self._read_asynchronously, depth) for depth in depths]
        return [io_kernels.read_in_turn] * min(self.queue_depth, reads)

    def _read_asynchronously(self, depth: int, descriptor: int, *ranges: Offsets) -> None:
        try:
            context: int | None = self._contexts.pop()
        except IndexError:
            context = io_kernels.open_context(self.queue_depth)
        if context is None:
            # All contexts of the system are in use.
            io_kernels.read_in_turn(descriptor, *ranges)
            return
        events = np.empty((depth, io_kernels.EVENT_WORDS), dtype=np.int64)
        turn, offsets, sizes, addresses, results = ranges
        in_flight = io_kernels.read_asynchronously(
            descriptor,
            turn,
            offsets,
            sizes,
            addresses,
            results,
            io_kernels.SUBMIT,
            io_kernels.GET_EVENTS,
            context,
            events,
        )
        if in_flight:
            # Wait for the reads: until they end they write to the buffer.
            io_kernels.close_context(context)
        else:
            self._contexts.append(context)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                workers = _MOST_LANES if self._asynchronous else self.queue_depth
                self._threads = ThreadPoolExecutor(workers, thread_name_prefix="neuralink-read")
            return self._threads

    def _compile(self) -> None:
        """Compile or load the loops now, so that no measured read pays for it."""
        nothing = np.empty(0, dtype=np.int64)
        ranges = (np.zeros(1, dtype=np.int64), nothing, nothing, nothing, nothing)
        io_kernels.read_in_turn(self._descriptor, *ranges)
        if self._asynchronous:
            self._read_asynchronously(1, self._descriptor, *ranges)

    def _finish(self, offset: int, view: Bytes, came: int) -> None:
        """Read the rest of a range after its first `came` bytes; repeating a failed read shows why it fails."""
        needed = min(len(view), self.size - offset)
        done = max(came, 0)
        while done < needed:
            done -= done % self.block_bytes
            try:
                count = os.preadv(self._descriptor, [view.data[done:]], offset + done)
            except OSError as error:
                raise InputError(f"reading failed ({error.strerror})", where=self.path) from None
            if done + count < needed and count < self.block_bytes:
                raise InputError("file ended while it was being read", where=self.path)
            done += count


def _run(lane: Lane, _buffer: Bytes, descriptor: int, *ranges: Offsets) -> None:
    lane(descriptor, *ranges)


def _open(path: Path, direct: bool | None) -> tuple[int, int]:
    """A descriptor, and the unit of direct reads or 1."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    require_regular(path)
    if direct is not False:
        descriptor, block_bytes = _open_direct(path, flags)
        if block_bytes:
            return descriptor, block_bytes
        if direct:
            raise InputError("cannot be read past the page cache on this file system", where=path)
        _LOGGER.warning("%s: no direct I/O on this file system, so reads go through the page cache", path)
    try:
        return os.open(path, flags), 1
    except OSError as error:
        raise InputError(f"cannot be opened ({error.strerror})", where=path) from None


def _open_direct(path: Path, flags: int) -> tuple[int, int]:
    """A descriptor for direct reads and their unit; (-1, 0) if there are none."""
    if not hasattr(os, "O_DIRECT"):
        return -1, 0
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError:
        return -1, 0
    buffer = aligned_buffer(2 * PAGE)
    for unit in _BLOCK_CHOICES:
        try:
            os.preadv(descriptor, [buffer[unit : 2 * unit].data], unit)
        except OSError:
            continue
        return descriptor, unit
    os.close(descriptor)
    return -1, 0
