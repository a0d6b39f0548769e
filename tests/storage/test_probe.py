"""Device profiles that are measured: bounded, cleaned up after, and always usable."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.devices.device import find_device, parse_device
from neuralink_cli.errors import InputError, OutputError
from neuralink_cli.storage.probe import (
    Probe,
    ProbePoint,
    Profile,
    _batch_seconds,
    _measure,
    file_system_of,
    fio_profile,
    monotone,
    probe_profile,
    probe_storage,
    write_profile,
)
from tests.storage.test_direct_io import no_direct

SMALL: dict[str, Any] = {"sizes": [4096, 1 << 20], "queue_depths": [1, 8], "file_bytes": 4 << 20, "seconds": 0.01}


def points(*figures: tuple[int, float], depth: int = 8) -> tuple[ProbePoint, ...]:
    """Points from sizes and microseconds a read."""
    return tuple(ProbePoint(size, depth, 1000, 1e-3 * microseconds) for size, microseconds in figures)


def with_plausible_times(probe: Probe) -> Profile:
    """The profile of a probe, but for its times: so short a one on a busy machine may be no device's."""
    figures = points((4096, 16), (1 << 20, 620), depth=max(point.queue_depth for point in probe.points))
    return probe_profile(replace(probe, points=figures), "disk")


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    done: list[int] = []
    probe = probe_storage(tmp_path, **SMALL, progress=done.append)
    assert [(point.queue_depth, point.bytes) for point in probe.points] == [
        (1, 4096), (1, 1 << 20), (8, 4096), (8, 1 << 20),
    ]  # fmt: skip
    assert done == [1, 1, 1, 1]
    for point in probe.points:
        assert point.reads >= 4 * point.queue_depth
        assert point.bytes_per_second == pytest.approx(point.bytes * point.reads_per_second)
    assert list(tmp_path.iterdir()) == []
    profile = with_plausible_times(probe)
    assert profile.device.queue_depth == 8
    assert "direct I/O" in profile.document["description"]


def test_the_profile_is_found_as_a_device(tmp_path: Path) -> None:
    profile = probe_profile(
        Probe(True, "ext4", 1 << 30, points((4096, 16), (16384, 24), (65536, 55), (1 << 20, 620))), "disk"
    )
    write_profile(tmp_path / "disk.json", profile)
    device = find_device(str(tmp_path / "disk.json"))
    assert device == profile.device
    assert device.name == "disk"
    assert device.read_seconds([4096, 65536]) == pytest.approx([16e-6, 55e-6], rel=1e-6)
    with pytest.raises(OutputError, match="already exists"):
        write_profile(tmp_path / "disk.json", profile)
    write_profile(tmp_path / "disk.json", profile, overwrite=True)


def test_without_direct_io_the_profile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_direct(monkeypatch)
    probe = probe_storage(tmp_path, **SMALL)
    assert not probe.direct
    assert "page cache" in with_plausible_times(probe).document["description"]


class SlowFile:
    """In place of a file whose every read takes `seconds`."""

    def __init__(self, size: int, queue_depth: int, seconds: float) -> None:
        self.size, self.queue_depth, self.seconds = size, queue_depth, seconds
        self.requests: list[int] = []
        self.offsets: set[int] = set()

    def read(self, offsets: Any, sizes: Any, buffer: Any, places: Any) -> float:
        (size,) = set(sizes.tolist())
        assert offsets.shape == sizes.shape == places.shape
        assert (offsets % 4096 == 0).all() and (places % size == 0).all()
        assert offsets.min() >= 0 and (offsets + size).max() <= self.size
        assert places.min() == 0 and (places + size).max() <= buffer.size
        # Two reads go to one place in memory only if there is no room for all.
        assert len(set(places.tolist())) == min(offsets.size, buffer.size // size)
        self.offsets |= set(offsets.tolist())
        self.requests.append(offsets.size)
        # Other work on the machine makes the first measurement ten times too long, and the last ten times too short.
        return float(self.seconds * offsets.size * {2: 10.0, 4: 0.1}.get(len(self.requests), 1.0))


@pytest.mark.parametrize(
    ("each", "requests"),
    [(1e-6, [32, 100_000, 100_000, 100_000]), (1e-3, [32, 100, 100, 100]), (5e-3, [32, 32, 32, 32]), (1e-2, [32])],
)
@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_as_many_reads_as_fit_the_time_are_measured_three_times(each: float, requests: list[int], size: int) -> None:
    file = SlowFile(4 << 20, 8, each)
    random = np.random.default_rng(0)
    point = _measure(file, size, 0.3, random)  # type: ignore[arg-type]
    assert file.requests == pytest.approx(requests, abs=1)
    assert (point.bytes, point.queue_depth, point.reads) == (size, 8, file.requests[-1])
    assert point.seconds == pytest.approx(each * point.reads)
    if point.reads > 50_000:
        # Wherever a read fits, one starts.
        assert file.offsets == set(range(0, file.size - size + 1, 4096))


def test_a_profile_says_latency_pages_and_how_fast_it_is_when_hot() -> None:
    figures = points((4096, 16), (65536, 55))
    hot = ProbePoint(65536, 32, 1000, 1000 * 66e-6)
    probe = Probe(True, "ext4", 1 << 30, figures, page_bytes=512, single_read_seconds=140e-6, sustained=hot)
    profile = probe_profile(probe, "disk")
    assert profile.device.latency_seconds == pytest.approx(124e-6, rel=1e-3)
    assert profile.device.page_bytes == 512
    assert profile.device.hot_rate == pytest.approx(55 / 66, rel=1e-3)
    assert parse_device(profile.document, "x") == profile.device


def test_a_profile_says_what_a_queue_takes_to_fill() -> None:
    # 16 reads take 16 times 16 us and the latency; what is more is the queue's, if it is more.
    first, second = points((4096, 16), (65536, 55))
    figures = (replace(first, batch_seconds=300e-6), replace(second, batch_seconds=2e-3))
    profile = probe_profile(Probe(True, "ext4", 1 << 30, figures, single_read_seconds=66e-6), "disk")
    assert profile.device.latency_seconds == pytest.approx(50e-6)
    assert [rate.fill_seconds for rate in profile.device.reads] == [
        0,
        pytest.approx(2e-3 - 16 * 55e-6 - 50e-6, rel=1e-4),
    ]
    assert "fill_seconds" not in profile.document["reads"][0]
    assert parse_device(profile.document, "x") == profile.device


def test_a_queue_of_a_slow_storage_may_take_seconds_to_fill() -> None:
    """As one that lies on a network: its profile was refused."""
    first, second = points((4096, 1000), (1048576, 100_000))
    figures = (first, replace(second, batch_seconds=4.0))
    device = probe_profile(Probe(True, "nfs", 1 << 30, figures), "share").device
    assert device.reads[1].fill_seconds == pytest.approx(4.0 - 16 * 0.1)


@pytest.mark.parametrize(("each", "batches"), [(1e-6, 15), (2e-3, 10), (1.0, 3)])
def test_batches_fill_the_queue_twice(each: float, batches: int) -> None:
    file = SlowFile(4 << 20, 8, each)
    file.requests = [0] * 4
    assert _batch_seconds(file, 65536, 0.3, np.random.default_rng(0)) == pytest.approx(16 * each)  # type: ignore[arg-type]
    assert file.requests[4:] == [16] * batches


def test_sustained_reads_are_measured(tmp_path: Path) -> None:
    probe = probe_storage(tmp_path, **SMALL, sustained=0.2)
    assert probe.sustained is not None
    assert probe.sustained.bytes in SMALL["sizes"]
    assert probe.sustained.reads > 0
    assert probe.single_read_seconds > 0
    assert probe.page_bytes in (1, 512, 4096)
    assert probe_storage(tmp_path, **SMALL).sustained is None


def test_only_the_greatest_depth_makes_the_profile() -> None:
    figures = points((4096, 90), (1 << 20, 900), depth=1) + points((4096, 20), (1 << 20, 500), depth=32)
    profile = probe_profile(Probe(True, None, 1 << 30, figures), "disk")
    assert profile.device.queue_depth == 32
    assert profile.device.read_seconds([4096]) == pytest.approx([20e-6], rel=1e-6)


def test_larger_reads_that_took_less_time_are_averaged() -> None:
    figures = points((4096, 16), (8192, 30), (16384, 24), (65536, 55), (1 << 20, 620))
    profile = probe_profile(Probe(True, None, 1 << 30, figures), "disk")
    assert profile.pooled == (8192, 16384)
    assert profile.device.read_seconds([8192, 16384]) == pytest.approx([27e-6, 27e-6], rel=1e-6)


@given(microseconds=st.lists(st.floats(1, 1000), min_size=2, max_size=10))
def test_any_measurement_makes_a_device_or_is_refused(microseconds: list[float]) -> None:
    figures = points(*((4096 << k, value) for k, value in enumerate(microseconds)))
    try:
        profile = probe_profile(Probe(True, None, 1 << 30, figures), "disk")
    except InputError as error:
        assert "no positive cost per read and per byte fits its reads" in str(error)
        assert microseconds[0] >= microseconds[-1]
        return
    assert len(profile.device.reads) == len(microseconds)
    assert (np.diff([rate.seconds for rate in profile.device.reads]) >= 0).all()


@given(values=st.lists(st.floats(0, 100), max_size=8))
def test_pooling_gives_the_nearest_ascending_values(values: list[float]) -> None:
    result = monotone(values)
    assert len(result) == len(values)
    assert (np.diff(result) >= -1e-9).all()
    # Min-max formula of isotonic regression.
    for k in range(len(values)):
        means = [[np.mean(values[i : j + 1]) for i in range(k + 1)] for j in range(k, len(values))]
        assert result[k] == pytest.approx(min(max(row) for row in means), abs=1e-9)


def test_a_full_disk_is_seen_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="bytes of disk"):
        probe_storage(tmp_path, **{**SMALL, "file_bytes": 1 << 60})
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        probe_storage(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind_by_an_interruption(tmp_path: Path, interrupt: type[BaseException]) -> None:
    def stop(_: int) -> None:
        assert list(tmp_path.iterdir()) == []
        raise interrupt

    with pytest.raises(interrupt):
        probe_storage(tmp_path, **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(InputError, match="is not a directory"):
            probe_storage(directory, **SMALL)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        probe_storage(tmp_path, **SMALL)


@pytest.mark.parametrize("changed", [{"sizes": [4096, 5000]}, {"sizes": [0, 4096]}, {"file_bytes": 1 << 20}])
def test_sizes_that_cannot_be_read_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="multiples of 4096"):
        probe_storage(tmp_path, **{**SMALL, **changed})


def test_fio_output_becomes_a_profile(tmp_path: Path) -> None:
    jobs = [
        {
            "job options": {"iodepth": "32", "rw": "randread", "direct": "1", "ioengine": "libaio"},
            "read": {"total_ios": 100, "io_bytes": 100 * size, "bw_bytes": rate, "bw": rate / 1024},
        }
        for size, rate in ((4096, 3e8), (65536, 1.5e9))
    ]
    path = tmp_path / "fio.json"
    path.write_text(json.dumps({"fio version": "fio-3.36", "jobs": jobs}))
    profile = fio_profile(path, "phone")
    assert profile.device.queue_depth == 32
    assert profile.document["source"] == "JSON output of fio-3.36."
    assert [rate.bytes for rate in profile.device.reads] == [4096, 65536]
    assert find_device(str(path)).read_seconds([4096]) == pytest.approx(profile.device.read_seconds([4096]), rel=1e-6)
    path.write_text("{}")
    with pytest.raises(InputError, match="is not fio's JSON output"):
        fio_profile(path, "phone")


def test_a_file_system_in_memory_is_said_to_be_no_storage_device(tmp_path: Path) -> None:
    measured = points((4096, 16), (16384, 24), (65536, 55), (1 << 20, 620))
    probe = Probe(True, "tmpfs", 1 << 30, measured)
    assert probe.in_memory
    assert "a tmpfs, which lies in memory" in probe_profile(probe, "shm").document["description"]
    assert not Probe(True, "ext4", 1 << 30, measured).in_memory
    mounted = dict(line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
    if mounted.get("/dev/shm") == "tmpfs":
        assert file_system_of(Path("/dev/shm")) == "tmpfs"
    assert file_system_of(tmp_path / "absent") is None
