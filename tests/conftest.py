from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.layouts import LayoutFactory

# No test talks to the real hub, nor does a process that one starts. Read when its library is imported, so set first.
os.environ["HF_HUB_OFFLINE"] = "1"

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


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, used instead of the user's in this process and those it starts."""
    from huggingface_hub import constants

    cache = tmp_path / "hub cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache
