"""Schemas: exact types, whole patterns, and the same of what stages hand on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import neuralink_cli
from neuralink_cli.activations.trace import TRACE_SCHEMA, Trace, write_trace
from neuralink_cli.architectures.architecture import ARCHITECTURE_SCHEMA
from neuralink_cli.devices.device import DEVICE_SCHEMA
from neuralink_cli.errors import InputError
from neuralink_cli.files.schema import Schema, _check, _validator, check_document
from neuralink_cli.files.schema_check import compile_schema
from neuralink_cli.layout.index import FLASH_SCHEMA, PERMUTED_SCHEMA
from neuralink_cli.placement.placement import PLACEMENT_SCHEMA, Placement
from neuralink_cli.streaming.journal import JOURNAL_FILE, Journal, read_marks
from tests.damage import leaves, put
from tests.layouts import LayoutFactory
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


PACKAGE = Path(neuralink_cli.__file__).parent
# One or several of every type, and of the edges between what is valid and what is not.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    0.5,
    -0.5,
    2**31,
    2**53,
    "",
    "a",
    "a\n",
    "F32",
    "x" * 300,
    [],
    {},
)
DAMAGED = 40


def damaged(document: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Copies of a document with a value changed, or a member missing or too many."""
    draw = random.Random(seed)
    places = [place for place, _ in leaves(document)]
    for _ in range(DAMAGED):
        copy = json.loads(json.dumps(document))
        place = draw.choice(places)
        place = place[: draw.randint(1, len(place))]
        parent = copy
        for step in place[:-1]:
            parent = parent[step]
        match draw.randrange(4):
            case 0 if isinstance(parent, dict):
                del parent[place[-1]]
            case 1 if isinstance(parent, dict):
                parent[draw.choice(["unknown", "id", "bytes", "a/b"])] = draw.choice(VALUES)
            case 2 if isinstance(parent, list):
                parent.append(parent[place[-1]])
            case _:
                parent[place[-1]] = draw.choice(VALUES)
        yield copy


def written(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_what_is_checked_quickly_is_what_jsonschema_checks(trace: Path, layouts: LayoutFactory) -> None:
    with Trace(trace) as opened:
        examples: list[tuple[Schema, dict[str, Any]]] = [(TRACE_SCHEMA, dict(opened.document))]
    made = layouts.bundled("llama", resident="gate"), layouts.permuted("llama")
    with Placement(made[0].placement) as placement:
        examples.append((PLACEMENT_SCHEMA, dict(placement.document)))
    examples += [(FLASH_SCHEMA, written(made[0].layout / "model.flash.json"))]
    examples += [(PERMUTED_SCHEMA, written(made[1].layout / "model.permuted.json"))]
    examples += [(DEVICE_SCHEMA, written(path)) for path in sorted(PACKAGE.glob("devices/profiles/*.json"))[:1]]
    examples += [(ARCHITECTURE_SCHEMA, written(path)) for path in sorted(PACKAGE.glob("**/descriptions/*.json"))[::12]]
    valid = 0
    for seed, (schema, document) in enumerate(examples):
        assert _check(schema)(document)
        for copy in damaged(document, seed):
            expected = _validator(schema).is_valid(copy)
            assert _check(schema)(copy) == expected, (schema, copy)
            valid += expected
    assert len(examples) * DAMAGED * 0.05 < valid < len(examples) * DAMAGED * 0.6


def test_every_schema_is_understood() -> None:
    schemas = sorted(PACKAGE.glob("**/*.schema.json"))
    assert len(schemas) >= 10
    for path in schemas:
        compile_schema(written(path))
    with pytest.raises(ValueError, match="not known: if, then"):
        compile_schema({"properties": {"a": {"if": {}, "then": {}}}})


def test_a_definition_may_refer_to_itself() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}
    check = compile_schema({"$ref": "#/$defs/tree", "$defs": {"tree": tree}})
    assert check({"next": {"next": {}}})
    assert not check({"next": {"next": {"other": {}}}})


def test_equal_items_and_members_that_need_others() -> None:
    check = compile_schema({"type": "array", "uniqueItems": True, "items": {"dependentRequired": {"a": ["b"]}}})
    assert check([{"a": 1, "b": 2}, {"b": 2}, {}])
    assert not check([{"a": 1}])
    assert not check([{"b": 1}, {"b": 1}])
