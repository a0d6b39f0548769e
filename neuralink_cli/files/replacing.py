"""What `--overwrite` may replace: an earlier output, but not a file that looks like somebody else's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from neuralink_cli.errors import OutputError
from neuralink_cli.files.durable import require_free
from neuralink_cli.files.input_file import open_regular

BINARY, JSON = "binary", "JSON"
_START = 512


def require_text_output(
    path: Path, overwrite: bool, inputs: Iterable[Path | None] = (), *, json_format: str | None = None
) -> None:
    """As `require_free`; and whatever `--overwrite` says, no binary file is replaced, and no JSON of others.

    So neither the weights of a model nor its config are.

    Args:
        json_format: The `format` that the output states in its first lines, if it is JSON.

    Raises:
        OutputError: The output must not be written, as `require_free`, or is such a file.
        InputError: What is there cannot be read.
    """
    require_free(path, overwrite, inputs=inputs)
    if not path.is_file():
        return
    start = _start_of(path)
    looks = _look_of(start)
    earlier = looks == JSON and json_format is not None and f'"{json_format}"'.encode() in start
    if looks is not None and not earlier:
        raise foreign_file(path, f"is {looks}")


def looks_like(path: Path) -> str | None:
    """`BINARY` or `JSON` if a file starts like that, None if it is other text.

    Raises:
        InputError: It cannot be read.
    """
    return _look_of(_start_of(path))


def foreign_file(path: Path, what: str) -> OutputError:
    """The error for an output that would replace a file of another kind; `what` says which, as in "is binary"."""
    return OutputError(
        f"{what} and is no output of this command, so it is not replaced", where=path, fix="choose another output"
    )


def _start_of(path: Path) -> bytes:
    with open_regular(path) as handle:
        return handle.read(_START)


def _look_of(start: bytes) -> str | None:
    # Files of tensors start with their length, whose last bytes are zero.
    if 0 in start:
        return BINARY
    return JSON if start.lstrip().startswith(b"{") else None
