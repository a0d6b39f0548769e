"""The journal of an unfinished run, from which the next run resumes: one line per completed part of a file.

A line holds the file name, the number of bytes written so far, and their SHA-256. The next run does not trust it: it
reads the file back, which the digest needs anyway, and resumes after the last line that is true.
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
from neuralink_cli.files.schema import Schema, check_document
from neuralink_cli.streaming.pipeline import FileRange, pieces_of, read_ahead

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
    """The journal of a run, in its output directory. Use as a context manager.

    Args:
        run: Everything that the bytes of the output depend on.
        marks: From `read_marks`, to continue the existing journal; None for a new journal.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any], marks: Mapping[str, list[Mark]] | None = None) -> None:
        self._path = directory / JOURNAL_FILE
        self._marks = marks or {}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if marks is None else 0)
        self._descriptor = os.open(self._path, flags, 0o666)
        if marks is None:
            self._write(_first_line(run))
        else:
            # Cut off a line that was half written when the run was killed.
            os.truncate(self._path, read_input(self._path).rfind(b"\n") + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def add(self, file: str, size: int, sha256: str) -> None:
        """Note that the first `size` bytes of a file have been handed to the writer."""
        self._write(canonical({"file": file, "size": size, "sha256": sha256}))

    def remove(self) -> None:
        """Delete the journal: the output is complete."""
        self._path.unlink()

    def reopen(self, path: Path, progress: Callable[[int], object] | None = None) -> tuple[int, Any]:
        """Size and digest of the part of a file that an earlier run wrote correctly. The rest is cut off.

        Args:
            progress: Called with the number of bytes kept.
        """
        marks = sorted(self._marks.get(path.name, ()), key=lambda mark: mark.size)
        if not marks or not path.is_file():
            return 0, hashlib.sha256()
        size, digest = _longest_true(path, marks)
        logger.debug("%s: %d bytes are already written", path.name, size)
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
    """The journal of a run: continues that of an earlier run if it can be resumed, else starts a new one.

    Files in the directory that the journal does not list are deleted.
    """
    marks = read_marks(directory, run) if resume else None
    if marks is not None:
        logger.info("resuming from what an earlier run has written")
    elif any(directory.iterdir()):
        logger.info("starting afresh: what is left in %s is damaged or from another run", directory)
    empty_directory(directory, keep=() if marks is None else {JOURNAL_FILE, *marks})
    return Journal(directory, run, marks)


def read_marks(directory: Path, run: Mapping[str, Any]) -> dict[str, list[Mark]] | None:
    """The marks of the journal in a directory, by file name; None if it is missing, damaged or from another run."""
    try:
        # Without a line that was half written when the run was killed.
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
