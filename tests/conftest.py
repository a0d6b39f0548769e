from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.layouts import LayoutFactory, Made

if TYPE_CHECKING:
    from tests.runnables import RunnableFactory

ModelFactory = Callable[..., Path]

FLUSHING = ("files", "layout", "rewriting", "storage", "streaming")

# No test talks to the real hub, nor does a process that one starts. Read when its library is imported, so set first.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run on all cores already: more threads of torch would only wait for each other. Read when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

# Models and their configs are many objects and little garbage: to search less often saves several percent of all time.
gc.set_threshold(50_000, 10, 10)

# The same examples in every run, and no time limit for one: the machines that run this are shared.
settings.register_profile("neuralink", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("neuralink")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> LayoutFactory:
    return LayoutFactory(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(autouse=True)
def undisturbed_logger() -> None:
    """Commands that ran in this process, for fixtures too, set up the package's logger: undone before each test."""
    logger = logging.getLogger("neuralink_cli")
    logger.handlers[:], logger.propagate = [], True
    if logger.level != logging.NOTSET:
        # Which makes all loggers there are forget what they know.
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def no_search_of_what_is_loaded() -> None:
    """What has been imported so far need not be searched for garbage whenever a model is let go: half a second."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def flushes_cost_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Flushes go to the device only in the rooms whose tests are about that: what they do shows after a power cut.

    Who counts flushes, or lets one fail, still sees all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in FLUSHING:
            patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, used instead of the user's in this process and those it starts."""
    from huggingface_hub import constants

    cache = tmp_path / "hub cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Made], Path]:
    """A copy of a layout that may be damaged."""

    def copy(made: Made) -> Path:
        return Path(shutil.copytree(made.layout, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Builds each tiny model once: `model("opt", dtype="bfloat16")`. Do not write into its directory."""
    from tests.tiny_models import build_model

    built: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in built:
            built[key] = build_model(tmp_path_factory.mktemp(family), family, **options)
        return built[key]

    return get


@pytest.fixture(scope="session")
def runnable(tmp_path_factory: pytest.TempPathFactory) -> RunnableFactory:
    """Makes each layout once: `runnable("llama", active_ratio=0.3)`. Do not write into its directories."""
    from tests.runnables import runnable_factory

    return runnable_factory(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import TEXT

    path = tmp_path_factory.mktemp("data") / "river.txt"
    path.write_text(TEXT)
    return path
