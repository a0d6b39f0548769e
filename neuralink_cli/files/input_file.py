"""Opening inputs: regular files only, so that no pipe or device keeps a command waiting."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from neuralink_cli.errors import InputError

_PIECE = 1 << 20
_KINDS = {
    stat.S_IFIFO: "pipe",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFREG: "file",
}


def open_input(path: Path) -> int:
    """A descriptor to read a regular file from.

    Raises:
        InputError: It cannot be opened, or is a directory, pipe, socket or device.
    """
    try:
        # A pipe that nobody writes to would otherwise be waited for here.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        require_regular(path)
        fix = "check its path" if isinstance(error, FileNotFoundError) else None
        raise InputError(f"cannot be opened ({why(error)})", where=path, fix=fix) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(mode, path)
    return descriptor


def read_input(path: Path) -> bytes:
    """The whole of a regular file.

    Raises:
        InputError: As `open_input`, or reading fails.
    """
    with os.fdopen(open_input(path), "rb") as handle:
        try:
            return handle.read()
        except OSError as error:
            raise InputError(f"reading failed ({why(error)})", where=path) from None


def open_regular(path: Path) -> FileIO:
    """A regular file, opened to be read with `pieces_of_input`; unbuffered.

    Raises:
        InputError: As `open_input`.
    """
    return os.fdopen(open_input(path), "rb", buffering=0)


def pieces_of_input(handle: FileIO, path: Path) -> Iterator[memoryview]:
    """The rest of an open file in pieces, each valid until the next one.

    Raises:
        InputError: Reading fails.
    """
    buffer = memoryview(bytearray(_PIECE))
    while True:
        try:
            count = handle.readinto(buffer)
        except OSError as error:
            raise InputError(f"reading failed ({why(error)})", where=path) from None
        if not count:
            return
        yield buffer[:count]


def digest_of(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a regular file of any size.

    Args:
        progress: Called with the bytes read since the last call.

    Raises:
        InputError: As `open_input`, or reading fails.
    """
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        for piece in pieces_of_input(handle, path):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def require_regular(path: Path) -> None:
    """Check, without opening it, that what is at a path, if anything is there, is a regular file.

    Raises:
        InputError: It is something else.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise _not_regular(mode, path)


def require_reachable(path: Path) -> None:
    """Check that the system can say whether there is something at a path.

    Raises:
        InputError: It cannot: the name is too long, a folder on the way may not be searched, links go in circles.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be opened ({why(error)})", where=path) from None


def kind_of(mode: int) -> str:
    """What a file of a mode is, in a word."""
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def why(error: OSError | ValueError) -> str:
    """What the system says of its error; the name was no name at all if it is a ValueError."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _not_regular(mode: int, path: Path) -> InputError:
    kind = kind_of(mode)
    fix = None if stat.S_ISDIR(mode) else "save it as a file first"
    return InputError(f"is a {kind}, not a regular file", where=path, fix=fix)
