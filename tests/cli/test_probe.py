from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuralink_cli.cli import exit_codes
from neuralink_cli.devices.device import find_device
from tests.cli.conftest import Neuralink

QUICK = ("--size", 4, "--size", 1024, "--queue-depth", 4, "--file-bytes", 4 << 20, "--seconds", 0.02)


def write_fio(path: Path) -> Path:
    random_reads = {"rw": "randread", "direct": "1", "ioengine": "libaio"}
    jobs = [
        {
            "job options": {"bs": str(size), "iodepth": "8", **random_reads},
            "read": {"total_ios": 100, "io_bytes": 100 * size, "bw_bytes": rate, "bw": rate / 1024},
        }
        for size, rate in ((4096, 3e8), (8192, 8e8), (65536, 1.5e9))
    ]
    path.write_text(json.dumps({"fio version": "fio-3.36", "jobs": jobs}))
    return path


def test_a_profile_is_measured_and_can_be_used(neuralink: Neuralink, tmp_path: Path) -> None:
    folder, output = tmp_path / "disk", tmp_path / "disk.device.json"
    folder.mkdir()
    outcome = neuralink("probe", folder, "-o", output, *QUICK)
    assert outcome.code == 0
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["read", "in", "flight", "reads/s", "MB/s"]
    assert [line.split()[:3] for line in lines[1:3]] == [["4", "KiB", "4"], ["1024", "KiB", "4"]]
    assert lines[3].startswith(f"{output}: about ")
    assert lines[3].endswith("/s at queue depth 4")
    assert list(folder.iterdir()) == []
    device = find_device(str(output))
    assert (device.name, device.queue_depth) == ("disk", 4)
    assert [rate.bytes for rate in device.reads] == [4096, 1 << 20]


def test_json_has_everything(neuralink: Neuralink, tmp_path: Path) -> None:
    outcome = neuralink("probe", tmp_path, "--json", "-q", *QUICK)
    assert (outcome.code, outcome.stderr) == (0, "")
    summary = json.loads(outcome.stdout)
    assert summary["output"] is None
    assert isinstance(summary["direct"], bool)
    assert [(point["bytes"], point["queue_depth"]) for point in summary["points"]] == [(4096, 4), (1 << 20, 4)]
    assert summary["profile"]["name"] == "probe"
    assert summary["operation_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_fio_output_becomes_a_profile_with_a_remark(neuralink: Neuralink, tmp_path: Path) -> None:
    source = write_fio(tmp_path / "phone.json")
    output = tmp_path / "phone.device.json"
    outcome = neuralink("probe", "--from-fio", source, "-o", output, "--name", "my phone")
    assert outcome.code == 0
    assert outcome.stderr == (
        "neuralink: larger reads took less time than smaller ones; averaged in the profile: 4.1 kB, 8.2 kB\n"
    )
    assert len(outcome.stdout.splitlines()) == 5
    assert find_device(str(output)).name == "my phone"


def test_an_output_is_not_replaced_unasked(neuralink: Neuralink, tmp_path: Path) -> None:
    source, output = write_fio(tmp_path / "phone.json"), tmp_path / "out"
    output.write_text("mine")
    outcome = neuralink("probe", "--from-fio", source, "-o", output)
    assert outcome.code == exit_codes.OUTPUT
    assert "--overwrite" in outcome.error
    assert output.read_text() == "mine"
    assert neuralink("probe", "--from-fio", source, "-o", output, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "pass either a directory to measure or --from-fio"),
        ((".", "--from-fio", "x"), "pass either a directory to measure or --from-fio"),
        ((".", "--size", "4"), "at least two different --size"),
        ((".", "--size", "4", "--size", "6"), "multiples of 4 KiB"),
        ((".", "--file-bytes", 1 << 20), "too small for random reads of 1024 KiB"),
    ],
)
def test_options_that_do_not_go_together(neuralink: Neuralink, arguments: tuple[object, ...], complaint: str) -> None:
    outcome = neuralink("probe", *arguments)
    assert outcome.code == exit_codes.USAGE
    assert complaint in outcome.error


def test_bad_inputs(neuralink: Neuralink, tmp_path: Path) -> None:
    missing = neuralink("probe", tmp_path / "missing", "-q", *QUICK)
    assert missing.code == exit_codes.INPUT
    assert "is not a directory" in missing.error
    (tmp_path / "other.json").write_text("{}")
    other = neuralink("probe", "--from-fio", tmp_path / "other.json")
    assert other.code == exit_codes.INPUT
    assert "--output-format=json" in other.error
    full = neuralink("probe", tmp_path, "-q", "--file-bytes", 1 << 60)
    assert full.code == exit_codes.OUTPUT
