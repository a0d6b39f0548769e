"""The spool of ordered blocks gives back what it took, in any order, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.clustering.ordered_spool import OrderedSpool
from neuralink_cli.errors import OutputError
from neuralink_cli.ordering.block_ordering import OrderedBlock, SequenceCosts
from neuralink_cli.placement.placement import HeldOutReads, OrderCost, PlacedBlock
from tests.faults import file_size_limit


def ordered(neurons: int, links: int, sequences: int) -> OrderedBlock:
    random = np.random.default_rng(neurons)
    placed = PlacedBlock(
        random.permutation(neurons).astype(np.int32),
        random.random(neurons).astype(np.float32),
        np.arange(links, dtype=np.int32),
    )
    costs = SequenceCosts({name: random.random(sequences) for name in ("original", "linked")}, random.random(sequences))
    held_out = (HeldOutReads("text", neurons, neurons, 3, {"original": OrderCost(1, 2.0)}),)
    return OrderedBlock(placed, "linked", 10 * neurons, 1, held_out, costs)


def test_blocks_come_back_as_they_were_in_the_order_of_the_trace(tmp_path: Path) -> None:
    blocks = {"a": ordered(9, 2, 5), "b": ordered(4, 4, 0), "c": ordered(30, 1, 5)}
    with OrderedSpool(tmp_path / "out", list(blocks)) as spool:
        for index, name in ((2, "c"), (0, "a"), (1, "b")):
            spool.put(index, blocks[name])
        assert list(spool) == ["a", "b", "c"]
        assert len(spool) == 3
        for index, (name, block) in enumerate(blocks.items()):
            kept, found, costs = spool.blocks[index], spool[name], spool.costs(index)
            assert (kept.chosen, kept.tokens, kept.pinned, kept.held_out) == (
                block.chosen,
                block.tokens,
                block.pinned,
                block.held_out,
            )
            for array in ("order", "frequency", "links"):
                assert np.array_equal(getattr(found, array), getattr(block.placed, array))
                assert getattr(found, array).dtype == getattr(block.placed, array).dtype
            assert np.array_equal(costs.naive, block.costs.naive)
            assert list(costs.collapsed) == ["original", "linked"]
            assert all(
                np.array_equal(costs.collapsed[order], block.costs.collapsed[order]) for order in costs.collapsed
            )
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_with_the_folder_that_is_full(tmp_path: Path) -> None:
    def put() -> None:
        with OrderedSpool(tmp_path / "out", ["a"]) as spool:
            spool.put(0, ordered(1000, 3, 5))

    with file_size_limit(1000), pytest.raises(OutputError, match=f"{tmp_path}: the temporary file .*; free some space"):
        put()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"{tmp_path}/nowhere: the temporary file for orders cannot be written"):
        OrderedSpool(tmp_path / "nowhere" / "out", [])
