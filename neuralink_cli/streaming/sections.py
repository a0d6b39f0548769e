"""Writes a file section by section. The input of each section is read ahead, in the order it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from neuralink_cli.arrays import Bytes
from neuralink_cli.files.byte_file import ByteFile
from neuralink_cli.streaming.journal import Journal
from neuralink_cli.streaming.output_file import OutputFile
from neuralink_cli.streaming.pipeline import FileRange, pieces_of, read_ahead


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of an output file.

    Attributes:
        nbytes: Its size.
        reads: The file ranges to read for it.
        write: Called with the output and an iterator, from which it must take all bytes of `reads`.
    """

    nbytes: int
    reads: Sequence[FileRange]
    write: Callable[[OutputFile, Iterator[Bytes]], None]


def ready(content: npt.NDArray[Any] | bytes) -> Section:
    """A section whose content is in memory."""
    nbytes = len(content) if isinstance(content, bytes) else content.nbytes
    return Section(nbytes, (), lambda output, _: output.write(content))


def zeros(nbytes: int) -> Section:
    """A section of zeros."""
    return Section(nbytes, (), lambda output, _: output.write(bytes(nbytes)))


def copied(file: ByteFile, start: int, stop: int) -> Section:
    """A section copied from bytes `start` to `stop` of a file."""
    reads = tuple(pieces_of(file, start, stop))

    def write(output: OutputFile, pieces: Iterator[Bytes]) -> None:
        for _ in reads:
            output.write(next(pieces))

    return Section(stop - start, reads, write)


def write_sections(
    path: Path,
    sections: Sequence[Section],
    progress: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> str:
    """Write a file and return its SHA-256.

    Args:
        progress: Called with the bytes written since the last call.
        journal: Sections that it lists as written are skipped.
    """
    with OutputFile(path, progress, journal) as output:
        left = _after(sections, output.size)
        with read_ahead(wanted for section in left for wanted in section.reads) as pieces:
            for section in left:
                before = output.size
                section.write(output, pieces)
                if output.size - before != section.nbytes:
                    raise ValueError(f"a section of {section.nbytes} bytes got {output.size - before}")
                output.mark()
        return output.sha256


def _after(sections: Sequence[Section], size: int) -> Sequence[Section]:
    """The sections that come after the first `size` bytes."""
    position = 0
    for k, section in enumerate(sections):
        if position == size:
            return sections[k:]
        position += section.nbytes
    if position != size:
        raise ValueError(f"no section starts at byte {size}")
    return ()
