"""Every error a user can meet. Each says what is wrong, where, and what to do about it.

The classes are the *causes*; `neuralink_cli.cli.exit_codes` maps each cause to an exit code, in one place.
"""

from __future__ import annotations

import os


class NeuralinkError(Exception):
    """Base of all expected failures.

    Args:
        what: What is wrong, as a sentence without a final full stop.
        where: The file, tensor or option concerned, if any.
        fix: What the user can do about it, if anything is known.
    """

    def __init__(self, what: str, *, where: str | os.PathLike[str] | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else os.fspath(where)
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        located = self.what if self.where is None else f"{self.where}: {self.what}"
        message = located if self.fix is None else f"{located}; {self.fix}"
        return " ".join(message.split())


class VerificationError(NeuralinkError):
    """A layout does not hold what it claims to hold, or a check that the user asked for failed."""


class OptionError(NeuralinkError):
    """Options that are valid one by one, but not together or not for this input."""


class InputError(NeuralinkError):
    """An input is missing, unreadable, truncated or malformed."""


class UnsupportedError(NeuralinkError):
    """An input is well formed but of a kind this tool does not handle."""


class MismatchError(NeuralinkError):
    """Inputs that do not belong together (fingerprints differ)."""


class OutputError(NeuralinkError):
    """The output exists already, cannot be written, or does not fit on the disk."""


class MissingDependencyError(NeuralinkError):
    """An optional package is needed and not installed."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or its class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
