"""The header against the reference reader: what is built opens there, and what is refused there is refused here."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.errors import InputError
from neuralink_cli.files.header import DTYPE_BITS, MAX_HEADER_BYTES, build_header, parse_header, tensor_bytes
from tests.checkpoints import deserialize

WHERE = "model.safetensors"
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# What the reference reader accepts and we do not, by the words of our refusal.
STRICTER = ("duplicate key", "must have exactly dtype, shape and data_offsets", "does not start with '{'")

names = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_specs = st.lists(
    st.tuples(names, st.sampled_from(sorted(BITS)), shapes).filter(lambda spec: _bits(spec[1], spec[2]) % 8 == 0),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


def _bits(dtype: str, shape: tuple[int, ...]) -> int:
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    return bits


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(**changes: Any) -> bytes:
    return json.dumps({"a": entry(**changes)}).encode()


def reference_refuses(raw: bytes, data_bytes: int) -> bool:
    try:
        deserialize(struct.pack("<Q", len(raw)) + raw + bytes(data_bytes))
    except safetensors.SafetensorError:
        return True
    return False


def test_knows_every_dtype_of_the_format() -> None:
    assert dict(DTYPE_BITS) == BITS


@given(tensor_specs, st.dictionaries(names, names, max_size=3), st.sampled_from([1, 8, 64, 4096]))
def test_round_trip(specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], alignment: int) -> None:
    built = build_header(specs, metadata, alignment=alignment)
    assert built.data_start % alignment == 0
    assert built.data_bytes == sum(_bits(dtype, shape) // 8 for _, dtype, shape in specs)
    assert built.prelude == struct.pack("<Q", len(built.raw)) + built.raw

    parsed = parse_header(built.raw, built.data_bytes, WHERE)
    assert dict(parsed.metadata) == metadata
    assert {(e.name, e.dtype, e.shape, e.start, e.stop) for e in parsed.entries} == {
        (e.name, e.dtype, e.shape, e.start, e.stop) for e in built.entries
    }
    assert [(e.name, e.dtype, e.shape) for e in built.entries] == specs

    data = bytes(i % 251 for i in range(built.data_bytes))
    found = dict(deserialize(built.prelude + data))
    assert {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in specs
    }
    for e in built.entries:
        assert bytes(found[e.name]["data"]) == data[e.start : e.stop]


@given(tensor_specs, st.dictionaries(names, names, max_size=4))
@settings(max_examples=30)
def test_the_order_of_metadata_does_not_matter(
    specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    backwards = dict(reversed(metadata.items()))
    assert build_header(specs, metadata).raw == build_header(specs, backwards).raw


def test_refuses_to_write_what_it_would_not_read() -> None:
    with pytest.raises(ValueError, match="written twice"):
        build_header([("a", "U8", (1,)), ("a", "U8", (1,))], {})
    with pytest.raises(ValueError, match="unknown dtype 'F33'"):
        build_header([("a", "F33", (1,))], {})
    with pytest.raises(ValueError, match="whole bytes"):
        tensor_bytes("F4", (3,))
    with pytest.raises(ValueError, match="over the format's limit"):
        build_header([("a", "U8", (1,))], {}, alignment=1 << 27)


def test_entries_come_in_data_order() -> None:
    raw = json.dumps({"b": entry(offsets=[4, 8]), "a": entry(offsets=[0, 4]), "c": entry(shape=[0], offsets=[4, 4])})
    assert [e.name for e in parse_header(raw.encode(), 8, WHERE).entries] == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("raw", "data_bytes"),
    [
        (b"{}", 0),
        (b'{"__metadata__":{}}', 0),
        (b'{"__metadata__":null}', 0),
        (one() + b" \n\t\r ", 4),
        (one(shape=[]), 4),
        (one(shape=[3, 0, 5], offsets=[0, 0]), 0),
        (one(shape=[0, 1 << 40], offsets=[0, 0]), 0),
        (one(dtype="F4", shape=[2], offsets=[0, 1]), 1),
        ('{"\u00e4\\u00e4/../\\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.encode(), 1),
        (b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
        (b'{"__metadata__":{"a":"NaN"}}', 0),
    ],
)
def test_accepts(raw: bytes, data_bytes: int) -> None:
    assert not reference_refuses(raw, data_bytes)
    assert parse_header(raw, data_bytes, WHERE).data_bytes == data_bytes


DEEP = b"[" * 100_000 + b"]" * 100_000
ATTACKS: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 0, "does not start with"),
    "a list": (b"[]", 0, "does not start with"),
    "padding first": (b" " + one(), 4, "does not start with"),
    "byte order mark": (b"\xef\xbb\xbf" + one(), 4, "does not start with"),
    "not JSON": (b"{]", 0, "not valid JSON"),
    "cut": (one()[:-1], 4, "not valid JSON"),
    "more after the end": (one() + b"{}", 4, "not valid JSON"),
    "padded with zeros": (one() + b"\0\0", 4, "not valid JSON"),
    "not UTF-8": (one().replace(b'"a"', b'"\xff"'), 4, "not valid JSON"),
    "an encoded surrogate": (one().replace(b'"a"', b'"\xed\xa0\x80"'), 4, "not valid JSON"),
    "an escaped surrogate": (one().replace(b'"a"', b'"\\ud800"'), 4, "not valid JSON"),
    "a surrogate in metadata": (b'{"__metadata__":{"a":"\\uDFFF"}}', 0, "not valid JSON"),
    "UTF-16": (one().decode().encode("utf-16-le"), 4, "not valid JSON"),
    "UTF-32": (one().decode().encode("utf-32-le"), 4, "not valid JSON"),
    "control character": (one().replace(b'"a"', b'"a\x01"'), 4, "not valid JSON"),
    "a tensor twice": (b'{"a":' + json.dumps(entry()).encode() + b"," + one()[1:], 4, "duplicate key 'a'"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "duplicate key '__metadata__'"),
    "dtype twice": (one().replace(b'"dtype"', b'"dtype":"F32","dtype"'), 4, "duplicate key 'dtype'"),
    "metadata key twice": (b'{"__metadata__":{"k":"1","k":"2"}}', 0, "duplicate key 'k'"),
    "nested deeply": (b'{"__metadata__":' + DEEP + b"}", 0, "not valid JSON"),
    "metadata is a list": (b'{"__metadata__":[]}', 0, "must map strings to strings"),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', 0, "must map strings to strings"),
    "metadata nested": (b'{"__metadata__":{"a":{"b":"c"}}}', 0, "must map strings to strings"),
    "metadata null inside": (b'{"__metadata__":{"a":null}}', 0, "must map strings to strings"),
    "tensor is a list": (b'{"a":["F32",[1],[0,4]]}', 4, "must have exactly"),
    "tensor is null": (b'{"a":null}', 0, "must have exactly"),
    "no dtype": (b'{"a":{"shape":[1],"data_offsets":[0,4]}}', 4, "must have exactly"),
    "no shape": (b'{"a":{"dtype":"F32","data_offsets":[0,4]}}', 4, "must have exactly"),
    "no offsets": (b'{"a":{"dtype":"F32","shape":[1]}}', 4, "must have exactly"),
    "another key": (one(strides=[1]), 4, "must have exactly"),
    "unknown dtype": (one(dtype="F33"), 4, "unknown dtype 'F33'"),
    "lower-case dtype": (one(dtype="f32"), 4, "unknown dtype 'f32'"),
    "dtype is a number": (one(dtype=32), 4, "malformed dtype, shape or data_offsets"),
    "dtype is a list": (one(dtype=["F32"]), 4, "malformed dtype, shape or data_offsets"),
    "sub-byte remainder": (one(dtype="F4", shape=[3], offsets=[0, 2]), 2, "whole bytes"),
    "six bits": (one(dtype="F6_E2M3", shape=[2], offsets=[0, 2]), 2, "whole bytes"),
    "shape is a number": (one(shape=1), 4, "malformed dtype, shape or data_offsets"),
    "shape is text": (one(shape="1"), 4, "malformed dtype, shape or data_offsets"),
    "negative shape": (one(shape=[-1, -1]), 4, "malformed dtype, shape or data_offsets"),
    "shape of a float": (one(shape=[1.0]), 4, "malformed dtype, shape or data_offsets"),
    "shape of a boolean": (one(shape=[True]), 4, "malformed dtype, shape or data_offsets"),
    "shape of NaN": (one(shape=[float("nan")]), 4, "NaN is not JSON"),
    "shape of infinity": (one(shape=[float("inf")]), 4, "Infinity is not JSON"),
    "shape of minus zero": (one(shape=[0], offsets=[0, 0]).replace(b"[0]", b"[-0]"), 0, "malformed dtype, shape"),
    "huge shape": (one(shape=[10**30]), 4, "malformed dtype, shape or data_offsets"),
    "huge shape times zero": (one(shape=[10**30, 0], offsets=[0, 0]), 0, "malformed dtype, shape or data_offsets"),
    "shape over 64 bits": (one(shape=[1 << 63, 2, 0], offsets=[0, 0]), 0, "overflows"),
    "shape over 64 bits of size 0": (one(shape=[1 << 64, 0], offsets=[0, 0]), 0, "malformed dtype, shape"),
    "bits over 64 bits": (one(shape=[1 << 60], offsets=[0, 4]), 4, "overflows"),
    "number of 5,000 digits": (one().replace(b"[1]", b"[" + b"9" * 5000 + b"]"), 4, "not valid JSON"),
    "one offset": (one(offsets=[4]), 4, "malformed dtype, shape or data_offsets"),
    "three offsets": (one(offsets=[0, 4, 4]), 4, "malformed dtype, shape or data_offsets"),
    "negative offset": (one(offsets=[-4, 0]), 4, "malformed dtype, shape or data_offsets"),
    "offset of minus zero": (one().replace(b"[0, 4]", b"[-0, 4]"), 4, "malformed dtype, shape or data_offsets"),
    "float offset": (one(offsets=[0.0, 4]), 4, "malformed dtype, shape or data_offsets"),
    "boolean offset": (one(offsets=[False, 4]), 4, "malformed dtype, shape or data_offsets"),
    "huge offset": (one(offsets=[10**30, 10**30 + 4]), 4, "malformed dtype, shape or data_offsets"),
    "offsets swapped": (one(offsets=[4, 0]), 4, "spans -4 bytes"),
    "offsets too far": (one(offsets=[0, 8]), 8, r"spans 8 bytes, but F32 \[1\] takes 4"),
    "offsets too near": (one(offsets=[0, 3]), 3, "spans 3 bytes, but F32"),
    "hole at the start": (one(offsets=[4, 8]), 8, "leaves a hole before it"),
    "hole between": (json.dumps({"a": entry(), "b": entry(offsets=[5, 9])}).encode(), 9, "'b' leaves a hole"),
    "overlap": (json.dumps({"a": entry(), "b": entry(offsets=[2, 6])}).encode(), 6, "'b' overlaps"),
    "the same bytes twice": (json.dumps({"a": entry(), "b": entry()}).encode(), 4, "'b' overlaps"),
    "empty tensor inside": (
        json.dumps({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}).encode(),
        4,
        "'b' overlaps the tensor before it",
    ),
    "data cut": (one(), 3, "truncated: 3 data bytes, 4 expected"),
    "data too long": (one(), 5, "longer than its header says: 5 data bytes, 4 expected"),
    "data without tensors": (b"{}", 1, "longer than its header says"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_refuses(name: str) -> None:
    raw, data_bytes, complaint = ATTACKS[name]
    with pytest.raises(InputError, match=complaint) as caught:
        parse_header(raw, data_bytes, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert len(str(caught.value)) < 400
    if not any(words in str(caught.value) for words in STRICTER):
        assert reference_refuses(raw, data_bytes)


def test_the_limit_of_the_length_is_that_of_the_format() -> None:
    assert MAX_HEADER_BYTES == 100_000_000


odd_values = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 8, 1.5, 1.0, "", "F16", "F4", "x", [], {}, [0], [0, 4], [4, 8], [0, 0], [1, 1],
     [-1], [10**30], [2**63, 0], [1, 10**30], ["0", "4"], [[1]], {"a": "b"}, {"a": 1}]
).map(copy.deepcopy)  # fmt: skip


@st.composite
def mutated_documents(draw: st.DrawFn) -> tuple[bytes, int]:
    """A valid header with one to three values replaced, removed or added, and the size of its data, perhaps wrong."""
    specs = draw(tensor_specs)
    header = build_header(specs, draw(st.dictionaries(names, names, max_size=2)))
    document = json.loads(header.raw)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and draw(st.booleans()):
                place = place[key]
                continue
            match draw(st.sampled_from(["replace", "remove", "add"])):
                case "replace":
                    place[key] = draw(odd_values)
                case "remove":
                    del place[key]
                case _ if isinstance(place, dict):
                    place[draw(names)] = draw(odd_values)
                case _:
                    place.append(draw(odd_values))
            break
    return json.dumps(document).encode(), header.data_bytes + draw(st.sampled_from([0, 0, 0, 1, 4]))


@st.composite
def mutated_bytes(draw: st.DrawFn) -> tuple[bytes, int]:
    """The text of a valid header with some of its bytes changed, removed or inserted."""
    header = build_header(draw(tensor_specs), draw(st.dictionaries(names, names, max_size=2)))
    raw = bytearray(header.raw)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        new = draw(st.sampled_from([*b'{}[]",:0123456789-.eE \n\\u\x00\xff', *b"dtypeshaF8_"]))
        match draw(st.sampled_from(["change", "remove", "insert"])):
            case "change":
                raw[at] = new
            case "remove":
                del raw[at]
            case _:
                raw.insert(at, new)
    return bytes(raw), header.data_bytes


@given(st.one_of(mutated_documents(), mutated_bytes()))
@settings(max_examples=250)
def test_agrees_with_the_reference_reader(header: tuple[bytes, int]) -> None:
    raw, data_bytes = header
    try:
        parsed = parse_header(raw, data_bytes, WHERE)
    except InputError as error:
        assert any(words in str(error) for words in STRICTER) or reference_refuses(raw, data_bytes)
        return
    found = deserialize(struct.pack("<Q", len(raw)) + raw + bytes(data_bytes))
    assert {name: (t["dtype"], tuple(t["shape"])) for name, t in found} == {
        e.name: (e.dtype, e.shape) for e in parsed.entries
    }
