"""Whose signals make the threshold of a block: its own, or for a hardly used expert those of its layer's experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from neuralink_cli.activations.threshold import MagnitudeHistogram
from neuralink_cli.errors import InputError
from neuralink_cli.profiling.firing import FiringRule, magnitude_counts
from neuralink_cli.profiling.recorder import HookedBlock, HookedModel, calibrate

RATIO = 0.3
NEURONS = 8


class Signals:
    """In place of a hooked model: a batch is the signal of every block, by index."""

    def __init__(self, *blocks: HookedBlock) -> None:
        self.blocks = blocks

    def run(self, batch: Any, receive: Any) -> None:
        for index, signal in batch.signals.items():
            receive(index, signal, None)


def batch_of(signals: dict[int, torch.Tensor]) -> Any:
    return SimpleNamespace(signals=signals, tokens=max(len(signal) for signal in signals.values()))


def block(module: object, expert: int | None = None) -> HookedBlock:
    return HookedBlock(module, False, NEURONS, FiringRule("layers.0", None, False), expert=expert)


def signal_of(tokens: int, scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(tokens, NEURONS, generator=torch.Generator().manual_seed(seed))


def threshold_over(*signals: torch.Tensor) -> float:
    histogram = MagnitudeHistogram()
    for signal in signals:
        histogram.add(magnitude_counts(signal.abs()))
    return histogram.threshold(RATIO)


@pytest.mark.parametrize(("tokens", "own"), [(1, False), (15, False), (16, True), (17, True)])
def test_an_expert_of_fewer_than_sixteen_tokens_shares_the_threshold_of_its_layer(tokens: int, own: bool) -> None:
    first, second = object(), object()
    signals = {0: signal_of(tokens, 1, 0), 1: signal_of(40, 5, 1), 2: signal_of(30, 50, 2), 3: signal_of(2, 100, 3)}
    # Two experts of one layer, one of another layer, and a block that is no expert.
    model = Signals(block(first, 0), block(first, 1), block(second, 0), block(object()))
    halves = [{index: part[k::2] for index, part in signals.items() if len(part) > k} for k in (0, 1)]
    done: list[int] = []
    thresholds = calibrate(cast(HookedModel, model), [batch_of(half) for half in halves], done.append).thresholds(RATIO)
    assert thresholds == [
        threshold_over(signals[0]) if own else threshold_over(signals[0], signals[1]),
        threshold_over(signals[1]),
        threshold_over(signals[2]),
        threshold_over(signals[3]),
    ]
    assert done == [20, 20]


def test_an_expert_without_tokens_has_the_threshold_of_its_layer() -> None:
    layer = object()
    signal = signal_of(100, 2, 0)
    assert (
        calibrate(
            cast(HookedModel, Signals(block(layer, 0), block(layer, 1))), [batch_of({1: signal})], np.isfinite
        ).thresholds(RATIO)
        == [threshold_over(signal)] * 2
    )


def test_no_threshold_is_made_of_what_is_not_a_number() -> None:
    signal = torch.full((3, NEURONS), float("nan"))
    with pytest.raises(InputError, match="NaN"):
        calibrate(cast(HookedModel, Signals(block(object()))), [batch_of({0: signal})], np.isfinite)
