"""A directory that is replaced while it is read: what is then found wrong with it is that, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from neuralink_cli.checkpoint.file_names import CONFIG_FILE, FLASH_INDEX, PERMUTED_INDEX
from neuralink_cli.errors import InputError, NeuralinkError

_TELLING = (FLASH_INDEX, PERMUTED_INDEX, CONFIG_FILE)


class Unreplaced:
    """Watches a directory from before it is opened until the block ends. Use as a context manager.

    Raises:
        InputError: At the end of the block, or in `check`, the directory or its index is another than at the start;
            instead of whatever was found to be wrong because of that.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before = _identity(directory)

    def __enter__(self) -> Unreplaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (NeuralinkError, OSError)):
            self.check()

    def check(self) -> None:
        """Look whether it is still the same directory."""
        if self._before[0] is not None and _identity(self._directory) != self._before:
            raise InputError(
                "was replaced while it was being read",
                where=self._directory,
                fix="run it again when nothing else writes to it",
            )


def _identity(directory: Path) -> Sequence[tuple[int, int, int] | None]:
    return [_status(path) for path in (directory, *(directory / name for name in _TELLING))]


def _status(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    # A directory's time changes with any name in it.
    return status.st_dev, status.st_ino, 0 if path.is_dir() else status.st_mtime_ns
