"""Estimates what a long run will take before it starts, by reading and writing a sample of the data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.files.durable import leftover_bytes
from neuralink_cli.files.free_memory import resident_bytes, with_margin
from neuralink_cli.files.tensor_file import TensorFile
from neuralink_cli.sizes import human_bytes, human_seconds
from neuralink_cli.streaming import pipeline
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import FileRange, read_ahead

# A run over fewer bytes ends sooner than its sample would.
_WORTH_SAMPLING = 1 << 30
# Pieces to read, and how many of them before the clock starts: the first use of memory is slow.
_SAMPLES = 48
_WARM_UP = 8
_MOST_SECONDS = 1.0
# Compiled kernels, loaded when they are first used. Compiling them, the first time ever, takes more.
_KERNEL_BYTES = 6 << 20


@dataclass(frozen=True)
class Needs:
    """What a stage takes: its peak of resident memory, and the disk that its output takes while it is written."""

    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Pass:
    """Files that are read once from start to end, while `written` bytes are written.

    Everything written is hashed. If nothing is written, `hashed_share` of the bytes read is hashed. `beside` are files
    that are read at the same time, by themselves. `other_read` bytes are read from files that are not open yet. No more
    than `longest` bytes are read on either side before all that is read is also worked on; None for all.
    `peak` is what it takes beside programs, if that is known better than from these.
    """

    files: Sequence[TensorFile]
    written: int = 0
    hashed_share: float = 1.0
    beside: Sequence[TensorFile] = ()
    other_read: int = 0
    longest: int | None = None
    peak: int | None = None

    @property
    def read(self) -> int:
        """Bytes that are read."""
        return sum(file.size for file in (*self.files, *self.beside)) + self.other_read

    @property
    def waiting(self) -> int:
        """The most bytes that wait, read ahead or to be written, and are worked on there."""
        if self.peak is not None:
            return self.peak
        ahead = (pipeline.most_ahead(_read_sizes(side), self.longest) for side in (self.files, self.beside))
        return sum(ahead) + min(pipeline.BEHIND, self.written)


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        free_bytes: Free on the output's disk, including what an earlier run left there; None if nothing is written.
        memory_bytes: Peak resident memory.
        seconds: None if the run is too short to sample.
    """

    bytes_read: int
    bytes_written: int
    free_bytes: int | None
    memory_bytes: int
    seconds: float | None

    def __str__(self) -> str:
        words = [f"reads {human_bytes(self.bytes_read)}"]
        if self.free_bytes is not None:
            words.append(f"writes {human_bytes(self.bytes_written)} of {human_bytes(self.free_bytes)} free")
        words.append(f"needs up to {human_bytes(self.memory_bytes)} of memory")
        if self.seconds is not None:
            words.append(f"takes about {human_seconds(self.seconds)}")
        return ", ".join(words)


def estimate(passes: Sequence[Pass], held: int, output: Path | None = None) -> Estimate:
    """Estimate a run. Sampling takes about a second per pass, and writes to an unnamed file beside `output`.

    Args:
        held: Bytes that are in memory beside what waits to be worked on or to be written.
        output: The file or directory that will be written.
    """
    read, written = sum(each.read for each in passes), sum(each.written for each in passes)
    # Before a sample is taken, which takes memory of its own.
    memory = memory_bytes(passes, held, program_bytes())
    seconds = None
    if read + written >= _WORTH_SAMPLING:
        seconds = sum(_seconds(each, output) for each in passes)
    free = None if output is None else shutil.disk_usage(output.absolute().parent).free + leftover_bytes(output)
    return Estimate(read, written, free, memory, seconds)


def _read_sizes(files: Sequence[TensorFile]) -> list[int]:
    """Bytes of all that files are read in: headers and tensors."""
    return [
        size for file in files for size in (file.header.data_start, *(entry.nbytes for entry in file.header.entries))
    ]


def program_bytes() -> int:
    """Bytes of memory of programs: what this process has taken so far, the compiler, and what was compiled before."""
    # Imported here because numba is slow to import and a quick check of a layout estimates nothing.
    from neuralink_cli.kernels import load_compiler

    load_compiler()
    return resident_bytes() + _KERNEL_BYTES


def memory_bytes(passes: Sequence[Pass], held: int, programs: int) -> int:
    """The peak of a run's memory; `held` as for `estimate`, `programs` as from `program_bytes`."""
    return with_margin(programs + max(each.waiting for each in passes) + held)


def _seconds(work: Pass, output: Path | None) -> float:
    """How long a pass takes at the rate of its sample."""
    digest, done, started = hashlib.sha256(), 0, 0.0
    with contextlib.ExitStack() as stack:
        pieces = stack.enter_context(read_ahead(_sample([*work.files, *work.beside]), _WARM_UP // 2 * pipeline.PIECE))
        sink = stack.enter_context(_nameless(output)) if output is not None and work.written else None
        for k, data in enumerate(pieces):
            if sink is None:
                digest.update(data[: int(data.size * work.hashed_share)].data)
            else:
                sink.write(data)
            if k < _WARM_UP:
                started = time.perf_counter()
                continue
            done += data.size
            if time.perf_counter() - started > _MOST_SECONDS:
                break
    return max(work.read, work.written) * (time.perf_counter() - started) / max(done, 1)


def _sample(files: Sequence[ByteFile]) -> Iterator[FileRange]:
    """Pieces spread over all files."""
    size = sum(file.size for file in files)
    for k in range(_SAMPLES):
        position = k * size // _SAMPLES
        for file in files:
            if position < file.size:
                yield FileRange(file, position, min(pipeline.PIECE, file.size - position))
                break
            position -= file.size


@contextlib.contextmanager
def _nameless(output: Path) -> Iterator[OutputFile]:
    path = output.absolute().with_name(f".{output.name}.sample-{os.getpid()}")
    with OutputFile(path) as file:
        path.unlink()
        yield file
