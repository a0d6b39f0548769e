"""Calibration text: turns the rows of a dataset into text samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuralink_cli.calibration.rows import Rows, open_rows
from neuralink_cli.errors import InputError, first_line

MESSAGES = "messages"


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


@dataclass(frozen=True)
class Corpus:
    """A dataset that has at least one sample. Iterating reads the samples, from the start every time."""

    rows: Rows
    columns: tuple[str, ...]
    options: CorpusOptions
    tokenizer: Any

    @property
    def name(self) -> str:
        """What the trace calls the dataset."""
        return self.rows.name

    def __iter__(self) -> Iterator[Sample]:
        left = self.options.num_samples
        for sample in self._all_samples():
            if left == 0:
                return
            if left is not None and not sample.blank:
                left -= 1
            yield sample

    def _all_samples(self) -> Iterator[Sample]:
        rows = self.rows if self.options.seed is None else self.rows.shuffled(self.options.seed)
        started = False
        for number, row in enumerate(rows):
            sample = self._sample(row, number, continues=rows.lines and started)
            if rows.lines or not sample.blank:
                yield sample
                started = True

    def _sample(self, row: Mapping[str, Any], number: int, *, continues: bool) -> Sample:
        if self.columns == (MESSAGES,):
            return Sample(_apply_chat_template(self.tokenizer, row, self.rows.where, number), templated=True)
        return Sample("\n".join(_column_texts(row, self.columns, self.rows.where, number)), continues)


def open_corpus(dataset: str, options: CorpusOptions, tokenizer: Any) -> Corpus:
    """Open a dataset and find its text.

    In a .txt file, every line with its line break is a sample that continues the one before, unless a seed shuffles
    them. In any other dataset, a row is a sample: its `text_columns` that are present and not empty, joined by line
    breaks. A dataset without these columns but with `messages` goes through the tokenizer's chat template.

    Raises:
        InputError: The dataset is empty, cannot be read, or has no text column.
        UnsupportedError, MissingDependencyError: As `open_rows`.
    """
    rows = open_rows(dataset, options.split)
    first_row = next(iter(rows), None)
    if first_row is None:
        raise InputError("has no rows", where=rows.where)
    corpus = Corpus(rows, _find_columns(first_row, rows, options.text_columns, tokenizer), options, tokenizer)
    if all(sample.blank for sample in Corpus(rows, corpus.columns, CorpusOptions(), tokenizer)):
        raise InputError("has no text", where=rows.where)
    return corpus


def _find_columns(row: Mapping[str, Any], rows: Rows, text_columns: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    if rows.lines:
        return ("text",)
    found = tuple(column for column in text_columns if column in row and column != MESSAGES)
    if found:
        return found
    if MESSAGES not in row:
        wanted = " or ".join(repr(column) for column in text_columns)
        raise InputError(
            f"has no column {wanted}, only {', '.join(map(repr, row))}",
            where=rows.where,
            fix="choose one with --text-column",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "has `messages`, which need a chat template, but the model's tokenizer has none",
            where=rows.where,
            fix="use a dataset of plain text or add chat_template.jinja to the model",
        )
    return (MESSAGES,)


def _column_texts(row: Mapping[str, Any], columns: Sequence[str], where: str, number: int) -> Iterator[str]:
    for column in columns:
        value = row.get(column)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise InputError(f"row {number}: column {column!r} holds {type(value).__name__}, not text", where=where)
        yield value


def _apply_chat_template(tokenizer: Any, row: Mapping[str, Any], where: str, number: int) -> str:
    messages = row.get(MESSAGES)
    if not messages:
        return ""
    # Messages in one table have all keys. Missing keys are None, which templates would take as given.
    try:
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return str(tokenizer.apply_chat_template(given, tokenize=False))
    except Exception as error:
        raise InputError(f"row {number}: the chat template fails ({first_line(error)})", where=where) from None
