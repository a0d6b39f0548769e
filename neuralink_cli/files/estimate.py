"""What a long run will take, told before it starts: measured on a sample of what it will read and write."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.files import pipeline
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.files.durable import leftover_bytes
from neuralink_cli.files.output_file import OutputFile
from neuralink_cli.files.pipeline import FileRange, read_ahead
from neuralink_cli.sizes import human_bytes, human_seconds

# A run over fewer bytes is over before a sample of it would be.
_WORTH_SAMPLING = 1 << 30
# Pieces that are read, and how many of them before the clock starts: memory that is used for the first time is slow.
_SAMPLES = 48
_WARM_UP = 8
_MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Pass:
    """Files that are read once from start to end, and `written` bytes that are written meanwhile.

    What is written is hashed; if nothing is, then this share of what is read.
    """

    files: Sequence[ByteFile]
    written: int = 0
    hashed_share: float = 1.0

    @property
    def read(self) -> int:
        """Bytes that are read."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        free_bytes: Free on the disk that is written to, with what an earlier run has left there; None if nothing is
            written.
        memory_bytes: Most resident memory.
        seconds: None where the run is too short for a sample of it.
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
        words.append(f"takes up to {human_bytes(self.memory_bytes)} of memory")
        if self.seconds is not None:
            words.append(f"about {human_seconds(self.seconds)}")
        return ", ".join(words)


def estimate(passes: Sequence[Pass], largest: int, output: Path | None = None) -> Estimate:
    """Estimate a run. The sample takes about a second per pass, and writes to a file beside `output` without a name.

    Args:
        largest: Bytes of the largest thing that is in memory as a whole.
        output: What will be written.
    """
    read, written = sum(each.read for each in passes), sum(each.written for each in passes)
    seconds = None
    if read + written >= _WORTH_SAMPLING:
        seconds = sum(_seconds(each, output) for each in passes)
    free = None if output is None else shutil.disk_usage(output.absolute().parent).free + leftover_bytes(output)
    waiting = 2 * min(pipeline.IN_FLIGHT, max(each.read for each in passes))
    return Estimate(read, written, free, _resident_bytes() + waiting + largest, seconds)


def _seconds(work: Pass, output: Path | None) -> float:
    """How long a pass takes at the rate of its sample."""
    digest, done, started = hashlib.sha256(), 0, 0.0
    with contextlib.ExitStack() as stack:
        pieces = stack.enter_context(read_ahead(_sample(work.files), _WARM_UP // 2 * pipeline.PIECE))
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
    """Pieces from all over the files."""
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


def _resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
