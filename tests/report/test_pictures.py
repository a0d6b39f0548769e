"""Rasters and co-activations of a block, against loops over tokens and neurons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import ContenderBlock, TokenRange
from neuralink_cli.report.pictures import block_pictures, co_activation, raster
from tests.traces import write_clustered_trace, write_routed_trace


@pytest.fixture
def fired() -> np.ndarray:
    # More tokens than are counted at a time.
    return (np.random.default_rng(3).random((70, 23)) < 0.3).astype(np.uint8)


@pytest.mark.parametrize("per_cell", [1, 4, 23, 30])
def test_a_raster_is_the_share_of_the_slots_of_a_cell(fired: np.ndarray, per_cell: int) -> None:
    order = np.random.default_rng(1).permutation(23).astype(np.int32)
    found = raster(fired, order, per_cell)
    assert found.shape == (70, -(-23 // per_cell))
    for token, row in enumerate(found):
        for cell, share in enumerate(row):
            neurons = order[cell * per_cell : (cell + 1) * per_cell]
            assert share == pytest.approx(fired[token, neurons].mean())


@pytest.mark.parametrize("cells", [1, 5, 23, 96])
def test_a_co_activation_is_over_pairs_of_different_neurons(fired: np.ndarray, cells: int) -> None:
    order = np.random.default_rng(2).permutation(23).astype(np.int32)
    found = co_activation(fired, order, cells)
    count = min(cells, 23)
    assert found.shape == (count, count)
    parts = [order[k * 23 // count : (k + 1) * 23 // count] for k in range(count)]
    for a, first in enumerate(parts):
        for b, second in enumerate(parts):
            pairs = [(i, j) for i in first for j in second if i != j]
            together = sum(int((fired[:, i] & fired[:, j]).sum()) for i, j in pairs)
            possible = sum(float(fired[:, i].sum() * fired[:, j].sum()) ** 0.5 for i, j in pairs)
            assert found[a, b] == pytest.approx(together / possible if pairs else 0.0, abs=1e-6)


def test_neurons_that_always_fire_together_are_at_one(fired: np.ndarray) -> None:
    twins = np.repeat(fired, 2, axis=1)
    order = np.arange(46, dtype=np.int32)
    assert np.allclose(np.diag(co_activation(twins, order, 23)), 1)


def stored(order: np.ndarray, name: str) -> ContenderBlock:
    frequency = np.zeros(order.size, dtype=np.float32)
    return ContenderBlock(name, order.size, 0.0, 4096, 1, 0, order.astype(np.int32), frequency, None)


def test_pictures_are_of_the_tokens_that_were_chosen(tmp_path: Path) -> None:
    fired = write_clustered_trace(tmp_path / "t")["layers.1"]
    order = np.random.default_rng(5).permutation(60)
    tokens = (TokenRange("source-0", 350, 400), TokenRange("source-1", 650, 700))
    with Trace(tmp_path / "t") as trace:
        found = block_pictures(trace, 1, stored(order, "layers.1"), tokens)
    wanted = np.concatenate([fired[350:400], fired[650:700]])
    assert np.array_equal(found.original, wanted)
    assert np.array_equal(found.stored, wanted[:, order])
    assert (found.raster_tokens, found.pair_tokens, found.slots_per_cell) == (100, 100, 1)


def test_pictures_of_an_expert_leave_out_the_tokens_of_others(tmp_path: Path) -> None:
    write_routed_trace(tmp_path / "t")
    with Trace(tmp_path / "t") as trace:
        block = trace.info.blocks[1]
        tokens = (TokenRange("source", 101, 201),)
        found = block_pictures(trace, 1, stored(np.arange(60), block.id), tokens)
        routed = np.unpackbits(trace.fired(block, 101, 201), axis=1, count=60, bitorder="little")
    assert routed.shape[0] == 50
    assert np.array_equal(found.original, routed)


def test_an_expert_that_saw_no_token_has_a_picture_of_nothing(tmp_path: Path) -> None:
    write_routed_trace(tmp_path / "t")
    with Trace(tmp_path / "t") as trace:
        found = block_pictures(trace, 0, stored(np.arange(60), "e"), (TokenRange("source", 101, 102),))
    assert not found.original.any()
    assert not found.stored_pairs.any()
