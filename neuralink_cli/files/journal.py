"""What an unfinished run has written, told to the next: a line for every stretch of a file that is complete.

A line holds the file, how much of it there is, and the SHA-256 of that much. It is not believed: the next run reads
back what is there, which it must for the digest anyway, and goes on after the last line that is true.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from neuralink_cli import __version__
from neuralink_cli.errors import InputError
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.files.durable import empty_directory, named_output
from neuralink_cli.files.input_file import read_input
from neuralink_cli.files.json_text import canonical, parse_object
from neuralink_cli.files.pipeline import FileRange, pieces_of, read_ahead
from neuralink_cli.files.schema import Schema, check_document

logger = logging.getLogger(__name__)

JOURNAL_FILE = ".neuralink-journal"
_FORMAT, _VERSION = "neuralink-journal", 1
_MARK_SCHEMA = Schema("line of a journal", __package__, "journal.schema.json")


@dataclass(frozen=True)
class Mark:
    """The first `size` bytes of a file have this SHA-256."""

    size: int
    sha256: str


class Journal:
    """The journal of a run, in the directory that it writes. Use as a context manager.

    Args:
        run: What the bytes of the output depend on.
        marks: From `read_marks`, to go on with the journal that is there; None for a new one.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any], marks: Mapping[str, list[Mark]] | None = None) -> None:
        self._path = directory / JOURNAL_FILE
        self._marks = marks or {}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if marks is None else 0)
        self._descriptor = os.open(self._path, flags, 0o666)
        if marks is None:
            self._write(_first_line(run))
        else:
            # The line that was being written when the run died.
            os.truncate(self._path, read_input(self._path).rfind(b"\n") + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def add(self, file: str, size: int, sha256: str) -> None:
        """Note that the first `size` bytes of a file have been handed to the writer."""
        self._write(canonical({"file": file, "size": size, "sha256": sha256}))

    def remove(self) -> None:
        """Delete it: the output is complete."""
        self._path.unlink()

    def reopen(self, path: Path, progress: Callable[[int], object] | None = None) -> tuple[int, Any]:
        """How much of a file an earlier run left that is right, and the digest of that much. The rest is cut off.

        Args:
            progress: Called with the bytes that are right.
        """
        marks = sorted(self._marks.get(path.name, ()), key=lambda mark: mark.size)
        if not marks or not path.is_file():
            return 0, hashlib.sha256()
        size, digest = _longest_true(path, marks)
        logger.debug("%s: %d bytes are written already", path.name, size)
        if size == 0:
            path.unlink()
            return 0, digest
        os.truncate(path, size)
        if progress is not None:
            progress(size)
        return size, digest

    def _write(self, line: str) -> None:
        left = line.encode() + b"\n"
        with named_output(self._path):
            while left:
                left = left[os.write(self._descriptor, left) :]


def open_journal(directory: Path, run: Mapping[str, Any], *, resume: bool) -> Journal:
    """The journal of a run: that of an earlier one if it can be resumed, and otherwise a new one.

    What is in the directory and not known to the journal is cleared away.
    """
    marks = read_marks(directory, run) if resume else None
    if marks is not None:
        logger.info("going on with what an earlier run has written")
    elif any(directory.iterdir()):
        logger.info("starting afresh: what is left in %s is damaged or of another run", directory)
    empty_directory(directory, keep=() if marks is None else {JOURNAL_FILE, *marks})
    return Journal(directory, run, marks)


def read_marks(directory: Path, run: Mapping[str, Any]) -> dict[str, list[Mark]] | None:
    """What the journal in a directory says, by file name; None if there is none, or a damaged one, or another run's."""
    try:
        # Without the line that was being written when the run died.
        first, *others = read_input(directory / JOURNAL_FILE).split(b"\n")[:-1]
        if first != _first_line(run).encode():
            return None
        marks: dict[str, list[Mark]] = {}
        for line in others:
            entry = parse_object(line, JOURNAL_FILE)
            check_document(entry, _MARK_SCHEMA, JOURNAL_FILE)
            marks.setdefault(entry["file"], []).append(Mark(entry["size"], entry["sha256"]))
    except (ValueError, InputError):
        return None
    return marks


def _first_line(run: Mapping[str, Any]) -> str:
    return canonical({"format": _FORMAT, "version": _VERSION, "tool": f"neuralink {__version__}", "run": run})


def _longest_true(path: Path, marks: list[Mark]) -> tuple[int, Any]:
    size, right, digest = 0, hashlib.sha256(), hashlib.sha256()
    with ByteFile(path) as file:
        stated = {mark.size: mark.sha256 for mark in marks if 0 < mark.size <= file.size}
        position = 0
        with read_ahead(_between(file, [0, *stated])) as pieces:
            for data in pieces:
                digest.update(data.data)
                position += data.size
                if position in stated:
                    if digest.hexdigest() != stated[position]:
                        break
                    size, right = position, digest.copy()
    return size, right


def _between(file: ByteFile, bounds: list[int]) -> Iterator[FileRange]:
    for start, stop in pairwise(bounds):
        yield from pieces_of(file, start, stop)
