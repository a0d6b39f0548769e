"""Rows of local files, one after the other: lines of text, JSON, CSV and Parquet. Nothing is guessed into another type.

A file may be larger than memory. Only the columns that are wanted are read where the type of file allows it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralink_cli.errors import InputError, first_line
from neuralink_cli.files.text_files import (
    BYTE_ORDER_MARK,
    COMPRESSED_SUFFIXES,
    open_text,
    require_content,
    unreadable_text,
)

SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
_DELIMITERS = ",;\t|"
_CHUNK = 1 << 16
# Of a value that is cut off by the end of what has been read: an escape, `Infinity` or a number's sign.
_LONGEST_WORD = 16
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class UnreadableRow:
    """A row that could not be made out, and why."""

    reason: str


# A row by its place in the file, in words.
Row = Mapping[str, Any] | UnreadableRow
PlacedRow = tuple[str, Row]


def file_type(path: Path) -> str:
    """The ending that says what a file holds, that of a compression left out: `.jsonl` of `a.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def read_lines(path: Path) -> Iterator[PlacedRow]:
    """The lines of a text, line breaks kept, as rows with the column `text`."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            yield f"line {number}", {"text": line.removeprefix(BYTE_ORDER_MARK)}


def read_json(path: Path) -> Iterator[PlacedRow]:
    """The objects of an array, of lines that are one each, or of a document that is one.

    A string instead of an object is the `text` of its row.

    Raises:
        InputError: It is not JSON; but a line that is not is an unreadable row.
    """
    with open_text(path) as file:
        number, line = _first_line(file)
        if line.startswith("[") or (file_type(path) == ".json" and not _is_json(line)):
            yield from _json_values(file, line, path)
            return
        while line:
            if line.strip():
                yield f"line {number}", _json_row(line)
            line, number = file.readline().removeprefix(BYTE_ORDER_MARK), number + 1


def read_csv(path: Path, wanted: Sequence[str]) -> Iterator[PlacedRow]:
    """The rows of a table with a header, all values as text.

    The delimiter is a comma, or the semicolon, tab or bar that makes a wanted column of the header. A row with more
    or fewer fields than the header is unreadable, but for empty fields too many.

    Raises:
        InputError: There is a column twice, or a quote is never closed.
    """
    # The limit of the module is that of a field's characters, for all of the process: texts are longer.
    csv.field_size_limit(sys.maxsize)
    with open_text(path, newline="") as file:
        start = file.readline().removeprefix(BYTE_ORDER_MARK)
        reader = csv.reader(_lines_from(start, file), delimiter=_delimiter(start, wanted), strict=True)
        names = _next_record(reader, path) or []
        if isinstance(names, UnreadableRow):
            raise InputError(f"its header {names.reason}", where=path)
        header = [name.strip() for name in names]
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"has the column {twice!r} twice", where=path)
        while True:
            line = reader.line_num + 1
            fields = _next_record(reader, path)
            if fields is None:
                return
            if fields:
                yield f"line {line}", fields if isinstance(fields, UnreadableRow) else _csv_row(header, fields)


def csv_columns(path: Path, wanted: Sequence[str]) -> list[str]:
    """The names in the header of a table."""
    with open_text(path, newline="") as file:
        start = file.readline().removeprefix(BYTE_ORDER_MARK)
        reader = csv.reader(_lines_from(start, file), delimiter=_delimiter(start, wanted))
        return [name.strip() for name in next(reader, [])]


def parquet_columns(path: Path) -> list[str]:
    """The names of the columns of a Parquet file.

    Raises:
        InputError: It is none.
    """
    return list(_open_parquet(path).schema_arrow.names)


def read_parquet(path: Path, wanted: Sequence[str]) -> Iterator[PlacedRow]:
    """The rows of a Parquet file, of its wanted columns only."""
    file = _open_parquet(path)
    columns = [name for name in file.schema_arrow.names if name in wanted]
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns, use_threads=False):
            for place in range(batch.num_rows):
                number += 1
                yield f"row {number}", _arrow_row(batch, place)
    except OSError as error:
        raise InputError(f"cannot be read as Parquet ({first_line(error)})", where=path) from None


def _open_parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    require_content(path)
    try:
        return ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        fix = "unpack it" if path.suffix.lower() in COMPRESSED_SUFFIXES else None
        raise InputError(f"cannot be read as Parquet ({first_line(error)})", where=path, fix=fix) from None


def _arrow_row(batch: Any, place: int) -> Row:
    try:
        return {name: batch.column(name)[place].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return UnreadableRow(f"is not UTF-8 text (byte {error.object[error.start]:#04x})")


def _first_line(file: Any) -> tuple[int, str]:
    """The first line that is not blank, and its number; an empty one at the end of the file."""
    number = 0
    while True:
        line, number = file.readline(), number + 1
        text = line.removeprefix(BYTE_ORDER_MARK).lstrip()
        if text or not line:
            return number, text


def _is_json(line: str) -> bool:
    return not isinstance(_parse(line), ValueError)


def _parse(text: str) -> Any:
    """The value of a JSON text, or the error that says why it has none."""
    try:
        return json.loads(text)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("it is nested too deeply")


def _json_row(line: str) -> Row:
    value = _parse(line)
    if isinstance(value, ValueError):
        return UnreadableRow(unreadable_text(line) or f"is not JSON ({first_line(value)})")
    return _object_row(value)


def _object_row(value: Any) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        return UnreadableRow(f"is {type(value).__name__}, not an object with columns")
    return value


def _json_values(file: Any, start: str, path: Path) -> Iterator[PlacedRow]:
    """The elements of an array, or values one after the other, parsed as they are read."""
    decoder, number = json.JSONDecoder(), 0
    text = _Buffer(start, file)
    in_array = text.skip() == "["
    if in_array:
        text.position += 1
    while (character := text.skip()) not in ("", "]"):
        number += 1
        while True:
            try:
                value, end = decoder.raw_decode(text.held, text.position)
            except (ValueError, RecursionError) as error:
                if _may_go_on(error, len(text.held)) and text.grow():
                    continue
                raise InputError(f"is not JSON, in row {number} ({first_line(error)})", where=path) from None
            # A number at the end of what has been read may go on.
            if end == len(text.held) and text.grow():
                continue
            break
        text.position = end
        yield f"row {number}", _object_row(value)
        character = text.skip()
        if in_array and character == ",":
            text.position += 1
        elif in_array and character != "]":
            raise InputError(f"is not JSON (no comma or end of the array after row {number})", where=path)
    if in_array and character != "]":
        raise InputError(f"is not JSON (its array is cut off after row {number})", where=path)


def _may_go_on(error: Exception, length: int) -> bool:
    """Whether JSON that cannot be parsed, or not yet, fails for want of what follows it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos + _LONGEST_WORD >= length or error.msg.startswith("Unterminated string")


class _Buffer:
    """Text that is read as it is needed, from `position` on."""

    def __init__(self, start: str, file: Any) -> None:
        self.held = start
        self.position = 0
        self._file = file

    def skip(self) -> str:
        """The next character that is not white space, where `position` then is; empty at the end."""
        while True:
            while self.position < len(self.held) and self.held[self.position].isspace():
                self.position += 1
            if self.position < len(self.held):
                return self.held[self.position]
            if not self.grow():
                return ""

    def grow(self) -> bool:
        """Read on, as much again as is held; False at the end."""
        self.held, self.position = self.held[self.position :], 0
        more = self._file.read(max(_CHUNK, len(self.held)))
        self.held += more
        return bool(more)


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    """The first that makes a wanted column of a header, else a comma."""

    def columns(delimiter: str) -> set[str]:
        return {name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])}

    return next((delimiter for delimiter in _DELIMITERS if columns(delimiter) & set(wanted)), ",")


def _lines_from(first: str, file: Any) -> Iterator[str]:
    if first:
        yield first
    yield from file


def _next_record(reader: Any, path: Path) -> Any:
    """The fields of the next row; None at the end; an UnreadableRow where the quotes make no sense."""
    started = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise InputError(f"a quote that opens in line {started} or later is never closed", where=path) from None
        return UnreadableRow(f"is not CSV ({first_line(error)})")


def _csv_row(header: Sequence[str], fields: Sequence[str]) -> Row:
    width = len(header)
    if len(fields) < width or any(fields[width:]):
        return UnreadableRow(f"has {len(fields)} fields and the header {width}")
    return dict(zip(header, fields, strict=False))
