"""How long steps report their progress. The command line decides what to show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# Shows a stage (name, total if known, unit): a context that yields a function to call with each advance.
Progress = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], object]]]


@contextlib.contextmanager
def no_progress(_stage: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], object]]:
    """Shows nothing."""
    yield lambda _advance: None
