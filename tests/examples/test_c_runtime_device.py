"""The runtime in C: device profiles that it measures and reads, memory for reads, and keys and values in float16."""

from __future__ import annotations

import ctypes
import json
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli import devices
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel, find_device, parse_device
from tests.examples.conftest import CRuntime
from tests.examples.test_c_runtime_models import PROMPT, TINY_RELU, ask, generate, lay_out, logits

PROFILES = sorted(Path(str(resources.files(devices))).glob("profiles/*.json"))
PAGE = 4096


class Device(ctypes.Structure):
    """`NlDevice`."""

    _fields_ = (
        ("operation_seconds", ctypes.c_double),
        ("bytes_per_second", ctypes.c_double),
        ("page_bytes", ctypes.c_uint64),
    )


class Error(ctypes.Structure):
    """`NlError`."""

    _fields_ = (("code", ctypes.c_int), ("text", ctypes.c_char * 400))


class ProbePoint(ctypes.Structure):
    """`NlProbePoint`."""

    _fields_ = (
        ("bytes", ctypes.c_uint64),
        ("reads", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("batch_seconds", ctypes.c_double),
    )


class Probe(ctypes.Structure):
    """`NlProbe`."""

    _fields_ = (
        ("points", ProbePoint * 5),
        ("count", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("single_seconds", ctypes.c_double),
        ("direct", ctypes.c_int),
        ("reads", ctypes.c_char_p),
        ("file_bytes", ctypes.c_uint64),
    )


def read_device(runtime: CRuntime, path: Path) -> tuple[Device, Error]:
    device, error = Device(), Error()
    failed = runtime.shared_library().nl_device_read(ctypes.byref(device), str(path).encode(), ctypes.byref(error))
    assert failed == (-1 if error.code else 0)
    return device, error


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("tiny_relu"), TINY_RELU, threshold=0.0)


def call(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], input="", capture_output=True, text=True, check=False)


def require_same_gaps(runtime: CRuntime, device: Device, model: DeviceModel) -> None:
    library = runtime.shared_library()
    library.nl_device_gap.restype = ctypes.c_uint64
    for stride in (18, 512, 1024, 1156, 2304, 4096, 8192, 24576, 100_000):
        gap = library.nl_device_gap(ctypes.byref(device), ctypes.c_uint64(stride))
        assert gap == collapse_gap(model.operation_in_bundles(stride)), stride


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_gaps_are_those_of_the_package(c_runtime: CRuntime, path: Path) -> None:
    device, error = read_device(c_runtime, path)
    assert error.code == 0
    model = find_device(path.stem)
    assert device.operation_seconds == pytest.approx(model.operation_seconds)
    assert device.bytes_per_second == pytest.approx(model.bytes_per_second)
    require_same_gaps(c_runtime, device, model)


def test_a_stated_cost_counts_before_measured_reads(c_runtime: CRuntime, tmp_path: Path) -> None:
    document = json.loads(PROFILES[0].read_bytes()) | {
        "operation_seconds": 3e-5, "bytes_per_second": 7.5e8, "page_bytes": 512,
    }  # fmt: skip
    (tmp_path / "device.json").write_text(json.dumps(document))
    device, _ = read_device(c_runtime, tmp_path / "device.json")
    require_same_gaps(c_runtime, device, parse_device(document, "device.json"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "fio"}, 'format is not "neuralink-device"'),
        ({"version": 2}, "version is 2"),
        ({"page_bytes": 0}, "page_bytes is 0"),
        ({"operation_seconds": -1e-5, "bytes_per_second": 1e9}, "operation_seconds is not above 0"),
        ({"reads": []}, "no positive cost per read and per byte"),
        ({"reads": [{"bytes": 4096, "bytes_per_second": 1e8}]}, "no positive cost"),
        ({"reads": [{"bytes": 4096, "bytes_per_second": 1e8}] * 2}, "by ascending size"),
        (
            {"reads": [{"bytes": 4096, "bytes_per_second": 1e8}, {"bytes": 8192, "bytes_per_second": 4e8}]},
            "no positive",
        ),
        ({"reads": [{"bytes": 4096}, {"bytes": 8192}]}, "not sizes and rates"),
        ({"reads": 5}, "no positive cost"),
    ],
)
def test_profiles_that_cannot_be_right(
    c_runtime: CRuntime, layout: Path, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps(json.loads(PROFILES[0].read_bytes()) | changes))
    result = call(c_runtime.checked / "flash_run", "--device", path, layout)
    assert (result.returncode, complaint in result.stderr) == (1, True), result.stderr


def test_it_measures_a_profile_for_cluster(c_runtime: CRuntime, layout: Path) -> None:
    result = call(c_runtime.fast / "flash_run", "--probe", "my phone", "--queue-depth", "4", layout)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    device = parse_device(document, "stdout")
    assert (device.name, device.queue_depth) == ("my phone", 4)
    flash_bytes = max(path.stat().st_size for path in layout.glob("*.safetensors"))
    assert [read.bytes for read in device.reads] == [
        size for size in (4096, 16384, 65536, 262144, 1048576) if 2 * size <= flash_bytes
    ]
    assert str(flash_bytes) in document["source"]


def test_its_profile_says_what_a_queue_takes_to_fill(c_runtime: CRuntime) -> None:
    """As `probe` works it out: what a batch takes beyond the latency and the time of its reads, twice the queue."""
    # Reads of 10, 40 and 90 us: 16 of them take 160, 640 and 1,440, and there is a latency of 50.
    measured = ((4096, 100, 1e-3, 400e-6), (65536, 10, 4e-4, 500e-6), (262144, 10, 9e-4, 2.5))
    points = (ProbePoint * 5)(*(ProbePoint(*point) for point in measured))
    probe = Probe(points, 3, 8, 60e-6, 1, b"threads", 1 << 30)
    text, error = ctypes.create_string_buffer(2000), Error()
    assert (
        c_runtime.shared_library().nl_probe_profile(ctypes.byref(probe), b"slow", text, 2000, ctypes.byref(error)) == 0
    )
    document = json.loads(text.value)
    assert "fill_seconds" not in document["reads"][1], "less than expected is noise"
    device = parse_device(document, "text")
    assert device.latency_seconds == pytest.approx(50e-6)
    assert [rate.fill_seconds for rate in device.reads] == pytest.approx([190e-6, 0, 2.5 - 1490e-6])


@pytest.mark.parametrize("name", ["", 'a"b', "a\\b", "a\nb", 300 * "x"])
def test_names_that_no_profile_can_have(c_runtime: CRuntime, layout: Path, name: str) -> None:
    result = call(c_runtime.checked / "flash_run", "--probe", name, layout)
    assert (result.returncode, result.stdout) == (1, "")
    assert "a device's name has" in result.stderr


def test_a_wrong_name_is_refused_before_anything_is_measured(c_runtime: CRuntime, tmp_path: Path) -> None:
    """Nothing can be measured there, and the name is still what is complained of."""
    result = call(c_runtime.fast / "flash_run", "--probe", "", tmp_path)
    assert (result.returncode, "a device's name has" in result.stderr) == (1, True)


def test_float16_is_rounded_as_numpy_rounds_it(c_runtime: CRuntime) -> None:
    library = c_runtime.shared_library()
    library.nl_narrow_f16.restype = ctypes.c_uint16
    random = np.random.default_rng(3)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    values = np.concatenate(
        [
            halves[::7],
            ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)[::5],  # halfway: to the even one
            np.exp(random.uniform(-20, 11, 5000)).astype(np.float32),
            np.array([0, 65504, 65519, 1e-8, 2.0**-25, 2.0**-25 * 1.0001], dtype=np.float32),
        ]
    )
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert [library.nl_narrow_f16(ctypes.c_float(value)) for value in values.tolist()] == expected.tolist()
    for large in (65520.0, 1e30, float("inf")):
        assert library.nl_narrow_f16(ctypes.c_float(large)) == 0x7BFF
    assert np.isnan(np.uint16(library.nl_narrow_f16(ctypes.c_float(float("nan")))).view(np.float16))


@pytest.mark.parametrize("program", ["checked", "fast"])
def test_keys_and_values_take_half_the_memory_in_float16(c_runtime: CRuntime, layout: Path, program: str) -> None:
    engine = getattr(c_runtime, program) / "flash_run"
    half = ("--keys-values", "f16")
    exact, near = logits(engine, layout, PROMPT), logits(engine, layout, PROMPT, *half)
    assert 0 < abs(exact - near).max() < 2e-3 * abs(exact).max()
    assert generate(engine, layout, PROMPT, 20) == generate(engine, layout, PROMPT, 20, *half)
    planned = [json.loads(ask(engine, layout, options=of)[0].removeprefix("memory ")) for of in ((), half)]
    assert planned[1]["sequence_bytes"] == pytest.approx(planned[0]["sequence_bytes"] / 2, rel=1e-3)


class Room(ctypes.Structure):
    """`NlRoom`."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("taken", ctypes.c_void_p),
        ("pages", ctypes.c_uint64),
        ("next", ctypes.c_uint64),
    )


def test_room_for_reads_is_never_given_twice(c_runtime: CRuntime) -> None:
    library = c_runtime.shared_library()
    library.nl_room_take.restype = ctypes.c_void_p
    pages, base = 64, 1 << 30
    taken = np.zeros(pages, dtype=np.uint8)
    room = Room(base, taken.ctypes.data, pages, 0)
    random = np.random.default_rng(1)
    held: list[tuple[int, int]] = []
    refused = 0
    for _ in range(3000):
        if held and random.random() < 0.5:
            at, size = held.pop(int(random.integers(len(held))))
            library.nl_room_give(ctypes.byref(room), ctypes.c_void_p(at), ctypes.c_uint64(size))
            continue
        size = int(random.integers(1, 20 * PAGE))
        found = library.nl_room_take(ctypes.byref(room), ctypes.c_uint64(size))
        free = "".join("x" if page in _pages_of(held, base) else "." for page in range(pages))
        needed = -(-size // PAGE)
        if found is None:
            # There may be none only if no free stretch is long enough.
            assert needed > max(map(len, free.split("x")))
            refused += 1
            continue
        assert (found - base) % PAGE == 0
        assert free[(found - base) // PAGE :][:needed] == "." * needed
        held.append((found, size))
    assert refused > 10


def _pages_of(held: list[tuple[int, int]], base: int) -> set[int]:
    return {(at - base) // PAGE + k for at, size in held for k in range(-(-size // PAGE))}
