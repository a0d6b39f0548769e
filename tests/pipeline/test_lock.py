"""The lock file: what is written can be read, damage is told, and differences have names."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import canonical, read_object
from neuralink_cli.pipeline.lock import FileDigest, LockEntry, differences, read_lock, write_lock

ENTRY = LockEntry(
    stage="bench",
    device="nvme",
    output="nvme/bench.json",
    made_from={"tool": "neuralink 1", "stages": {"trace.safetensors": "a" * 64}},
    versions={"numpy": "2"},
    digest="b" * 64,
    files={"nvme/bench.json": FileDigest(3, "b" * 64)},
)
EMPTY = LockEntry("summary", None, "summary.json", None, {}, None, {})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    assert read_lock(path) is None
    lock = {entry.output: entry for entry in (ENTRY, EMPTY)}
    write_lock(path, lock)
    assert read_lock(path) == lock
    write_lock(path, {EMPTY.output: EMPTY})
    assert read_lock(path) == {EMPTY.output: EMPTY}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("version", 2, "has version 2, but this tool reads 1"),
        ("format", "neuralink-flash", "not a valid lock file: at format"),
        ("stages", [{"stage": "bench"}], "not a valid lock file: at stages"),
        ("more", 1, "not a valid lock file: at the top"),
    ],
)
def test_a_malformed_lock_file_is_refused(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    path = tmp_path / "lock.json"
    write_lock(path, {ENTRY.output: ENTRY})
    path.write_text(canonical({**read_object(path), key: value}))
    with pytest.raises(InputError, match=complaint):
        read_lock(path)


def test_an_output_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    write_lock(path, {"a": ENTRY, "b": ENTRY})
    with pytest.raises(InputError, match=r"lists 'nvme/bench\.json' twice"):
        read_lock(path)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, ["a.b: x -> y"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1]: 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] -> [1,2]"]),
        ({}, {"a": None}, []),
        ({"a": 1}, {"a": 1.0}, ["a: 1 -> 1.0"]),
        (None, {"a": 1}, [': null -> {"a":1}']),
        ({"a": "0" * 64}, {"a": "1" * 64}, [f"a: {'0' * 12} -> {'1' * 12}"]),
        ({"a": "x" * 50}, {"a": "y"}, [f"a: {'x' * 37}... -> y"]),
    ],
)
def test_differences_are_named(before: object, after: object, found: list[str]) -> None:
    assert list(differences(before, after)) == found
