from __future__ import annotations

import logging

import pytest
from hypothesis import settings

from tests.layouts import LayoutFactory

# The same examples in every run, and no time limit for one: the machines that run this are shared.
settings.register_profile("neuralink", derandomize=True, deadline=None)
settings.load_profile("neuralink")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> LayoutFactory:
    return LayoutFactory(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(autouse=True)
def undisturbed_logger() -> None:
    """Commands that ran in this process, for fixtures too, set up the package's logger: undone before each test."""
    logger = logging.getLogger("neuralink_cli")
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
