"""Measures what random reads cost on the storage under a directory, and makes a device profile from it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuralink_cli.devices.device import DeviceModel, parse_device
from neuralink_cli.devices.fio import is_fio_output, parse_fio, read_measurements
from neuralink_cli.errors import InputError, OutputError, advising
from neuralink_cli.files.bulk_io import aligned_buffer
from neuralink_cli.files.durable import new_file, require_space, write_all
from neuralink_cli.files.json_text import readable
from neuralink_cli.storage.direct_io import ScatteredFile

PROFILE_FORMAT = "neuralink-device"
# Offsets and sizes of reads are multiples of this, which any device allows.
UNIT = 4096
_CHUNK = 1 << 24
# Memory that all reads reuse.
_BUFFER_BYTES = 1 << 26
# Reads per place in the queue in the pilot, which tells how many reads are enough.
_PILOT = 4
_TURNS = 3
_SINGLE_READS = 50
# Batches that show what a queue takes to fill, and how often they fill it.
_BATCHES = 15
_FILLED = 2
# Stands for an operation that costs nothing, which device models do not allow.
_LEAST_SECONDS = 1e-9
_MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs", "devtmpfs", "hugetlbfs"))


@dataclass(frozen=True)
class ProbePoint:
    """Random reads of `bytes` bytes with `queue_depth` of them in flight: `reads` of them took `seconds`.

    Attributes:
        batch_seconds: What a batch of twice `queue_depth` reads takes on its own, which starts with an empty queue and
            ends with one; None if not measured.
    """

    bytes: int
    queue_depth: int
    reads: int
    seconds: float
    batch_seconds: float | None = None

    @property
    def reads_per_second(self) -> float:
        """Reads per second."""
        return self.reads / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth."""
        return self.reads * self.bytes / self.seconds

    def fill_seconds(self, latency: float) -> float:
        """What a batch takes because the queue has to fill: beyond the time of its reads, and the latency."""
        if self.batch_seconds is None:
            return 0.0
        expected = latency + _FILLED * self.queue_depth * self.seconds / self.reads
        return max(self.batch_seconds - expected, 0.0)


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        direct: Whether reads went past the page cache; without it they measured memory, not storage.
        file_system: Type of the file system, if the system says.
        page_bytes: What offsets and sizes of reads are rounded out to.
        single_read_seconds: What a read of the smallest size takes with nothing else in flight, from the call on.
        sustained: The last reads of a long time of reading, when the device is hot; None if not measured.
    """

    direct: bool
    file_system: str | None
    file_bytes: int
    points: tuple[ProbePoint, ...]
    page_bytes: int = 1
    single_read_seconds: float = 0.0
    sustained: ProbePoint | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the file system is one in memory, which is no storage device."""
        return self.file_system in _MEMORY_FILE_SYSTEMS


@dataclass(frozen=True)
class Profile:
    """A device profile as a document, and the model that it describes.

    `pooled` are the read sizes whose time was averaged with a neighbour's, because the larger size took less.
    """

    document: dict[str, Any]
    device: DeviceModel
    pooled: tuple[int, ...]


def probe_storage(
    directory: Path,
    *,
    sizes: Sequence[int],
    queue_depths: Sequence[int],
    file_bytes: int,
    seconds: float = 0.3,
    sustained: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Probe:
    """Measure random reads in a temporary file, which has no name while it is measured and is gone afterwards.

    Args:
        sizes: Bytes of a read, multiples of `UNIT`.
        queue_depths: How many reads to keep in flight.
        file_bytes: Size of the file; a small one measures the storage's own cache.
        seconds: Time for every size and depth; slow storage takes longer, for a few reads per place in the queue.
        sustained: Seconds of reading without a pause, of the size in the middle, that show how fast a hot device is.
        progress: Called with 1 after every size and depth.

    Raises:
        ValueError: A size is not a multiple of `UNIT`, or the file is smaller than two of the largest reads.
        InputError: `directory` is not a directory, or reading fails.
        OutputError: The file cannot be written there, or there is no room for it.
    """
    if any(size < UNIT or size % UNIT for size in sizes) or file_bytes < 2 * max(sizes):
        raise ValueError(f"reads must be multiples of {UNIT} bytes, and at most half the file of {file_bytes}")
    random = np.random.default_rng(seed)
    points = []
    with _temporary_file(directory, file_bytes, random, queue_depths) as files:
        deepest = max(files, key=lambda file: file.queue_depth)
        for file in files:
            for size in sizes:
                point = _measure(file, size, seconds, random)
                if file is deepest:
                    point = replace(point, batch_seconds=_batch_seconds(file, size, seconds, random))
                points.append(point)
                progress(1)
        return Probe(
            direct=deepest.direct,
            file_system=file_system_of(directory),
            file_bytes=file_bytes,
            points=tuple(points),
            page_bytes=deepest.block_bytes,
            single_read_seconds=_single_read_seconds(deepest, min(sizes), random),
            sustained=_sustain(deepest, sorted(sizes)[len(sizes) // 2], sustained, random) if sustained else None,
        )


def probe_profile(probe: Probe, name: str) -> Profile:
    """The device profile from what was measured at the largest queue depth.

    Raises:
        InputError: Larger reads take no longer, so no per-read cost can be fitted; measuring again may help.
    """
    depth = max(point.queue_depth for point in probe.points)
    deepest = {point.bytes: point for point in probe.points if point.queue_depth == depth}
    rates = {size: point.bytes_per_second for size, point in deepest.items()}
    how = "direct I/O"
    if not probe.direct:
        how = "reads through the page cache, for lack of direct I/O (not the storage's own)"
    if probe.in_memory:
        how = f"reads of a {probe.file_system}, which lies in memory: these figures are not those of a storage device"
    profile = _profile(
        name=name,
        description=f"Random reads measured by `neuralink probe` with {how}.",
        source=f"Random reads of a file of {probe.file_bytes:,} bytes.",
        queue_depth=depth,
        rates=sorted(rates.items()),
    )
    smallest = profile.device.reads[0]
    latency = max(probe.single_read_seconds - smallest.seconds, 0.0)
    fills = {size: round(point.fill_seconds(latency), 9) for size, point in deepest.items()}
    reads = [
        read | ({"fill_seconds": fills[read["bytes"]]} if fills[read["bytes"]] else {})
        for read in profile.document["reads"]
    ]
    more: dict[str, Any] = {"latency_seconds": round(latency, 9), "reads": reads}
    if probe.page_bytes > 1:
        more["page_bytes"] = probe.page_bytes
    if probe.sustained is not None:
        cold = rates[probe.sustained.bytes]
        more["hot_rate"] = round(min(probe.sustained.bytes_per_second / cold, 1.0), 3)
    document = profile.document | more
    return replace(profile, document=document, device=parse_device(document, name))


def fio_profile(path: Path, name: str) -> Profile:
    """The device profile from the JSON output of fio.

    Raises:
        InputError: The file is not fio's JSON output, or lacks figures.
    """
    with advising("pass what fio printed with --output-format=json"):
        document = read_measurements(path)
        if not is_fio_output(document):
            raise InputError("is not fio's JSON output", where=path)
    measured = parse_fio(document, path)
    return _profile(
        name=name,
        description="Random reads measured with fio.",
        source=f"JSON output of {document['fio version']}.",
        queue_depth=measured.queue_depth,
        rates=measured.rates,
    )


def file_system_of(directory: Path) -> str | None:
    """The type of the file system that a directory is on; None where the system does not say."""
    try:
        device = directory.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        if left.split()[2:3] == [wanted] and right:
            return right.split()[0]
    return None


def write_profile(path: Path, profile: Profile, *, overwrite: bool = False) -> None:
    """Write a profile, complete and flushed to the device.

    Raises:
        OutputError: The output exists and `overwrite` is false, or cannot be written.
    """
    with new_file(path, overwrite=overwrite) as handle:
        write_all(handle, readable(profile.document).encode())


def monotone(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in the sense of least squares (pooling adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count > total * pools[-1][1]:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def _profile(
    *, name: str, description: str, source: str, queue_depth: int, rates: Sequence[tuple[int, float]]
) -> Profile:
    measured = [size / rate for size, rate in rates]
    reads: list[dict[str, int]] = []
    longest = 0.0
    for (size, _), seconds in zip(rates, monotone(measured), strict=True):
        rate = int(size / seconds)
        # Whole numbers read better; rounding must not make a larger read the faster one again.
        while size / rate < longest:
            rate -= 1
        longest = size / rate
        reads.append({"bytes": size, "bytes_per_second": rate})
    document: dict[str, Any] = {
        "format": PROFILE_FORMAT,
        "version": 1,
        "name": name,
        "description": description,
        "source": source,
        "queue_depth": queue_depth,
        "reads": reads,
    }
    pooled = [
        size
        for (size, _), before, after in zip(rates, measured, monotone(measured), strict=True)
        if abs(after - before) > 1e-9 * before
    ]
    return Profile(document, _device(document, rates), tuple(pooled))


def _device(document: dict[str, Any], rates: Sequence[tuple[int, float]]) -> DeviceModel:
    """The model of a profile; if the line fitted to its reads makes no sense, the profile states another."""
    try:
        return parse_device(document, document["name"])
    except InputError:
        size, rate = np.array(rates, dtype=np.float64).T
        if len(rates) < 2 or not (size / rate)[-1] > (size / rate)[0]:
            raise
    # Small reads measured as cheap per byte as large ones: an operation costs next to nothing.
    bandwidth = float((rate**2).sum() / rate.sum())
    document |= {"operation_seconds": _LEAST_SECONDS, "bytes_per_second": bandwidth}
    return parse_device(document, document["name"])


@contextlib.contextmanager
def _temporary_file(
    directory: Path, size: int, random: np.random.Generator, queue_depths: Sequence[int]
) -> Iterator[list[ScatteredFile]]:
    """A file of random bytes, opened once for every queue depth."""
    if not directory.is_dir():
        raise InputError(
            "is not a directory", where=directory, fix="pass a folder on the storage that is to be measured"
        )
    require_space(directory / "probe", size)
    with contextlib.ExitStack() as stack:
        try:
            descriptor, name = tempfile.mkstemp(prefix=".neuralink-probe-", dir=directory)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=directory) from None
        stack.callback(os.close, descriptor)
        try:
            os.ftruncate(descriptor, size)
            files = [stack.enter_context(ScatteredFile(Path(name), queue_depth=depth)) for depth in queue_depths]
        finally:
            # Open files need no name; without a name nothing can leave the file behind.
            Path(name).unlink()
        try:
            _fill(descriptor, size, random)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=directory) from None
        yield files


def _fill(descriptor: int, size: int, random: np.random.Generator) -> None:
    """Write random bytes, which no storage can compress, flush them, and let the page cache forget them."""
    with os.fdopen(descriptor, "wb", buffering=0, closefd=False) as handle:
        for start in range(0, size, _CHUNK):
            write_all(handle, random.bytes(min(_CHUNK, size - start)))
        os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _single_read_seconds(file: ScatteredFile, size: int, random: np.random.Generator) -> float:
    """What one read takes on its own: the median of several means, as other work on the machine may disturb some."""
    buffer = aligned_buffer(size)
    sizes, places = np.full(1, size), np.zeros(1, dtype=np.int64)
    offsets = random.integers(0, (file.size - size) // UNIT + 1, (_TURNS, _SINGLE_READS, 1)) * UNIT
    means = [np.mean([file.read(offset, sizes, buffer, places) for offset in turn]) for turn in offsets]
    return float(np.median(means))


def _batch_seconds(file: ScatteredFile, size: int, seconds: float, random: np.random.Generator) -> float:
    """What a batch of reads takes that fills the queue, on its own: the median of some."""
    buffer = aligned_buffer(max(_BUFFER_BYTES, size))
    reads = _FILLED * file.queue_depth
    sizes, places = np.full(reads, size), np.arange(reads) % (buffer.size // size) * size
    taken: list[float] = []
    while len(taken) < _BATCHES and (len(taken) < _TURNS or sum(taken) < seconds):
        offsets = random.integers(0, (file.size - size) // UNIT + 1, reads) * UNIT
        taken.append(file.read(offsets, sizes, buffer, places))
    return float(np.median(taken))


def _sustain(file: ScatteredFile, size: int, seconds: float, random: np.random.Generator) -> ProbePoint:
    """Read without a pause; what the last quarter of the time took."""
    began = time.monotonic()
    points: list[ProbePoint] = []
    while not points or time.monotonic() - began < seconds:
        points.append(_measure(file, size, seconds / 40, random))
    last = points[-max(len(points) // 4, 1) :]
    return ProbePoint(size, file.queue_depth, sum(p.reads for p in last), sum(p.seconds for p in last))


def _measure(file: ScatteredFile, size: int, seconds: float, random: np.random.Generator) -> ProbePoint:
    buffer = aligned_buffer(max(_BUFFER_BYTES, size))
    slots = buffer.size // size

    def read(reads: int) -> float:
        offsets = random.integers(0, (file.size - size) // UNIT + 1, reads) * UNIT
        return file.read(offsets, np.full(reads, size), buffer, np.arange(reads) % slots * size)

    pilot = reads = _PILOT * file.queue_depth
    taken = read(pilot)
    if taken < seconds:
        # The median of several, as other work on the machine may disturb some.
        reads = max(int(pilot * seconds / _TURNS / taken), pilot)
        taken = float(np.median([read(reads) for _ in range(_TURNS)]))
    return ProbePoint(size, file.queue_depth, reads, taken)
