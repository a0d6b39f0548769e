"""Keeps the disk busy while the CPU works: input is read ahead, and output is hashed and written in the background.

Reading, hashing and writing each have one thread, which works in order; the caller moves weights in between. At most
`AHEAD` bytes in at most `MOST_RANGES` ranges wait to be worked on and `BEHIND` bytes to be written, in reused buffers;
what is worked on is among them. An error in a stage is raised where its next result is needed. When a block ends, for
whatever reason, its threads have ended.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from neuralink_cli.arrays import Bytes
from neuralink_cli.files.bulk_io import PAGE, transfer_buffer
from neuralink_cli.files.byte_file import ByteFile

# Bytes of a transfer: large enough for the device, small enough for the processor's cache.
PIECE = 1 << 23
AHEAD = 1 << 28
# Less, as it is full only where the disk writes slower than all else works, while reading ahead always fills up.
BEHIND = 1 << 26
# Buffers take pages beside their bytes, which are more than the bytes where experts are many and small.
MOST_RANGES = 1024


@dataclass(frozen=True, slots=True)
class FileRange:
    """`size` bytes of an open file from byte `offset` on."""

    file: ByteFile
    offset: int
    size: int


@contextlib.contextmanager
def stage(name: str) -> Iterator[ThreadPoolExecutor]:
    """A thread that runs submitted tasks in order. Tasks not started when the block ends are dropped."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=f"neuralink-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def read_ahead(ranges: Iterable[FileRange], in_flight: int | None = None) -> Iterator[Iterator[Bytes]]:
    """The bytes of each range in turn. They are valid until the next range is requested.

    Args:
        in_flight: Most bytes to read ahead, by default `AHEAD`.

    Raises:
        InputError: A file ends too early or reading fails. Raised when its bytes are requested.
    """
    with stage("read") as reader:
        yield _read_ahead(reader, ranges, AHEAD if in_flight is None else in_flight)


def _read_ahead(reader: ThreadPoolExecutor, ranges: Iterable[FileRange], in_flight: int) -> Iterator[Bytes]:
    pending: deque[tuple[Future[Bytes], Bytes]] = deque()
    free: list[Bytes] = []
    held = 0
    for wanted in ranges:
        # Large buffers are used again, and lie in huge pages that even a small range would take as a whole.
        needed = max(wanted.size, PIECE) if wanted.size > PIECE // 8 else wanted.size
        while pending and (held + needed > in_flight or len(pending) >= MOST_RANGES):
            future, buffer = pending.popleft()
            yield future.result()
            held -= buffer.size
            free.append(buffer)
        buffer = _buffer_for(needed, free)
        held += buffer.size
        pending.append((reader.submit(wanted.file.read_range, wanted.offset, wanted.size, buffer), buffer))
    for future, _ in pending:
        yield future.result()


def _buffer_for(size: int, free: list[Bytes]) -> Bytes:
    while free:
        buffer = free.pop()
        if buffer.size >= size + 2 * PAGE:
            return buffer
    return transfer_buffer(size)


def most_ahead(sizes: Sequence[int], most: int | None = None) -> int:
    """The most bytes that wait when tensors of these sizes are read ahead, each in a range or in several.

    Args:
        most: Bytes to read ahead; None for `AHEAD`.
    """
    most = AHEAD if most is None else min(AHEAD, most)
    if len(sizes) > MOST_RANGES:
        return min(most, sum(heapq.nlargest(MOST_RANGES, sizes)) + 2 * PAGE * MOST_RANGES)
    return min(most, sum(sizes))


class Scratch:
    """Reusable memory for one array at a time."""

    def __init__(self) -> None:
        self._memory = transfer_buffer(0)

    def take(self, size: int) -> Bytes:
        """Memory of `size` bytes with arbitrary content; memory taken before must no longer be used."""
        if self._memory.size < size:
            self._memory = transfer_buffer(0)
            self._memory = transfer_buffer(size)
        return self._memory[:size]


def pieces_of(file: ByteFile, start: int, stop: int) -> Iterator[FileRange]:
    """Bytes `start` to `stop` of a file in ranges of `PIECE` bytes, the last one shorter."""
    for begin in range(start, stop, PIECE):
        yield FileRange(file, begin, min(PIECE, stop - begin))
