"""Many reads of one file at once: what comes is what the file holds, however the system serves it, or an error."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.files.bulk_io import aligned_buffer
from neuralink_cli.storage import io_kernels
from neuralink_cli.storage.direct_io import ScatteredFile

SIZE = 3 * 4096 * 100 + 777
UNIT = 4096
KINDS = ("asynchronous", "threads", "buffered")


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "data.bin"
    file.write_bytes(content)
    return file


def open_as(kind: str, path: Path, depth: int = 8) -> ScatteredFile:
    file = ScatteredFile(path, direct=False if kind == "buffered" else None, queue_depth=depth)
    if kind == "threads":
        file._asynchronous = False
    return file


def random_ranges(random: np.random.Generator, reads: int) -> tuple[Any, Any, Any]:
    """Aligned ranges that may reach beyond the end of the file, and places for them."""
    offsets = random.integers(0, SIZE // UNIT + 1, reads) * UNIT
    sizes = random.integers(1, 9, reads) * UNIT
    return offsets, sizes, np.cumsum(sizes) - sizes


def check(buffer: np.ndarray, content: bytes, ranges: tuple[Any, Any, Any]) -> None:
    for offset, size, place in zip(*ranges, strict=True):
        expected = content[offset : offset + size]
        assert buffer[place : place + len(expected)].tobytes() == expected


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without direct I/O."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", [0, 1, 2, 31, 400])
@pytest.mark.parametrize("depth", [1, 3, 32])
def test_every_range_arrives(kind: str, reads: int, depth: int, path: Path, content: bytes) -> None:
    ranges = random_ranges(np.random.default_rng(reads), reads)
    buffer = aligned_buffer(int(ranges[1].sum()))
    with open_as(kind, path, depth) as file:
        assert file.size == SIZE
        seconds = file.read(*ranges[:2], buffer, ranges[2])
    assert 0 <= seconds < 60
    check(buffer, content, ranges)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3, 32])
def test_what_the_loops_read_is_not_read_again(
    kind: str, depth: int, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "was read again")

    ranges = random_ranges(np.random.default_rng(depth), 100)
    buffer = aligned_buffer(int(ranges[1].sum()))
    with open_as(kind, path, depth) as file:
        monkeypatch.setattr(os, "preadv", fail)
        for _ in range(2):
            buffer[:] = 0
            file.read(*ranges[:2], buffer, ranges[2])
            check(buffer, content, ranges)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 32])
def test_as_many_reads_are_in_flight_as_the_queue_is_deep(depth: int, path: Path) -> None:
    with open_as("threads", path, depth) as file:
        for reads in (1, 2, 15, 31, 32, 100, 1000):
            file._asynchronous = False
            assert len(file._lanes(reads)) == min(depth, reads)
            # With asynchronous reads a few threads share the queue, as long as each has enough to do.
            file._asynchronous = True
            depths = [lane.args[0] for lane in file._lanes(reads)]  # type: ignore[attr-defined]
            assert sum(depths) == depth
            assert min(depths) >= 1
            assert max(depths) - min(depths) <= 1
            assert len(depths) == max(min(4, depth, reads // 16), 1)


def test_reads_need_not_be_aligned_without_direct_io(path: Path, content: bytes) -> None:
    ranges = np.array([5, SIZE - 1, 77]), np.array([1000, 1, 4099]), np.array([0, 1000, 1001])
    buffer = np.empty(5100, dtype=np.uint8)
    with open_as("buffered", path) as file:
        assert (file.direct, file.block_bytes) == (False, 1)
        file.read(*ranges[:2], buffer, ranges[2])
    check(buffer, content, ranges)


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_may_read_at_once(kind: str, path: Path, content: bytes) -> None:
    with open_as(kind, path) as file:

        def work(seed: int) -> None:
            ranges = random_ranges(np.random.default_rng(seed), 100)
            buffer = aligned_buffer(int(ranges[1].sum()))
            for _ in range(5):
                buffer[:] = 0
                file.read(*ranges[:2], buffer, ranges[2])
                check(buffer, content, ranges)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, seed) for seed in range(16)]:
                done.result()


def test_without_direct_io_reads_are_buffered_and_it_says_so(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_direct(monkeypatch)
    with ScatteredFile(path) as file:
        assert not file.direct
        buffer = np.empty(10, dtype=np.uint8)
        file.read(np.array([3]), np.array([10]), buffer, np.array([0]))
        assert buffer.tobytes() == content[3:13]
    assert "no direct I/O on this file system" in caplog.text
    with pytest.raises(InputError, match=r"data\.bin: cannot be read past the page cache"):
        ScatteredFile(path, direct=True)


def test_a_file_system_that_opens_but_does_not_read_directly_is_found_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    before = os.dup(0)
    os.close(before)
    with ScatteredFile(path) as file:
        assert not file.direct
    # The lowest free descriptor is the same, so none was left open.
    after = os.dup(0)
    os.close(after)
    assert after == before


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        ScatteredFile(tmp_path / "nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_while_open_is_an_error(kind: str, path: Path) -> None:
    ranges = np.arange(0, 200, 2) * UNIT, np.full(100, UNIT), np.arange(100) * UNIT
    with open_as(kind, path) as file:
        os.truncate(path, 150 * UNIT + 5)
        with pytest.raises(InputError, match="ended while it was being read"):
            file.read(*ranges[:2], aligned_buffer(100 * UNIT), ranges[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("came", [-5, -1, io_kernels.NOT_READ, 0, 1, 1000, 4096, 5000])
def test_reads_that_fail_or_come_short_are_finished(
    kind: str, came: int, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loops say that nothing or a part came; the rest is read again."""

    def shortened(real: Callable[..., Any]) -> Callable[..., Any]:
        def loop(descriptor: int, turn: Any, offsets: Any, sizes: Any, addresses: Any, results: Any, *rest: Any) -> Any:
            left = real(descriptor, turn, offsets, sizes, addresses, results, *rest)
            if offsets.size:
                results[::3] = came
                for k in range(0, offsets.size, 3):
                    start = int(places[k]) + max(came, 0)
                    buffer[start : int(places[k]) + int(sizes[k])] = 0
            return left

        return loop

    offsets, sizes, places = random_ranges(np.random.default_rng(1), 30)
    sizes += UNIT
    places = np.cumsum(sizes) - sizes
    buffer = aligned_buffer(int(sizes.sum()))
    for name in ("read_in_turn", "read_asynchronously"):
        monkeypatch.setattr(io_kernels, name, shortened(getattr(io_kernels, name)))
    with open_as(kind, path, depth=1) as file:
        file.read(offsets, sizes, buffer, places)
    check(buffer, content, (offsets, sizes, places))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("came", [0, 1, 3 * UNIT])
def test_the_rest_of_a_read_may_come_in_pieces(
    kind: str, pieces: int, came: int, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even in single blocks; the end of the file, which is no whole block, is no failure."""
    real = os.preadv
    with open_as(kind, path, depth=1) as file:
        most = pieces * file.block_bytes if file.direct else pieces * 500
        calls = []

        def read_piece(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            calls.append(offset)
            return real(descriptor, [buffers[0][:most]], offset)

        def come_short(_d: int, _t: Any, offsets: Any, sizes: Any, _a: Any, results: Any, *_: Any) -> int:
            for k in range(offsets.size):
                buffer[places[k] : places[k] + came] = np.frombuffer(content, np.uint8, came, offsets[k])
                results[k] = came
            return 0

        offsets, sizes = np.array([0, 7, SIZE // UNIT - 4]) * UNIT, np.array([6, 4, 6]) * UNIT
        places = np.cumsum(sizes) - sizes
        buffer = aligned_buffer(int(sizes.sum()))
        buffer[:] = 0
        monkeypatch.setattr(io_kernels, "read_in_turn", come_short)
        monkeypatch.setattr(io_kernels, "read_asynchronously", come_short)
        monkeypatch.setattr(os, "preadv", read_piece)
        file.read(offsets, sizes, buffer, places)
    check(buffer, content, (offsets, sizes, places))
    # Nothing is read twice but the block that a piece ended in.
    unit = file.block_bytes
    left = [int(min(size, SIZE - offset)) - came // unit * unit for offset, size in zip(offsets, sizes, strict=True)]
    assert len(calls) == sum(-(-rest // most) for rest in left)
    # What is beyond the end of the file is left as it was.
    assert not buffer[places[-1] + SIZE - offsets[-1] :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_device_is_an_error_that_names_the_file(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def failing_loop(_d: int, _t: Any, _o: Any, _s: Any, _a: Any, results: Any, *_: Any) -> int:
        results[:] = -errno.EIO
        return 0

    with open_as(kind, path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(io_kernels, "read_in_turn", failing_loop)
        monkeypatch.setattr(io_kernels, "read_asynchronously", failing_loop)
        with pytest.raises(InputError, match=r"data\.bin: reading failed \(Input/output error\)"):
            file.read(np.array([0]), np.array([UNIT]), aligned_buffer(UNIT), np.array([0]))


def test_a_closed_file_descriptor_fails_cleanly_in_the_loops() -> None:
    nothing = np.full(3, -7, dtype=np.int64)
    ranges = np.array([0, 1, 2]), np.array([1, 1, 1]), np.full(3, aligned_buffer(8).ctypes.data)
    io_kernels.read_in_turn(-1, np.zeros(1, dtype=np.int64), *ranges, nothing)
    assert nothing.tolist() == [-1, -1, -1]


def test_without_contexts_the_system_still_reads(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = random_ranges(np.random.default_rng(5), 50)
    buffer = aligned_buffer(int(ranges[1].sum()))
    with open_as("asynchronous", path) as file:
        while file._contexts:
            io_kernels.close_context(file._contexts.pop())
        monkeypatch.setattr(io_kernels, "open_context", lambda _: None)
        file.read(*ranges[:2], buffer, ranges[2])
    check(buffer, content, ranges)


@pytest.mark.parametrize("call", ["SUBMIT", "GET_EVENTS"])
def test_reads_that_the_system_does_not_start_or_does_not_report_are_read_again(
    call: str, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = random_ranges(np.random.default_rng(6), 50)
    buffer = aligned_buffer(int(ranges[1].sum()))
    buffer[:] = 0
    with open_as("asynchronous", path) as file:
        # No system call has this number.
        monkeypatch.setattr(io_kernels, call, -1)
        file.read(*ranges[:2], buffer, ranges[2])
    check(buffer, content, ranges)


def test_a_system_without_asynchronous_reads_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_kernels, "open_context", lambda _: None)
    assert not io_kernels.asynchronous()
    monkeypatch.setattr(io_kernels, "SUBMIT", -1)
    assert not io_kernels.asynchronous()


@pytest.mark.parametrize(
    ("offsets", "sizes", "places", "complaint"),
    [
        ([-UNIT], [UNIT], [0], "outside the file"),
        ([SIZE // UNIT * UNIT + UNIT], [UNIT], [0], "outside the file"),
        ([0], [0], [0], "outside the file"),
        ([0], [UNIT], [4 * UNIT], "outside the buffer"),
        ([0], [UNIT], [-UNIT], "outside the buffer"),
        ([0, 0], [UNIT], [0], "differ in shape"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_refused(
    kind: str, offsets: list[int], sizes: list[int], places: list[int], complaint: str, path: Path
) -> None:
    with open_as(kind, path) as file, pytest.raises(ValueError, match=complaint):
        file.read(np.array(offsets), np.array(sizes), aligned_buffer(4 * UNIT), np.array(places))


def test_unaligned_direct_reads_are_refused(path: Path) -> None:
    with open_as("asynchronous", path) as file:
        if not file.direct:
            # Nothing to align to; said so, and held to above.
            assert file.block_bytes == 1
            return
        assert file.block_bytes in (512, 4096)
        buffer = aligned_buffer(2 * UNIT)
        with pytest.raises(ValueError, match="multiples of"):
            file.read(np.array([1]), np.array([UNIT]), buffer, np.array([0]))
        with pytest.raises(ValueError, match="multiples of"):
            file.read(np.array([0]), np.array([UNIT]), buffer[1:], np.array([0]))


def test_a_buffer_that_cannot_be_written_is_refused(path: Path) -> None:
    buffer = aligned_buffer(UNIT)
    buffer.flags.writeable = False
    with open_as("asynchronous", path) as file, pytest.raises(ValueError, match="writable"):
        file.read(np.array([0]), np.array([UNIT]), buffer, np.array([0]))


def test_closing_ends_threads_and_refuses_reads(path: Path) -> None:
    before = threading.active_count()
    for kind in KINDS:
        file = open_as(kind, path)
        ranges = random_ranges(np.random.default_rng(5), 100)
        file.read(*ranges[:2], aligned_buffer(int(ranges[1].sum())), ranges[2])
        file.close()
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read(*ranges[:2], aligned_buffer(int(ranges[1].sum())), ranges[2])
    gc.collect()
    assert threading.active_count() == before


def test_buffers_start_on_pages() -> None:
    for size in (1, 4096, 100_001):
        buffer = aligned_buffer(size)
        assert (buffer.size, buffer.ctypes.data % 4096) == (size, 0)


def test_a_queue_has_a_depth(path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 deep"):
        ScatteredFile(path, queue_depth=0)
