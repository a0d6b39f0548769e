"""Device models: built-in profiles, user profiles, fio output, and what they refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.devices.device import (
    DeviceModel,
    builtin_devices,
    device_record,
    find_device,
    parse_device,
    recorded_device,
)
from neuralink_cli.errors import InputError, OptionError

PROFILE = {
    "format": "neuralink-device",
    "version": 1,
    "name": "mine",
    "queue_depth": 8,
    "operation_seconds": 1e-5,
    "bytes_per_second": 2e9,
}
READS = [{"bytes": 4096, "bytes_per_second": 3e8}, {"bytes": 65536, "bytes_per_second": 1.5e9}]


def fio_job(
    size: int, rate: float, *, depth: int = 32, numjobs: int = 1, group: int | None = None, **options: Any
) -> dict[str, Any]:
    stated = {"bs": str(size), "iodepth": str(depth), "numjobs": str(numjobs), "rw": "randread", "ioengine": "libaio"}
    return {
        "jobname": f"bs{size}",
        **({} if group is None else {"groupid": group}),
        "job options": {**stated, **options},
        "read": {"total_ios": 1000, "io_bytes": 1000 * size, "bw": rate / 1024, "bw_bytes": rate, "iops": rate / size},
    }


def fio(*jobs: dict[str, Any]) -> dict[str, Any]:
    return {"fio version": "fio-3.36", "global options": {"direct": "1"}, "jobs": list(jobs)}


def write(path: Path, document: dict[str, Any]) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def test_builtin_profiles_cover_the_promised_devices() -> None:
    devices = builtin_devices()
    assert {"ufs4.0", "ufs3.1", "nvme"} <= set(devices)
    for device in devices.values():
        # Small reads are dear: all of these devices are bound by operations at a few KiB.
        assert device.operation_in_bundles(4096) > 2


def test_break_even_gap_of_ufs4_is_the_papers() -> None:
    device = builtin_devices()["ufs4.0"]
    assert 5 <= device.operation_in_bundles(4096) <= 6
    assert 2 <= device.operation_in_bundles(8192) <= 3
    assert 1 <= device.operation_in_bundles(16384) < 2


def test_a_read_is_rounded_out_to_pages() -> None:
    """On UFS 4.0 an operation on bundles that start anywhere costs 15.5 us, not 13.1, and a lone one moves 6.1 kB."""
    device = builtin_devices()["ufs4.0"]
    assert device.rounding_bytes(2304) == 4096 - 256
    assert device.bundle_read_seconds(1, 2304) == pytest.approx(device.operation_seconds + 6144 / 1.72e9)
    assert device.operation_in_bundles(2304) * 2304 / 1.72e9 == pytest.approx(15.3e-6, rel=0.01)
    assert device.operation_in_bundles(2305) * 2305 / 1.72e9 == pytest.approx(15.5e-6, rel=0.01)
    # Bundles of whole pages need no rounding.
    assert device.rounding_bytes(8192) == 0


@given(st.integers(1, 20000), st.integers(1, 30), st.sampled_from([512, 4096]))
def test_rounding_is_the_average_over_all_places(bundle: int, count: int, page: int) -> None:
    device = DeviceModel("any", 1, 1e-5, 1e9, page_bytes=page)
    starts = np.arange(page) * bundle
    moved = (-(-(starts + count * bundle) // page) - starts // page) * page
    assert np.mean(moved) == pytest.approx(count * bundle + device.rounding_bytes(bundle))


def test_a_hot_device_is_told_apart() -> None:
    cold, hot = find_device("ufs4.0"), find_device("ufs4.0:hot")
    assert hot.name == "ufs4.0:hot"
    np.testing.assert_allclose(hot.read_seconds([4096, 1 << 20]) * 0.67, cold.read_seconds([4096, 1 << 20]))
    with pytest.raises(OptionError, match="does not say how fast it is when hot"):
        find_device("nvme:hot")
    with pytest.raises(OptionError, match="does not say"):
        find_device("ufs4.0:hot").hot()


def test_a_profile_named_like_a_built_in_one_is_used_and_told_apart(tmp_path: Path) -> None:
    device = find_device(write(tmp_path / "mine.json", {**PROFILE, "name": "ufs4.0"}))
    assert device.name == "ufs4.0 (mine.json)"
    assert device.operation_seconds == 1e-5


def test_what_a_placement_records_of_a_device_is_the_whole_model(tmp_path: Path) -> None:
    reads = [READS[0], {**READS[1], "fill_seconds": 2e-3}, *READS[2:]]
    document = {**PROFILE, "reads": reads, "page_bytes": 512, "latency_seconds": 1e-4}
    device = find_device(write(tmp_path / "d.json", document))
    assert (device.page_bytes, device.latency_seconds) == (512, 1e-4)
    assert recorded_device(json.loads(json.dumps(device_record(device))), "x") == device
    assert device_record(device)["reads"] == reads
    assert device.fill_seconds([0, READS[0]["bytes"], READS[1]["bytes"]]) == pytest.approx([0, 0, 2e-3])


def test_fit_to_a_table_recovers_the_line_it_was_made_from() -> None:
    sizes = [4096, 16384, 65536, 1 << 20]
    reads = [{"bytes": size, "bytes_per_second": size / (12e-6 + size / 1.9e9)} for size in sizes]
    document = {k: v for k, v in PROFILE.items() if not k.endswith("seconds") and not k.endswith("second")}
    device = parse_device({**document, "reads": reads}, "x")
    assert device.operation_seconds == pytest.approx(12e-6, rel=1e-6)
    assert device.bytes_per_second == pytest.approx(1.9e9, rel=1e-6)
    assert device.read_seconds(sizes) == pytest.approx([12e-6 + size / 1.9e9 for size in sizes])


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24))
def test_larger_reads_never_cost_less(a: int, b: int) -> None:
    for device in builtin_devices().values():
        small, large = device.read_seconds([min(a, b), max(a, b)])
        assert 0 < small <= large


def test_read_seconds_is_interpolated_between_measured_sizes_and_linear_beyond() -> None:
    device = parse_device({**PROFILE, "reads": READS}, "x")
    first, last = READS[0], READS[1]
    a, b = (read["bytes"] / read["bytes_per_second"] for read in (first, last))
    middle = (first["bytes"] + last["bytes"]) / 2
    assert device.read_seconds(middle) == pytest.approx((a + b) / 2)
    assert device.read_seconds(last["bytes"] + 2_000_000) == pytest.approx(b + 1e-3)
    assert device.read_seconds(1) == pytest.approx(a)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"queue_depth": 0}, "queue_depth"),
        ({"operation_seconds": 0}, "operation_seconds"),
        ({"operation_seconds": -1e-5}, "operation_seconds"),
        ({"bytes_per_second": 0}, "bytes_per_second"),
        ({"bytes_per_second": "fast"}, "bytes_per_second"),
        ({"surprise": 1}, "surprise"),
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"reads": READS[:1]}, "reads"),
        ({"page_bytes": 3000}, "page_bytes"),
        ({"latency_seconds": -1}, "latency_seconds"),
        ({"hot_rate": 1.5}, "hot_rate"),
        ({"reads": READS[::-1]}, "ascending"),
        ({"reads": [{"bytes": 4096, "bytes_per_second": 1e6}, {"bytes": 8192, "bytes_per_second": 1e9}]}, "less time"),
    ],
)
def test_nonsense_profiles_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        find_device(write(tmp_path / "d.json", {**PROFILE, **change}))


def test_a_profile_without_any_cost_is_refused(tmp_path: Path) -> None:
    document = {key: PROFILE[key] for key in ("format", "version", "name", "queue_depth")}
    with pytest.raises(InputError):
        find_device(write(tmp_path / "d.json", document))


def test_reads_whose_time_does_not_grow_are_refused(tmp_path: Path) -> None:
    reads = [{"bytes": size, "bytes_per_second": size / 1e-4} for size in (4096, 8192, 16384)]
    document = {key: PROFILE[key] for key in ("format", "version", "name", "queue_depth")}
    with pytest.raises(InputError, match="no positive cost per read and per byte fits its reads"):
        find_device(write(tmp_path / "d.json", {**document, "reads": reads}))


def test_unknown_name_lists_what_is_built_in() -> None:
    with pytest.raises(OptionError, match=r"ufs4\.0"):
        find_device("floppy")


def test_fio_output_is_a_device(tmp_path: Path) -> None:
    path = write(tmp_path / "phone.json", fio(fio_job(4096, 3e8), fio_job(1 << 20, 2.5e9), fio_job(65536, 1.6e9)))
    device = find_device(path)
    assert device.queue_depth == 32
    assert [read.bytes for read in device.reads] == [4096, 65536, 1 << 20]
    assert device.read_seconds([4096]) == pytest.approx([4096 / 3e8])


def test_either_bandwidth_figure_of_fio_will_do(tmp_path: Path) -> None:
    jobs = [fio_job(4096, 1e8), fio_job(65536, 1e9)]
    del jobs[0]["read"]["bw"], jobs[1]["read"]["bw_bytes"]
    device = find_device(write(tmp_path / "f.json", fio(*jobs)))
    assert [read.bytes_per_second for read in device.reads] == pytest.approx([1e8, 1e9])


def test_fio_jobs_of_a_group_add_up(tmp_path: Path) -> None:
    jobs = [fio_job(4096, 1e8, depth=4, numjobs=2, group=0) for _ in range(2)]
    jobs.append(fio_job(65536, 1e9, depth=8, group=1))
    device = find_device(write(tmp_path / "f.json", fio(*jobs)))
    assert device.queue_depth == 8
    assert device.reads[0].bytes_per_second == pytest.approx(2e8)


def test_fio_takes_the_deepest_queue_with_two_sizes(tmp_path: Path) -> None:
    jobs = [fio_job(4096, 1e8, depth=1), fio_job(65536, 5e8, depth=1), fio_job(4096, 9e8, depth=64)]
    assert find_device(write(tmp_path / "f.json", fio(*jobs))).queue_depth == 1


def test_broken_fio_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two sizes at the same queue depth"):
        find_device(write(tmp_path / "a.json", fio(fio_job(4096, 1e8))))
    broken = copy.deepcopy(fio(fio_job(4096, 1e8), fio_job(8192, 2e8)))
    del broken["jobs"][1]["read"]["total_ios"]
    with pytest.raises(InputError, match="total_ios"):
        find_device(write(tmp_path / "b.json", broken))
    with pytest.raises(InputError, match="at jobs: 3 is not of type 'array'"):
        find_device(write(tmp_path / "c.json", {"fio version": "3", "jobs": 3}))
    writes = [{**fio_job(size, 0), "read": {"total_ios": 0, "io_bytes": 0, "bw": 0}} for size in (4096, 8192)]
    with pytest.raises(InputError, match="at least two sizes at the same queue depth"):
        find_device(write(tmp_path / "d.json", fio(*writes)))


RIGHT = {4096: 160e6, 65536: 530e6, 262144: 940e6}


def jobs_of(rates: dict[int, float] = RIGHT, **options: Any) -> list[dict[str, Any]]:
    return [fio_job(size, rate, group=k, **options) for k, (size, rate) in enumerate(rates.items())]


def rates_of(path: str) -> dict[int, float]:
    return {read.bytes: read.bytes_per_second for read in find_device(path).reads}


def test_fio_jobs_one_after_the_other_are_averaged(tmp_path: Path) -> None:
    again = [fio_job(4096, 150e6, group=3), fio_job(4096, 170e6, group=4)]
    assert rates_of(write(tmp_path / "f.json", fio(*jobs_of(), *again))) == pytest.approx(RIGHT)


def test_fio_jobs_that_are_no_random_direct_reads_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = [
        fio_job(65536, 1310e6, group=3, rw="read"),
        fio_job(65536, 200e6, group=4, rw="randrw"),
        fio_job(65536, 9e9, group=5, direct="0"),
        fio_job(65536, 1e6, group=6, rate_iops="200"),
    ]
    assert rates_of(write(tmp_path / "f.json", fio(*others, *jobs_of()))) == pytest.approx(RIGHT)
    for reason in ("rw=read", "rw=randrw", "direct=0", "rate_iops"):
        assert reason in caplog.text


@pytest.mark.parametrize(
    "options", [{"rw": "read"}, {"rw": "randwrite"}, {"direct": "0"}, {"thinktime": "1m"}, {"rw": "randrw"}]
)
def test_fio_without_random_direct_reads_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"at least two sizes at the same queue depth.*left out"):
        find_device(write(tmp_path / "f.json", fio(*jobs_of(**options))))


def test_fio_jobs_that_disturbed_each_other_or_failed_are_refused(tmp_path: Path) -> None:
    together = [{**job, "groupid": 0} for job in jobs_of()]
    with pytest.raises(InputError, match="ran at the same time"):
        find_device(write(tmp_path / "a.json", fio(*together)))
    failed = jobs_of()
    failed[2]["error"] = 5
    with pytest.raises(InputError, match=r"job 'bs262144' failed \(error 5\)"):
        find_device(write(tmp_path / "b.json", fio(*failed)))
    with pytest.raises(InputError, match="client and server"):
        find_device(write(tmp_path / "c.json", {"fio version": "fio-3.33", "client_stats": jobs_of()}))


def test_a_synchronous_fio_engine_has_one_read_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    note = "note: both iodepth >= 1 and synchronous I/O engine are selected, queue depth will be capped at 1\n"
    path.write_text(note + json.dumps(fio(*jobs_of(ioengine="psync"))))
    assert find_device(str(path)).queue_depth == 1
    levels = [{**job, "iodepth_level": {"1": 100.0, "2": 0.0}} for job in jobs_of()]
    assert find_device(write(path, fio(*levels))).queue_depth == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("io_bytes", 2**63), ("io_bytes", 1.0), ("io_bytes", "many"), ("total_ios", -1), ("total_ios", True),
        ("bw_bytes", 1e300), ("bw_bytes", 10**30), ("bw_bytes", 0.5), ("io_bytes", 2**52),
    ],
)  # fmt: skip
def test_absurd_figures_of_fio_are_refused(tmp_path: Path, key: str, value: object) -> None:
    jobs = jobs_of()
    jobs[1]["read"] |= {key: value}
    with pytest.raises(InputError):
        find_device(write(tmp_path / "f.json", fio(*jobs)))
    for depth in ("0", "-3", "1e9", "9" * 400, "x"):
        with pytest.raises(InputError, match="iodepth"):
            find_device(write(tmp_path / "g.json", fio(*jobs_of(iodepth=depth))))


def test_read_seconds_keeps_the_shape_of_its_argument() -> None:
    device = builtin_devices()["nvme"]
    assert device.read_seconds(np.full((2, 3), 4096)).shape == (2, 3)
