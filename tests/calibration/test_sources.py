"""Which sequences thresholds are calibrated on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neuralink_cli.calibration.batches import text_batch
from neuralink_cli.calibration.sources import TextSource, plan, spread


def source(lengths: Sequence[int]) -> TextSource:
    sequences = [np.full(length, number, dtype=np.int32) for number, length in enumerate(lengths)]
    return TextSource("x", sequences, {}, text_batch, 0)


def test_sequences_are_spread_evenly() -> None:
    assert spread([8] * 10, 0.5) == [1, 3, 5, 7, 9]
    assert spread([8] * 10, 0.01) == [5]
    assert spread([8] * 10, 1.0) == list(range(10))
    assert spread([100, 1, 1, 1, 1, 1], 0.9) == list(range(6))


def test_every_source_gives_its_share() -> None:
    data = plan([source([16] * 90), source([16] * 10), source([5, 9] * 20)], batch_size=4, packing=False)
    batches = data.spread_batches(400, 4)
    tokens = [sum(batch.tokens for batch in batches if batch.source == index) for index in range(3)]
    total = 16 * 100 + 14 * 20
    for found, share in zip(tokens, (16 * 90, 160, 280), strict=True):
        assert 400 * share / total <= found <= 400 * share / total + 16
    for batch, inputs in zip(batches, data.spread_inputs(batches), strict=True):
        assert inputs.mask.all()
        assert 1 <= len(batch.sequences) <= 4
        assert inputs.tokens == batch.tokens
        assert inputs.inputs["input_ids"][:, 0].tolist() == list(batch.sequences)
    everything = data.spread_batches(10**9, 4)
    assert sum(batch.tokens for batch in everything) == total
