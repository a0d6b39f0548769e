from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from neuralink_cli.activations import preflight
from neuralink_cli.activations.preflight import telling_time
from tests.conftest import ModelFactory
from tests.profile_requests import ProfileRequest, profile
from tests.tiny_models import LAYERS, NEURONS


@pytest.fixture
def remarks(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "neuralink_cli")
    return lambda: [record.message for record in caplog.records]


def test_needs_are_told_before_the_model_is_loaded(
    model: ModelFactory, text_file: Path, tmp_path: Path, remarks: Callable[[], list[str]]
) -> None:
    stages: list[tuple[str, list[str]]] = []

    def progress(name: str, _total: int | None, _unit: str) -> NoReturn:
        stages.append((name, list(remarks())))
        raise KeyboardInterrupt

    request = ProfileRequest(model("opt"), tmp_path / "t", (str(text_file),), max_tokens=1000)
    with pytest.raises(KeyboardInterrupt):
        profile(request, progress)
    ((name, (told,)),) = stages
    assert name == "loading the model"
    bytes_per_token = 2 * LAYERS * -(-NEURONS["opt"] // 8)
    assert told.endswith(f"at most {bytes_per_token:.1f} kB of disk")
    found = re.search(r"about (.*) MB of memory \((.*) kB of weights, (.*) MB of activations\)", told)
    assert found is not None
    total, weights, activations = (float(part) for part in found.groups())
    assert total == pytest.approx(weights / 1000 + activations, abs=0.11)
    with pytest.raises(KeyboardInterrupt):
        profile(replace(request, max_memory=1000, dtype="bfloat16", max_tokens=None), progress)
    assert "(1.0 kB of weights" in remarks()[-1]
    assert f"{bytes_per_token:.1f} MB of disk per million tokens" in remarks()[-1]


def told_after(seconds_of_batches: list[float], total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(preflight, "monotonic", lambda: now)
    counts: list[int] = []
    advance = telling_time(counts.append, total)
    for seconds in seconds_of_batches:
        now += seconds
        advance(100)
    assert counts == [100] * len(seconds_of_batches)


@pytest.mark.parametrize(
    ("batches", "total", "expected"),
    [
        # The first batch warms up and does not count.
        ([500.0, 3.0, 9.0], 10_200, ["recording the other 10,000 tokens takes about 5 min"]),
        ([0.0, 60.0, 60.0], 10_200, ["recording the other 10,000 tokens takes about 1.7 h"]),
        ([9.0, 1.0], 1_200, []),
        ([900.0], 1_200, []),
        ([900.0, 900.0], 200, []),
    ],
)
def test_the_time_is_told_once_if_it_is_long(
    batches: list[float],
    total: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    remarks: Callable[[], list[str]],
) -> None:
    told_after(batches, total, monkeypatch)
    assert remarks() == expected
