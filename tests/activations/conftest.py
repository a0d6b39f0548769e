from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import TEXT, build_model

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost these tiny models more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Builds each tiny model once: `model("opt", dtype="bfloat16")`. Do not write into its directory."""
    built: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in built:
            built[key] = build_model(tmp_path_factory.mktemp(family), family, **options)
        return built[key]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "river.txt"
    path.write_text(TEXT)
    return path
