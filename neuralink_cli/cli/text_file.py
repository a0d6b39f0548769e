"""Text that a command is given as a file."""

from __future__ import annotations

from pathlib import Path

from neuralink_cli.errors import InputError


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file.

    Raises:
        InputError: It cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as text ({error})", where=path) from None
