"""Every error a user can meet. Each says what is wrong, where, and what to do about it.

The classes are the *causes*; `neuralink_cli.cli.exit_codes` maps each cause to an exit code, in one place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


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


class WorkerError(NeuralinkError):
    """A process or machine that shares the work ended, failed or does not answer."""


@contextmanager
def advising(fix: str) -> Iterator[None]:
    """Within it, errors that do not say what to do say this: only who asked for a file knows what it should be.

    Raises:
        NeuralinkError: Of the same class as the one that was raised.
    """
    try:
        yield
    except NeuralinkError as error:
        if error.fix is not None:
            raise
        raise type(error)(error.what, where=error.where, fix=fix) from error


# What to do where a file must not grow further.
ABOVE_LIMIT = "raise the limit on the size of files (`ulimit -f`), or write to another file system"
# No message is longer: a terminal shows it, and a log keeps it.
LONGEST_MESSAGE = 500
# A first line that is shorter, or ends in a colon, may be but the heading of what follows.
_SAYS_LITTLE = 40


def first_line(error: BaseException) -> str:
    """What a foreign error says, in a line: its first one and, if that says little, those after it.

    The class of the error if it says nothing.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = lines[0]
    for line in lines[1:]:
        if len(said) >= _SAYS_LITTLE and not said.endswith((":", ",")):
            break
        said = f"{said} {line}"
    if isinstance(error, (KeyError, IndexError, StopIteration, AssertionError)) and len(said) < _SAYS_LITTLE:
        # Of a missing key, the key is all that is said.
        said = f"{type(error).__name__}: {said}"
    return shorten(said.rstrip(" .:"), LONGEST_MESSAGE // 2)


def shorten(text: str, most: int = LONGEST_MESSAGE) -> str:
    """A text of at most `most` characters: cut in the middle, as the advice comes last."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[-end:]}"


def printable(text: str) -> str:
    """A text on one line, without characters that a terminal would obey."""
    line = " ".join(text.split())
    return "".join(
        c if c.isprintable() or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode() for c in line
    )
