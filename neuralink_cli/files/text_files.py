"""Files as text: compressed ones unpacked, UTF-8 or UTF-16, and what is no text told apart from what is."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from neuralink_cli.errors import InputError, MissingDependencyError, NeuralinkError, first_line

# Endings that say how a file is compressed; its first bytes decide.
COMPRESSED_SUFFIXES = frozenset((".gz", ".bz2", ".xz", ".zst"))
BYTE_ORDER_MARK = "\ufeff"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WANTED = "pass a file of text"
_HEAD_BYTES = 4096
_ZSTD = b"\x28\xb5\x2f\xfd"
_FOREIGN = {b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet file", b"%PDF": "a PDF"}
# The mark of UTF-32 starts with that of UTF-16.
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """Open a file of text, compressed or not, without its byte-order mark.

    A byte that is not UTF-8 becomes a lone surrogate, so that a caller can name the line it is in: see
    `unreadable_text`.

    Args:
        newline: As for `open`.

    Raises:
        InputError: It cannot be read, is a Git LFS pointer, damaged, or something else than text.
        MissingDependencyError: Nothing is installed that reads its compression.
    """
    with _explained(path), open_bytes(path) as stream:
        head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        encoding = _encoding(head, path)
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        with io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline) as text:
            yield text


def read_text(path: Path) -> str:
    """The whole of a text file, see `open_text`.

    Raises:
        InputError: It cannot be read, or is not text.
        MissingDependencyError: As `open_text`.
    """
    with open_text(path) as file:
        text = file.read().removeprefix(BYTE_ORDER_MARK)
    problem = unreadable_text(text)
    if problem is not None:
        raise InputError(problem, where=path)
    return text


def unreadable_text(text: str) -> str | None:
    """What is wrong with a text that no tokenizer can read; None if nothing is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return f"is not UTF-8 text (byte {code - 0xDC00:#04x})"
        return f"is not Unicode text (it has half of a character, \\u{code:04x})"
    return None


def require_content(path: Path) -> None:
    """Refuse what is no data, whatever the type of file it should be.

    Raises:
        InputError: The file cannot be opened, is empty, or is a Git LFS pointer.
    """
    with _explained(path), path.open("rb") as file:
        _require_data(file.peek(_HEAD_BYTES), path)


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """Open a file for buffered reading, unpacked if it is compressed, whatever it is called."""
    with path.open("rb") as file:
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        _require_data(head, path)
        unpack = _unpacker(head, path)
        with file if unpack is None else unpack(file) as stream:
            yield stream


def _require_data(head: bytes, path: Path) -> None:
    if not head:
        raise InputError("is empty", where=path, fix="pass a file with data in it")
    if head.startswith(_LFS_POINTER):
        raise InputError("is a Git LFS pointer, not the data itself", where=path, fix="run `git lfs pull` to fetch it")


def _unpacker(head: bytes, path: Path) -> Callable[[IO[bytes]], Any] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda file: gzip.GzipFile(fileobj=file)
    if head.startswith(b"BZh"):
        return bz2.BZ2File
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile
    if head.startswith(_ZSTD):
        return lambda file: _open_zstd(file, path)
    return None


def _open_zstd(file: IO[bytes], path: Path) -> Any:
    """By the standard library from Python 3.14 on, else by pyarrow; both tell when a file is cut off."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").ZstdFile(file)
    with contextlib.suppress(ImportError):
        arrow = importlib.import_module("pyarrow")
        return io.BufferedReader(_ArrowStream(arrow.CompressedInputStream(arrow.PythonFile(file, "r"), "zstd")))
    raise MissingDependencyError(
        "is compressed with Zstandard, which nothing that is installed can read",
        where=path,
        fix="pip install pyarrow, or unpack it with `zstd -d`",
    )


class _ArrowStream(io.RawIOBase):
    """A stream of pyarrow as a file of Python."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is something left."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _encoding(head: bytes, path: Path) -> str:
    """UTF-8 unless a byte-order mark says otherwise, or every other byte is zero as in UTF-16 of a European language.

    Raises:
        InputError: It is no text.
    """
    for start, kind in _FOREIGN.items():
        if head.startswith(start):
            raise InputError(f"is {kind}, not text", where=path, fix="unpack or convert it, or rename it")
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if head.startswith(BYTE_ORDER_MARK.encode()):
        return "utf-8-sig"
    zeros = [head[place::2].count(0) / max(len(head[place::2]), 1) for place in (0, 1)]
    if zeros == [0, 0]:
        return "utf-8"
    if min(zeros) == 0 and max(zeros) > 0.3:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    raise InputError("is not text (it has bytes of zero)", where=path, fix=_WANTED)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what reading raises into an error that names the file."""
    try:
        yield
    except NeuralinkError:
        raise
    except UnicodeError as error:
        raise InputError(f"is not text in the encoding it starts in ({first_line(error)})", where=path) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"its compressed data is damaged or cut off ({first_line(error)})", where=path) from None
    except OSError as error:
        fix = "check its path" if isinstance(error, FileNotFoundError) else _WANTED
        raise InputError(f"cannot be read ({error.strerror or first_line(error)})", where=path, fix=fix) from None
