"""How long steps report that they move on; what is shown of it is the command line's business."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

# Shows a stage (its name, its total if that is known, its unit): a context that yields what to call with each advance.
Progress = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], object]]]
