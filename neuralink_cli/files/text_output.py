"""Outputs that are text: what they may replace."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from neuralink_cli.errors import OutputError
from neuralink_cli.files.durable import require_free
from neuralink_cli.files.input_file import open_regular

_START = 8


def require_text_output(path: Path, overwrite: bool, inputs: Iterable[Path | None] = (), *, json: bool = False) -> None:
    """As `require_free`; and whatever `--overwrite` says, no binary file is replaced, and JSON only by JSON.

    So neither the weights of a model nor its config are.

    Args:
        json: Whether the output is JSON.

    Raises:
        OutputError: The output must not be written, as `require_free`, or is such a file.
        InputError: What is there cannot be read.
    """
    require_free(path, overwrite, inputs=inputs)
    if not path.is_file():
        return
    with open_regular(path) as handle:
        start = handle.read(_START)
    # Files of tensors start with their length, whose last bytes are zero.
    binary = 0 in start
    if binary or (not json and start.lstrip().startswith(b"{")):
        raise OutputError(
            f"is {'binary' if binary else 'JSON'} and no output of this command, so it is not replaced",
            where=path,
            fix="choose another output",
        )
