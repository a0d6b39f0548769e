from __future__ import annotations

import itertools

import numpy as np
import pytest

from neuralink_cli.inspection.drift import moved_share
from neuralink_cli.inspection.shared_order import neighbours_kept


def pairs(order: np.ndarray) -> set[frozenset[int]]:
    return {frozenset((int(a), int(b))) for a, b in itertools.pairwise(order)}


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_neighbours_kept_are_the_pairs_that_both_orders_have(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(20):
        first, second = (random.permutation(n).astype(np.int32) for _ in range(2))
        assert neighbours_kept(first, second) == len(pairs(first) & pairs(second)) / (n - 1)
        assert neighbours_kept(first, second) == neighbours_kept(second, first)


def test_an_order_keeps_its_own_neighbours_backwards_and_rotated() -> None:
    order = np.random.default_rng(0).permutation(11).astype(np.int32)
    assert neighbours_kept(order, order) == neighbours_kept(order, order[::-1].copy()) == 1
    assert neighbours_kept(order, np.roll(order, 4)) == 9 / 10
    assert neighbours_kept(np.arange(4, dtype=np.int32), np.array([1, 3, 0, 2], dtype=np.int32)) == 0
    assert neighbours_kept(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32)) == 1


def test_moved_firings_are_counted_in_shares() -> None:
    then = np.array([1, 1, 2, 0])
    assert moved_share(then, 3 * then) == 0
    # Half of all firings went from the third neuron to the last one.
    assert moved_share(then, np.array([1, 1, 0, 2])) == 0.5
    assert moved_share(then, np.array([0, 0, 0, 9])) == 1
    assert moved_share(then, np.zeros(4)) == 1
    assert moved_share(np.zeros(4), np.zeros(4)) == 0
