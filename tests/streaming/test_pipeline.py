"""Reading ahead, hashing and writing behind: in order, bounded, and over when they are left."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.errors import InputError
from neuralink_cli.files.bulk_io import PAGE, SequentialWrites, transfer_buffer
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.streaming import output_file, pipeline
from neuralink_cli.streaming.journal import Journal
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import FileRange, Scratch, pieces_of, read_ahead
from tests.faults import Disk

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("neuralink")]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline, "PIECE", 4096)
    monkeypatch.setattr(pipeline, "AHEAD", 6 * 4096)
    monkeypatch.setattr(pipeline, "BEHIND", 4 * 4096)
    yield
    assert threads() == []


@pytest.fixture
def file(tmp_path: Path) -> Iterator[ByteFile]:
    (tmp_path / "in").write_bytes(CONTENT.tobytes())
    with ByteFile(tmp_path / "in") as opened:
        yield opened


def test_ranges_come_in_order_whatever_their_sizes(file: ByteFile) -> None:
    random = np.random.default_rng(1)
    starts = random.integers(0, CONTENT.size - 20_000, 200)
    sizes = random.integers(0, 20_000, 200)
    ranges = [FileRange(file, int(start), int(size)) for start, size in zip(starts, sizes, strict=True)]
    with read_ahead(iter(ranges)) as pieces:
        count = 0
        for wanted, data in zip(ranges, pieces, strict=True):
            assert np.array_equal(data, CONTENT[wanted.offset : wanted.offset + wanted.size])
            count += 1
    assert count == 200


def test_pieces_make_the_whole(file: ByteFile) -> None:
    for start, stop in ((0, 0), (5, 5), (0, 1), (3, 4099), (100, 20_000), (0, file.size)):
        ranges = list(pieces_of(file, start, stop))
        assert sum(each.size for each in ranges) == stop - start
        with read_ahead(ranges) as pieces:
            assert b"".join(data.tobytes() for data in pieces) == CONTENT[start:stop].tobytes()


def test_no_more_is_read_than_may_wait(file: ByteFile) -> None:
    asked = []

    def ranges() -> Iterator[FileRange]:
        for wanted in pieces_of(file, 0, file.size):
            asked.append(wanted)
            yield wanted

    with read_ahead(ranges()) as pieces:
        next(pieces)
        assert 1 < len(asked) <= 7
        next(pieces)
        assert len(asked) <= 8


def test_small_ranges_do_not_pile_up(file: ByteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few their bytes are: each has a buffer of some pages."""
    monkeypatch.setattr(pipeline, "MOST_RANGES", 5)
    monkeypatch.setattr(pipeline, "AHEAD", 1 << 20)
    asked = []

    def ranges() -> Iterator[FileRange]:
        for start in range(50):
            asked.append(start)
            yield FileRange(file, start, 10)

    with read_ahead(ranges()) as pieces:
        for start, data in enumerate(pieces):
            assert np.array_equal(data, CONTENT[start : start + 10])
            assert len(asked) <= start + 6
    assert len(asked) == 50


def test_a_failure_is_raised_where_its_bytes_are_asked_for(file: ByteFile) -> None:
    ranges = [FileRange(file, 0, 100), FileRange(file, CONTENT.size - 50, 100), FileRange(file, 0, 100)]
    with read_ahead(ranges) as pieces:
        assert next(pieces).size == 100
        with pytest.raises(InputError, match="file ended"):
            next(pieces)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_early_ends_the_threads(tmp_path: Path, file: ByteFile, error: type[BaseException]) -> None:
    with (
        pytest.raises(error),
        read_ahead(pieces_of(file, 0, file.size)) as pieces,
        OutputFile(tmp_path / "out") as output,
    ):
        for k, data in enumerate(pieces):
            output.write(data)
            if k == 10:
                raise error
    assert threads() == []


def test_scratch_is_the_same_memory(tmp_path: Path) -> None:
    scratch = Scratch()
    first = scratch.take(50_000)
    assert first.size == 50_000
    first[:] = 7
    again = scratch.take(10_000)
    assert again.ctypes.data == first.ctypes.data
    assert scratch.take(100_000).size == 100_000


@given(sizes=st.lists(st.integers(0, 9000), max_size=30), as_bytes=st.booleans())
@settings(max_examples=40)
def test_what_is_written_is_there_and_hashed(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], as_bytes: bool
) -> None:
    path = tmp_path_factory.mktemp("out") / "out"
    seen: list[int] = []
    memory = np.empty(9000, dtype=np.uint8)
    with OutputFile(path, seen.append) as output:
        position = 0
        for size in sizes:
            data: npt.NDArray[np.uint8] = memory[:size]
            data[:] = CONTENT[position : position + size]
            output.write(data.tobytes() if as_bytes else data)
            # Whoever writes may use the memory for something else at once.
            memory[:] = 0
            position += size
            assert output.size == position
            if size % 3 == 0:
                assert output.sha256 == hashlib.sha256(CONTENT[:position].data).hexdigest()
        assert output.sha256 == hashlib.sha256(CONTENT[:position].data).hexdigest()
    assert path.read_bytes() == CONTENT[:position].tobytes()
    assert sum(seen) == position


def test_few_buffers_are_made_however_slow_the_disk_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = SequentialWrites.write

    def slowly(file: SequentialWrites, data: npt.NDArray[np.uint8], offset: int) -> None:
        time.sleep(0.001)
        plain(file, data, offset)

    def counted(size: int) -> npt.NDArray[np.uint8]:
        made.append(size)
        return transfer_buffer(size)

    monkeypatch.setattr(output_file, "transfer_buffer", counted)
    monkeypatch.setattr(SequentialWrites, "write", slowly)
    with OutputFile(tmp_path / "out") as output:
        output.write(CONTENT)
    # With the one that is being filled.
    assert len(made) == 4
    assert (tmp_path / "out").read_bytes() == CONTENT.tobytes()


@pytest.mark.parametrize("at", [1, 2, 5, 40, 73, 74, 75])
def test_a_write_that_fails_is_noticed(tmp_path: Path, at: int) -> None:
    with (
        Disk(at).installed() as disk,
        pytest.raises(OSError, match="Input/output error"),
        OutputFile(tmp_path / "out") as output,
    ):
        output.write(CONTENT)
    assert disk.hit


def test_of_many_small_tensors_no_more_waits_than_so_many_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MOST_RANGES", 3)
    monkeypatch.setattr(pipeline, "AHEAD", 1 << 30)
    # The three largest, each with two pages beside it.
    assert pipeline.most_ahead([10, 50, 20, 40, 30]) == 120 + 3 * 2 * PAGE
    assert pipeline.most_ahead([10, 50, 20]) == 80
    assert pipeline.most_ahead([10, 50, 20, 40, 30], most=100) == 100
    monkeypatch.setattr(pipeline, "AHEAD", 90)
    assert pipeline.most_ahead([10, 50, 20, 40, 30]) == 90


def test_the_tasks_of_small_sections_are_forgotten_once_they_are_done(tmp_path: Path) -> None:
    """A task is larger than what an expert's order takes in the file."""
    with Journal(tmp_path, {}) as journal, OutputFile(tmp_path / "x", journal=journal) as output:
        for k in range(2000):
            output.write(bytes([k % 256]) * 16)
            output.mark()
            if k % 100 == 99:
                output._hasher.submit(int).result()
        assert len(output._tasks) <= 201
