"""How long steps report that they move on; what is shown of it is the command line's business."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# Shows a stage (its name, its total if that is known, its unit): a context that yields what to call with each advance.
Progress = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], object]]]


@contextlib.contextmanager
def no_progress(_stage: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], object]]:
    """Shows nothing."""
    yield lambda _advance: None
