"""What commands print: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import click

from neuralink_cli.errors import printable, shorten
from neuralink_cli.signals import deferred_signals
from neuralink_cli.sizes import human_bytes, human_seconds

_LOGGER = logging.getLogger("neuralink_cli")
_state = {"quiet": False}
# Of a terminal.
_COLUMNS = 80
# How what a locale cannot print is written on stdout.
_ESCAPED = "neuralink-escaped"
_LONGEST_WORD = 250
_SECONDS_BETWEEN_LINES = 60.0


class _RemarkHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes remarks on their own lines, even while a progress bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a remark; bars are cleared for it and drawn again."""
        # Imported only when there is a bar.
        tqdm = sys.modules.get("tqdm")
        with contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The own byte of a file name that is no text, and an escape of what the locale has no bytes for."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    error.end = error.start + 1
    byte = 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF
    return codecs.lookup_error("surrogateescape" if byte else "backslashreplace")(error)


codecs.register_error(_ESCAPED, _escape)


class _LenientRaw(io.RawIOBase):
    """Bytes for a descriptor; those that it does not take are dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write what can be written, and say that it was all."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)
        return len(data)


@contextlib.contextmanager
def lenient_stderr() -> Iterator[None]:
    """Within the block a stderr that cannot be written (a full disk, a reader that went away) loses what it is told.

    The exit code is what counts, and stays what it is. So it is where there is no stderr at all: libraries expect one
    as soon as they are imported.
    """
    plain = sys.stderr
    if plain is None:
        with Path(os.devnull).open("w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing):
            yield
        return
    if plain is not sys.__stderr__ or not isinstance(plain, io.TextIOWrapper):
        yield
        return
    lenient = io.TextIOWrapper(
        io.BufferedWriter(_LenientRaw(plain.fileno())),
        encoding=plain.encoding,
        errors="backslashreplace",
        line_buffering=True,
        write_through=True,
    )
    sys.stderr = lenient
    try:
        yield
    finally:
        lenient.flush()
        sys.stderr = plain


def set_defaults() -> None:
    """Set the defaults of every command line: remarks are shown, and any file name can be printed."""
    handler = _RemarkHandler()
    handler.setFormatter(logging.Formatter("neuralink: %(message)s"))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(logging.INFO)
    _state["quiet"] = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_ESCAPED)


def set_verbosity(*, quiet: bool = False, verbose: bool = False) -> None:
    """Choose how much goes to stderr."""
    if quiet:
        _state["quiet"] = True
        _LOGGER.setLevel(logging.ERROR)
    elif verbose:
        _LOGGER.setLevel(logging.DEBUG)


def show_nothing() -> None:
    """Show neither progress nor remarks: another process does. Other listeners of the log still get everything."""
    _state["quiet"] = True
    _LOGGER.handlers[:] = [logging.NullHandler()]


def remark(message: str) -> None:
    """A line on stderr that `--quiet` silences."""
    _LOGGER.info(message)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int = _COLUMNS) -> None:
    """A table on stdout: first column left, the others right.

    One that is too wide is set closer; columns that still do not fit go below, with the first one once more.
    """
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    for line in lines:
        line[0] = shorten(line[0], columns // 2)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    gap = next((gap for gap in (2, 1) if sum(widths) + gap * (len(widths) - 1) <= columns), 2)
    for k, shown in enumerate(_fitting(widths, gap, columns)):
        if k:
            click.echo()
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(line[column].rjust(widths[column]) for column in shown)]
            click.echo((gap * " ").join(cells).rstrip())


def _cell(text: str) -> str:
    # What is indented stays so.
    return text if text.isprintable() else printable(text)


def _fitting(widths: Sequence[int], gap: int, columns: int) -> list[list[int]]:
    """The columns after the first in groups that each fit beside it; at least one in each."""
    groups: list[list[int]] = [[]]
    used = widths[0]
    for column, width in enumerate(widths[1:], 1):
        used += gap + width
        if used > columns and groups[-1]:
            groups.append([])
            used = widths[0] + gap + width
        groups[-1].append(column)
    return groups


def print_text(text: str, *, indent: int = 0, columns: int = _COLUMNS) -> None:
    """Sentences on stdout, wrapped; lines after the first are indented twice as far."""
    for k, line in enumerate(_wrapped(text, columns - 2 * indent)):
        click.echo(f"{'':{indent * min(k + 1, 2)}}{line}")


def _wrapped(text: str, columns: int) -> list[str]:
    # A path may be wider than the terminal; nothing is without end.
    words = " ".join(shorten(word, _LONGEST_WORD) for word in printable(text).split(" "))
    return textwrap.wrap(words, columns, break_long_words=False, break_on_hyphens=False) or [""]


def print_pairs(pairs: Iterable[tuple[str, str]], *, columns: int = _COLUMNS) -> None:
    """Labels with their values on stdout, values wrapped and aligned; a label is not repeated on the next line."""
    listed = list(pairs)
    label = max(len(name) for name, _ in listed)
    last = ""
    for full, value in listed:
        name, last = ("" if full == last else full), full
        for k, line in enumerate(_wrapped(value, columns - label - 2)):
            click.echo(f"{name if k == 0 else '':{label}}  {line}".rstrip())


def print_command(command: str, *, columns: int = _COLUMNS) -> None:
    """A command line on stdout, indented, cut into lines that can be pasted."""
    line = " "
    for word in _words(command):
        if len(line) + 1 + len(word) > columns - 2 and line.strip():
            click.echo(f"{line} \\")
            line = "     "
        line += f" {word}"
    click.echo(line)


def _words(command: str) -> list[str]:
    """The words of a command line as they were quoted, options with their values."""
    words: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if words and words[-1].startswith("-") and " " not in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


@contextlib.contextmanager
def progress_bar(stage: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """Progress on stderr, with the time left if the total is known: a bar on a terminal, else lines."""
    if _state["quiet"] or sys.stderr is None:
        yield lambda _count: None
        return
    if not sys.stderr.isatty():
        with _progress_lines(stage, total, unit) as advance:
            yield advance
        return
    from tqdm import tqdm

    bar = None
    try:
        # A bar that is shown is cleared: what comes next has a line of its own.
        with deferred_signals():
            bar = tqdm(
                total=total,
                desc=stage,
                unit=unit,
                unit_scale=True,
                unit_divisor=1024 if unit == "B" else 1000,
                leave=False,
                mininterval=0.1,
                dynamic_ncols=True,
                bar_format=None if total is not None else "{desc}: {n_fmt} {unit} [{elapsed}]",
                file=sys.stderr,
            )
        yield bar.update
    finally:
        with deferred_signals():
            if bar is not None:
                bar.close()


@contextlib.contextmanager
def _progress_lines(stage: str, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """For logs: a line at the start, one now and then, and one at the end."""
    began = last = monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = monotonic()
            whole = "" if total is None else f" of {_amount(total, unit)}"
            say(f"{_amount(done, unit)}{whole} after {human_seconds(last - began)}")

    def say(what: str) -> None:
        click.echo(f"{stage}: {what}", err=True)

    say("started" if total is None else _amount(total, unit))
    yield advance
    say(f"done, {_amount(done, unit)} in {human_seconds(monotonic() - began)}")


def _amount(count: int, unit: str) -> str:
    return human_bytes(count) if unit == "B" else f"{count:,} {unit}{'' if count == 1 else 's'}"
