"""Data as people have it: compressed, in other encodings, with rows that are broken, shifted or of several kinds."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuralink_cli.calibration.sampling import draw, draw_key
from neuralink_cli.calibration.texts import CorpusOptions, open_corpus
from neuralink_cli.errors import InputError, MissingDependencyError
from neuralink_cli.files.text_files import read_text

ROWS = [{"text": f"row {number}", "n": number} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = ["row 0", "row 1", "row 2"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"


def texts(path: Path, **options: Any) -> list[str]:
    return [sample.text for sample in open_corpus(str(path), CorpusOptions(**options), None)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


# Compressed files, and what is no text at all.


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_whatever_they_are_called(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    assert texts(written(tmp_path / f"a.jsonl{suffix}", pack(LINES.encode()))) == TEXTS
    assert texts(written(tmp_path / "b.jsonl", pack(LINES.encode()))) == TEXTS
    assert texts(written(tmp_path / f"c.txt{suffix}", pack(b"one\ntwo\n") + pack(b"three\n"))) == [
        "one\n", "two\n", "three\n",
    ]  # fmt: skip
    assert read_text(tmp_path / f"c.txt{suffix}") == "one\ntwo\nthree\n"
    assert texts(written(tmp_path / f"d.csv{suffix}", pack(b"text,n\nrow,1\n"))) == ["row"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_that_is_cut_off(tmp_path: Path, suffix: str) -> None:
    noise = "".join(json.dumps({"text": f"{draw_key(1, number):x}"}) + "\n" for number in range(9000))
    whole = PACKERS[suffix](noise.encode())
    path = written(tmp_path / f"a.jsonl{suffix}", whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"damaged or cut off|cannot be read"):
        texts(path, num_samples=10_000)


def test_without_a_reader_of_zstandard_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl.zst", zstd(LINES.encode()))
    for name in ("compression.zstd", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"Zstandard.*pip install pyarrow"):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is a Git LFS pointer, not the data itself; run `git lfs pull`"):
        texts(written(tmp_path / name, LFS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 and so on", "is a zip archive, not text"),
        (b"PAR1 and so on", "is a Parquet file, not text"),
        (b"a\0b\0\0\0\0\0", "is not text .it has bytes of zero"),
    ],
)
def test_what_is_no_text_is_not_taken_for_it(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts(written(tmp_path / "a.txt", content))


# Encodings.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_of_unicode(tmp_path: Path, encoding: str) -> None:
    assert texts(written(tmp_path / "a.txt", "one\r\nzwei ß\n".encode(encoding))) == ["one\n", "zwei ß\n"]
    assert texts(written(tmp_path / "a.jsonl", LINES.encode(encoding))) == TEXTS
    assert texts(written(tmp_path / "a.json", json.dumps(ROWS).encode(encoding))) == TEXTS
    assert texts(written(tmp_path / "a.csv", "text,n\none,1\n".encode(encoding))) == ["one"]
    assert read_text(written(tmp_path / "p.txt", "a prompt ß".encode(encoding))) == "a prompt ß"


def test_byte_order_marks_of_files_that_were_joined(tmp_path: Path) -> None:
    assert texts(written(tmp_path / "a.txt", "\ufeffone\n\ufefftwo\n")) == ["one\n", "two\n"]
    assert texts(written(tmp_path / "a.jsonl", f"\ufeff{LINES}\ufeff{LINES}")) == TEXTS * 2


def test_lines_outside_utf8_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = [b"line %d\n" % number for number in range(40)]
    lines[7] = b"caf\xe9\n"
    assert len(texts(written(tmp_path / "a.txt", b"".join(lines)))) == 39
    assert "1 of 40 rows cannot be read (line 8 is not UTF-8 text (byte 0xe9)) and are left out" in caplog.text
    rows = [json.dumps({"text": "a"}).encode()] * 30 + [b'{"text": "\\ud800"}', b'{"other": "\xff", "text": "good"}']
    assert texts(written(tmp_path / "a.jsonl", b"\n".join(rows))) == ["a"] * 30 + ["good"]
    assert "line 31 is not Unicode text (it has half of a character, \\ud800)" in caplog.text
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 0xe9\)"):
        read_text(written(tmp_path / "b.txt", b"caf\xe9"))


# Rows that cannot be read.


def test_rows_that_cannot_be_read_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = [json.dumps({"text": f"row {number}"}) for number in range(100)]
    lines[3], lines[50], lines[60], lines[99] = '{"text": 5}', "[1]", '{"body": "x"}', '{"text": "cut'
    path = written(tmp_path / "a.jsonl", "\n".join(lines))
    assert len(texts(path)) == 96
    assert len(caplog.messages) == 1
    assert caplog.messages[0] == (
        f"{path}: 4 of 100 rows cannot be read (line 4 holds int in column 'text', not text; line 51 is list, not an "
        "object with columns; line 61 has no column 'text'; and 1 more) and are left out"
    )
    lines[10] = lines[11] = "broken"
    with pytest.raises(InputError, match=r"6 of 100 rows cannot be read .line 4 .*; and 3 more"):
        texts(written(tmp_path / "b.jsonl", "\n".join(lines)))
    # Only rows that were read count.
    assert len(texts(tmp_path / "b.jsonl", num_samples=3)) == 3


def test_a_file_that_is_wrong_from_the_start_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": 1}\n' * 5000)
    with pytest.raises(InputError, match="200 of 200 rows cannot be read"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("text;n\na, b;1\nc;2\n", ["a, b", "c"]),
        ("n\ttext\n1\ta, b; c\n", ["a, b; c"]),
        ('text,n\n"one\ntwo",1\n\n"said ""hi""",2\n', ["one\ntwo", 'said "hi"']),
        ("text,title\nlong,short,\nother,short,,\n", ["long", "other"]),
        ("text\n013\n1.50\nNA\nTrue\n", ["013", "1.50", "NA", "True"]),
        ("a;b,text\n1;2,x; y\n", ["x; y"]),
        ("n, text\n1,one\n", ["one"]),
        ("text,n\n" + "x" * 200_000 + ",1\n", ["x" * 200_000]),
    ],
)
def test_csv_as_it_is_meant(tmp_path: Path, content: str, found: list[str]) -> None:
    assert texts(written(tmp_path / "a.csv", content)) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\nHello, world\nGoodbye, moon\n", "2 of 2 rows .*line 2 has 2 fields and the header 1; line 3"),
        ("id,text\n1,Hello, world\n2,Goodbye, moon\n", "2 of 2 rows .*line 2 has 3 fields and the header 2"),
        ("text,label\n'Hello, world',a\n'Bye, moon',b\n", "line 2 has 3 fields and the header 2"),
        ("id,text\n1\n2\n", "line 2 has 1 fields and the header 2"),
        ('id,text\n1,"one\n2,two\n', "a quote that opens in line 2 or later is never closed"),
        ('id,text\n1,"one" more\n', "line 2 is not CSV"),
        ("text,text\na,b\n", "has the column 'text' twice"),
        ("id;body\n1;one\n", "has no column 'text', its columns are 'id;body'"),
    ],
)
def test_csv_that_would_be_shifted_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts(written(tmp_path / "a.csv", content))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", json.dumps({"text": "one"}, indent=1), ["one"]),
        ("a.json", json.dumps(["one", "two"]), ["one", "two"]),
        ("a.json", LINES, TEXTS),
        ("a.jsonl", json.dumps(ROWS, indent=2), TEXTS),
        ("a.jsonl", "\n\n" + LINES.replace("\n", "\r\n\r\n"), TEXTS),
        ("a.jsonl", '{"text": "one", "meta": 1}\n{"text": "two", "meta": "b"}\n', ["one", "two"]),
        ("a.jsonl", '{"text": null}\n' * 1500 + '{"text": "last"}\n', ["last"]),
        ("a.jsonl", '{"text": "2024-01-05"}\n', ["2024-01-05"]),
        ("a.json", json.dumps([{"text": "x" * 300_000}, {"text": "y"}]), ["x" * 300_000, "y"]),
    ],
)
def test_json_of_every_shape(tmp_path: Path, name: str, content: str, found: list[str]) -> None:
    assert texts(written(tmp_path / name, content)) == found


def test_an_array_is_parsed_across_the_ends_of_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"n": -12.5e-3, "text": 'a "quoted" ü\\', "b": [True, None]},
        {"text": "\u2028 x"},
        {"n": 123, "text": "z"},
    ]
    path = written(tmp_path / "a.json", json.dumps(rows, indent=3))
    for chunk in range(1, 40):
        monkeypatch.setattr("neuralink_cli.calibration.local_rows._CHUNK", chunk)
        assert texts(path) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array(["one", None, "two"], pa.large_string()), ["one", "two"]),
        (pa.array(["one", "two", "one"]).dictionary_encode(), ["one", "two", "one"]),
        (pa.array(["one"], pa.string_view()), ["one"]),
        (pa.array([None, None, "x"]), ["x"]),
    ],
)
def test_parquet_of_every_type_of_text(tmp_path: Path, column: Any, found: list[str]) -> None:
    others = pa.array([{"deep": [1]}] * len(column))
    pq.write_table(pa.table({"other": others, "text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == found


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), "2 of 2 rows cannot be read .row 1 holds int in column 'text', not text"),
        (pa.array([["one"]]), "holds list in column 'text'"),
        (pa.array([b"one"]), "holds bytes in column 'text'"),
        (pa.array([], pa.string()), "has no rows"),
        (pa.array([None, None]), "has no text in it"),
    ],
)
def test_parquet_without_text(tmp_path: Path, column: Any, message: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        texts(tmp_path / "a.parquet")


# Samples drawn at random.


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_seed_draws_from_the_whole_file(tmp_path: Path, name: str) -> None:
    lines = [f"row {number}" for number in range(30_000)]
    path = written(tmp_path / name, "\n".join(lines if name == "a.txt" else map(json.dumps, lines)))
    for seed in (0, 1):
        found = [int(text.split()[1]) for text in texts(path, seed=seed, num_samples=600)]
        assert len(set(found)) == 600
        thirds = [sum(number // 10_000 == third for number in found) for third in range(3)]
        assert min(thirds) > 150
        # The rule of docs/format.md.
        assert found == sorted(range(30_000), key=lambda number: draw_key(seed, number))[:600]


def test_drawing_all_and_drawing_some_agree() -> None:
    records = [(number, str(number).encode) for number in range(500) if number % 7]
    whole = list(draw(records, 5, None))
    assert len(whole) == len(records)
    assert whole == sorted(whole, key=lambda data: draw_key(5, int(data)))
    for count in (1, 20, 1000):
        assert list(draw(records, 5, count)) == whole[:count]
    assert list(draw(records, 6, 20)) != whole[:20]
    assert list(draw([], 1, None)) == list(draw([], 1, 3)) == []
    assert draw_key(3, 0) == 0xEAB817087DE37B4D


def test_rows_that_cannot_be_read_keep_their_numbers(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(number)}) for number in range(100)]
    whole = texts(written(tmp_path / "a.jsonl", "\n".join(lines)), seed=2)
    lines[40] = "broken"
    assert texts(written(tmp_path / "b.jsonl", "\n".join(lines)), seed=2) == [text for text in whole if text != "40"]
