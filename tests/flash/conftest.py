from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts import Made


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Made], Path]:
    """A copy of a layout that may be damaged."""

    def copy(made: Made) -> Path:
        return Path(shutil.copytree(made.layout, tmp_path / "copy"))

    return copy
