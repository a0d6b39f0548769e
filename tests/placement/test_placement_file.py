"""Placement files: what is written reads back, and orders that are none are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.checkpoint.origin import Origin
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.errors import InputError
from neuralink_cli.placement.placement import (
    HeldOutReads,
    MeasuredGain,
    OrderCost,
    PlacedBlock,
    Placement,
    PlacementBlock,
    PlacementHeader,
    inverse,
    is_permutation,
    write_placement,
)
from tests.traces import numbered_digests

HEADER = PlacementHeader(
    model={"fingerprint": "a" * 64, "model_type": "opt", "architecture": "opt"},
    origin=Origin("a/model", "1" * 40),
    trace={
        "content_sha256": "b" * 64,
        "sources": [{"name": "x", "revision": None, "sha256": "c" * 64, "tokens": 9}],
    },
    signal="gate",
    calibration={"active_ratio": 0.1, "tokens": 5},
    parameters={"order": "linked"},
    blocks=(
        PlacementBlock(
            "layers.0", 3, "relu", 0.5, 7, "linked", 1, 96, 4.5, 4,
            (HeldOutReads("x", 2, 1, 3, {"original": OrderCost(3, 7.5), "linked": OrderCost(1, 4.0)}),),
        ),
    ),
    gains=(
        MeasuredGain(None, "linked", Ratio(1.5, 1.25, 1.75), Ratio(2.0, 1.5, 2.5)),
        MeasuredGain("x", "stored", Ratio(1.0, 1.0, 1.0), Ratio(3.0, 2.0, 4.0)),
    ),
    coverage={"covered_bytes": 90, "ffn_bytes": 100},
)  # fmt: skip
SEEN = numbered_digests(3)


def placed(order: list[int], frequency: list[float] | None = None) -> PlacedBlock:
    shares = np.linspace(1, 0, len(order)) if frequency is None else np.array(frequency)
    return PlacedBlock(np.array(order, dtype=np.int32), shares.astype(np.float32), np.array([0, 2], dtype=np.int32))


@pytest.mark.parametrize("pinned", [0, 1, 3])
def test_a_placement_reads_back_as_it_was_written(tmp_path: Path, pinned: int) -> None:
    header = replace(HEADER, blocks=(replace(HEADER.blocks[0], pinned=pinned),))
    digest = write_placement(tmp_path / "p", header, {"layers.0": placed([2, 0, 1])}, SEEN)
    with Placement(tmp_path / "p") as placement:
        assert placement.info == header
        assert placement.content_sha256 == digest
        found = placement.blocks["layers.0"]
        assert found.order.tolist() == [2, 0, 1]
        assert found.frequency.tolist() == [1.0, 0.5, 0.0]
        assert found.links.tolist() == [0, 2]
        assert placement.ordering_sequences.tolist() == SEEN.tolist()


@pytest.mark.parametrize(
    ("arrays", "pinned", "complaint"),
    [
        (placed([0, 1, 1]), 0, "order is not a permutation of 3 neurons"),
        (placed([0, 1]), 0, "order is not a permutation of 3 neurons"),
        (placed([0, 1, 2, 3]), 0, "order is not a permutation of 3 neurons"),
        (placed([0, 1, 2], [1.0, 0.5]), 0, r"frequency has shape \[2\]"),
        (placed([0, 1, 2]), 4, r"layers\.0 pins 4 neurons but has only 3"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: PlacedBlock, pinned: int, complaint: str) -> None:
    header = replace(HEADER, blocks=(replace(HEADER.blocks[0], pinned=pinned),))
    write_placement(tmp_path / "p", header, {"layers.0": arrays}, SEEN)
    with pytest.raises(InputError, match=complaint):
        Placement(tmp_path / "p")


@pytest.mark.parametrize("shape", [(2, 15), (2, 17), (16,), (1, 1, 16)])
def test_digests_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    digests = np.zeros(shape, dtype=np.uint8)
    write_placement(tmp_path / "p", HEADER, {"layers.0": placed([2, 0, 1])}, digests)
    with pytest.raises(InputError, match="ordering_sequences has the wrong shape"):
        Placement(tmp_path / "p")


def test_a_trace_may_have_been_ordered_without_any_sequence(tmp_path: Path) -> None:
    write_placement(tmp_path / "p", HEADER, {"layers.0": placed([2, 0, 1])}, SEEN[:0])
    with Placement(tmp_path / "p") as placement:
        assert placement.ordering_sequences.shape == (0, 16)


@given(st.lists(st.integers(-2, 7), max_size=7), st.integers(0, 7))
def test_a_permutation_has_each_neuron_once(order: list[int], neurons: int) -> None:
    assert is_permutation(np.array(order, dtype=np.int32), neurons) == (sorted(order) == list(range(neurons)))


def test_numbers_beyond_the_block_are_refused_before_they_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("counts up to the largest number")

    monkeypatch.setattr(np, "bincount", fail)
    assert not is_permutation(np.array([0, 2**31 - 1], dtype=np.int32), 2)
    assert not is_permutation(np.array([0, -1], dtype=np.int32), 2)


@given(st.permutations(range(9)))
def test_the_inverse_leads_back(order: list[int]) -> None:
    slots = inverse(np.array(order, dtype=np.int32))
    assert slots.dtype == np.int32
    assert [order[slot] for slot in slots] == list(range(9))
