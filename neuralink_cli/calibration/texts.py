"""Calibration text: turns the rows of a dataset into text samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from neuralink_cli.calibration.conversations import CHAT_COLUMNS, TOOLS, ChatTemplate, RowError
from neuralink_cli.calibration.local_rows import PlacedRow, UnreadableRow
from neuralink_cli.calibration.rows import Rows, open_rows
from neuralink_cli.calibration.sampling import draw
from neuralink_cli.calibration.tally import RowTally
from neuralink_cli.errors import InputError
from neuralink_cli.files.text_files import BYTE_ORDER_MARK, unreadable_text

logger = logging.getLogger(__name__)

# Rows of a hub dataset that samples are drawn from: it may have billions, and all would have to be fetched.
MOST_STREAMED_ROWS = 1_000_000
# Rows without a column that is asked for, until the file is said to have none.
_ROWS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Sample:
    """One text.

    `continues`: the text continues the sample before it. `templated`: the text comes from a chat template, which has
    already added the special tokens.
    """

    text: str
    continues: bool = False
    templated: bool = False

    @property
    def blank(self) -> bool:
        """Whether the text is empty or white space."""
        return not self.text.strip()


@dataclass(frozen=True)
class CorpusOptions:
    """Which part of a dataset is used. `num_samples` counts samples that are not blank; a seed shuffles."""

    text_columns: tuple[str, ...] = ("text",)
    split: str = "train"
    num_samples: int | None = None
    seed: int | None = None


class Corpus:
    """A dataset that has at least one sample. Iterating reads the samples, from the start every time."""

    def __init__(self, rows: Rows, options: CorpusOptions, tokenizer: Any) -> None:
        self.rows = rows
        self.options = options
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._used: set[str] = set()
        self._tally = RowTally(rows.where)

    @property
    def name(self) -> str:
        """What the trace calls the dataset."""
        return self.rows.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the samples read so far are from."""
        return tuple(column for column in _wanted(self.options) if column in self._used)

    def conclude(self) -> None:
        """Say which rows were left out, once no more samples are read.

        Raises:
            InputError: Too many rows cannot be read.
        """
        self._tally.conclude()

    def __iter__(self) -> Iterator[Sample]:
        self._used, self._tally = set(), RowTally(self.rows.where)
        options = self.options
        if options.seed is None:
            yield from _first(self._samples(), options.num_samples)
        else:
            records = ((number, partial(_packed, sample)) for number, sample in self._numbered() if not sample.blank)
            yield from map(_unpacked, draw(records, options.seed, options.num_samples))
        self.conclude()

    def _samples(self) -> Iterator[Sample]:
        started = False
        for _number, sample in self._numbered():
            if self.rows.lines or not sample.blank:
                yield replace(sample, continues=True) if self.rows.lines and started else sample
                started = True

    def _numbered(self) -> Iterator[tuple[int, Sample]]:
        """The samples of all rows that can be read, with the numbers of the rows, from 0 on."""
        for number, (place, row) in enumerate(self._rows()):
            self._tally.count()
            try:
                if isinstance(row, UnreadableRow):
                    raise RowError(row.reason)
                yield number, self._sample(row)
            except RowError as error:
                self._tally.leave_out(place, str(error))

    def _rows(self) -> Iterator[PlacedRow]:
        if self.options.seed is None or self.rows.revision is None:
            yield from self.rows
            return
        for number, row in enumerate(self.rows):
            if number == MOST_STREAMED_ROWS:
                logger.warning("%s: samples are drawn from its first %s rows", self.rows.where, f"{number:,}")
                return
            yield row

    def _sample(self, row: Mapping[str, Any]) -> Sample:
        chats = [column for column in CHAT_COLUMNS if row.get(column)]
        for column in chats:
            if column in self.options.text_columns:
                return self._conversation(row, column)
        texts = [column for column in self.options.text_columns if column in row and column not in CHAT_COLUMNS]
        if self.rows.lines:
            texts = ["text"]
        values = [(column, row[column]) for column in texts if row[column] is not None and row[column] != ""]
        if values:
            return self._text(values)
        if chats:
            return self._conversation(row, chats[0])
        if not texts and not any(column in row for column in CHAT_COLUMNS):
            raise RowError(f"has no column {_either(self.options.text_columns)}")
        return Sample("")

    def _text(self, values: Sequence[tuple[str, Any]]) -> Sample:
        for column, value in values:
            if not isinstance(value, str):
                raise RowError(f"holds {type(value).__name__} in column {column!r}, not text")
        self._used.update(column for column, _ in values)
        return Sample(_readable("\n".join(value.removeprefix(BYTE_ORDER_MARK) for _, value in values)))

    def _conversation(self, row: Mapping[str, Any], column: str) -> Sample:
        if not self._template.exists:
            raise InputError(
                f"has `{column}`, which need a chat template, and the model's tokenizer has none",
                where=self.rows.where,
                fix="use a dataset of plain text or add chat_template.jinja to the model",
            )
        self._used.add(column)
        text = self._template.render(row, column, added_nulls=self.rows.added_nulls)
        return Sample(_readable(text), templated=True)


def open_corpus(dataset: str, options: CorpusOptions, tokenizer: Any) -> Corpus:
    """Open a dataset and find its text.

    The lines of a .txt file, line breaks kept, are samples that continue each other, unless a seed shuffles them. In
    any other dataset a row is a sample: those of `text_columns` that it has and that are not empty, joined by a line
    break. A row without any of these but with `messages` or `conversations` goes through the tokenizer's chat template.
    Rows that cannot be read are left out and told of, see `RowTally`.

    Raises:
        InputError: The dataset is empty, cannot be read, or has no text column.
        UnsupportedError, MissingDependencyError: As `open_rows`.
    """
    rows = open_rows(dataset, options.split, _wanted(options))
    _require_columns(rows, options.text_columns)
    of_all = Corpus(rows, CorpusOptions(options.text_columns), tokenizer)
    if all(sample.blank for sample in of_all):
        raise InputError("has no text in it", where=rows.where, fix="pass a file with text")
    return Corpus(rows, options, tokenizer)


def _wanted(options: CorpusOptions) -> tuple[str, ...]:
    """The columns that samples can be made of, each once."""
    return tuple(dict.fromkeys((*options.text_columns, *CHAT_COLUMNS, TOOLS)))


def _require_columns(rows: Rows, text_columns: Sequence[str]) -> None:
    """Check that there are rows, and that one of the first has a column that is asked for.

    Raises:
        InputError: There are none, or none has.
    """
    if rows.lines:
        return
    usable = {*text_columns, *CHAT_COLUMNS}
    columns = rows.columns
    empty = True
    for _place, row in islice(rows, _ROWS_LOOKED_AT):
        empty = False
        if not isinstance(row, UnreadableRow):
            columns = tuple(row) if columns is None else columns
            if any(column in usable for column in row):
                return
    if empty:
        raise InputError("has no rows", where=rows.where)
    if columns is not None and not usable & {*columns}:
        raise InputError(
            f"has no column {_either(text_columns)}, its columns are {', '.join(map(repr, columns))}",
            where=rows.where,
            fix="choose one with --text-column",
        )


def _either(columns: Sequence[str]) -> str:
    return " or ".join(map(repr, columns))


def _first(samples: Iterator[Sample], count: int | None) -> Iterator[Sample]:
    """The samples up to so many that are not blank."""
    for sample in samples:
        yield sample
        if count is not None and not sample.blank:
            count -= 1
            if count == 0:
                return


def _readable(text: str) -> str:
    problem = unreadable_text(text)
    if problem is not None:
        raise RowError(problem)
    return text


def _packed(sample: Sample) -> bytes:
    return bytes([sample.templated]) + sample.text.encode()


def _unpacked(data: bytes) -> Sample:
    return Sample(data[1:].decode(), templated=bool(data[0]))
