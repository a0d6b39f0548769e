"""Schemas: exact types, whole patterns, and the same of what stages hand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.activations.trace import TRACE_SCHEMA, Trace, write_trace
from neuralink_cli.errors import InputError
from neuralink_cli.files.journal import JOURNAL_FILE, Journal, read_marks
from neuralink_cli.files.schema import check_document
from neuralink_cli.layout.index import FLASH_SCHEMA, PERMUTED_SCHEMA
from neuralink_cli.placement.placement import PLACEMENT_SCHEMA
from tests.damage import put
from tests.traces import write_clustered_trace

SCHEMAS = (TRACE_SCHEMA, PLACEMENT_SCHEMA, FLASH_SCHEMA, PERMUTED_SCHEMA)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schema") / "trace"
    write_clustered_trace(path)
    return path


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("version",), 1.0), (("version",), True), (("blocks", 0, "neurons"), 60.0), (("blocks", 0, "neurons"), 2**31),
        (("blocks", 0, "neurons"), True), (("blocks", 0, "part_bytes", "up"), 2**63), (("blocks", 0, "hidden"), 2**53),
        (("blocks", 0, "threshold"), 10**40), (("content_sha256",), "ab" * 32 + "\n"),
        (("sources", 0, "parameters", "revision"), 3), (("sources", 0, "name"), "a\0b"), (("sources", 0, "name"), ""),
        *((("blocks", 0, "id"), name) for name in ("../../x", "/x", "a/b", "a\0b", "a\n", "..", ".", "", "x" * 201)),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_where_they_are_read(trace: Path, way: tuple[Any, ...], value: object) -> None:
    with Trace(trace) as opened:
        document = json.loads(json.dumps(opened.document))
    document["sources"][0]["parameters"]["revision"] = None
    check_document(document, TRACE_SCHEMA, "trace")
    put(document, way, value)
    with pytest.raises(InputError, match="not a valid trace"):
        check_document(document, TRACE_SCHEMA, "trace")


def test_what_stages_hand_on_has_one_schema() -> None:
    def ids(schema: dict[str, Any]) -> Any:
        blocks = schema["properties"]["blocks"]["items"]
        return (schema["$defs"]["block"] if "$ref" in blocks else blocks)["properties"]["id"]

    schemas = [schema.read() for schema in SCHEMAS]
    for of in (
        ids,
        lambda schema: schema["properties"]["model"],
        lambda schema: schema["properties"]["origin"],
        lambda schema: schema["properties"]["calibration"]["oneOf"],
        lambda schema: schema["$defs"]["name"],
    ):
        assert all(of(schema) == of(schemas[0]) for schema in schemas)


def test_what_could_not_be_read_is_not_written(tmp_path: Path, trace: Path) -> None:
    from dataclasses import replace

    with Trace(trace) as opened:
        wrong = replace(opened.info, blocks=(replace(opened.info.blocks[0], id="../x"),))
        with pytest.raises(InputError, match="not a valid trace"):
            write_trace(tmp_path / "out", wrong, opened.sequence_lengths, opened.sequence_digests, lambda _: [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000, '{"a":' * 100_000, '{"file":"x","size":' + "9" * 5000 + ',"sha256":"%s"}' % ("a" * 64),
        '{"file":"x","size":1e400,"sha256":"%s"}' % ("a" * 64), '{"file":"x","size":4.0,"sha256":"%s"}' % ("a" * 64),
        '{"file":3,"size":4,"sha256":"%s"}' % ("a" * 64), "[]", "null", '{"file":"x","size":-1,"sha256":"x"}',
    ],
)  # fmt: skip
def test_a_journal_of_nonsense_is_not_believed(tmp_path: Path, line: str) -> None:
    with Journal(tmp_path, {"run": 1}) as journal:
        journal.add("x", 4, "a" * 64)
    assert read_marks(tmp_path, {"run": 1}) is not None
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write(line + "\n")
    assert read_marks(tmp_path, {"run": 1}) is None
