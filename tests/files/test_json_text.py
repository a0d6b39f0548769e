from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.errors import InputError
from neuralink_cli.files.json_text import canonical, parse_object, read_foreign_object, read_object, readable

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)
objects = st.dictionaries(st.text(st.characters(codec="utf-8")), values, max_size=4)


@given(objects)
def test_both_spellings_are_read_back(document: dict[str, Any]) -> None:
    assert parse_object(canonical(document), "x") == document
    assert parse_object(readable(document).encode(), "x") == document


@given(objects)
def test_the_canonical_spelling_does_not_depend_on_the_order_of_keys(document: dict[str, Any]) -> None:
    backwards = dict(reversed(document.items()))
    assert canonical(backwards) == canonical(document)
    assert canonical(document).isascii()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_never_writes_what_is_not_json(number: float) -> None:
    for write in (canonical, readable):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write({"a": number})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'"{}"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'{"b": {"a": 1, "c": 2, "a": 1}}', "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999 is out of range"),
        (b'{"a": -1e999}', "-1e999 is out of range"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"a": ' + b"[" * 200_000, "not valid JSON"),
    ],
)
def test_refuses(text: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=f"^config.json: .*{complaint}"):
        parse_object(text, "config.json")


def test_says_which_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.json: cannot be opened \(No such file or directory\)"):
        read_object(tmp_path / "absent.json")
    with pytest.raises(InputError, match="is a directory, not a regular file"):
        read_object(tmp_path)
    (tmp_path / "there.json").write_text(json.dumps({"a": [1]}))
    assert read_object(tmp_path / "there.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'\xef\xbb\xbf{"a": 1}', "starts with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text (byte 0 is no part of any)"),
        (b'{"caf\xe9": 1}', "is not UTF-8 text (byte 5 is no part of any)"),
    ],
)
def test_files_of_others_in_another_encoding(tmp_path: Path, text: bytes, complaint: str) -> None:
    """As editors on Windows save them. transformers refuses them too."""
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        read_foreign_object(tmp_path / "config.json")
    assert caught.value.what == complaint
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("save it as UTF-8 without a byte order mark")


@given(values)
def test_what_people_read_is_what_json_itself_indents(value: Any) -> None:
    document = {"a": value, "empty": [{}, []], "pair": (1, value)}
    assert readable(document) == json.dumps(document, indent=2) + "\n"


def test_a_record_stands_for_its_fields() -> None:
    @dataclass(frozen=True, slots=True)
    class Record:
        size: int
        parts: tuple[Any, ...]

    record = Record(1, (Record(2, ()),))
    assert parse_object(canonical(record), "x") == asdict(record) | {"parts": [{"size": 2, "parts": []}]}
    assert parse_object(readable({"of": record}), "x") == {"of": parse_object(canonical(record), "x")}
    with pytest.raises(TypeError):
        canonical({"of": object()})


def test_texts_of_many_records_take_little_more_memory_than_the_text() -> None:
    """json keeps a piece of text for every bracket until the end: five times as much."""
    parts = [{"at": k, "shape": [k, k]} for k in range(8)]
    document = {"blocks": [{"id": f"block {k}", "parts": parts} for k in range(1000)]}
    tracemalloc.start()
    text = readable(document)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    json.dumps(document, indent=2)
    assert tracemalloc.get_traced_memory()[1] - before > 2 * taken
    tracemalloc.stop()
    assert taken < 2.2 * len(text)
