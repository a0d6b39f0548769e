"""Git LFS pointers: what lies in a clone in place of a large file that was not fetched."""

from __future__ import annotations

import contextlib
from pathlib import Path

from neuralink_cli.errors import InputError

_POINTER = b"version https://git-lfs"


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a pointer."""
    return start.startswith(_POINTER)


def refuse_lfs_pointer(path: Path) -> None:
    """Check that a file is not a pointer. One that cannot be read is left to whoever reads it.

    Raises:
        InputError: It is a pointer.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(len(_POINTER))
        if is_lfs_pointer(start):
            raise InputError(
                "is a Git LFS pointer, not the file itself", where=path, fix="fetch it with `git lfs pull`"
            )
