"""Reads that fetch a set of slots, against ways of planning that try everything."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel, ReadRate, builtin_devices
from neuralink_cli.storage.read_planning import ReadPlan, plan_cheapest, plan_with_gap

slot_sets = st.sets(st.integers(0, 60), max_size=11).map(sorted)


@st.composite
def devices(draw: st.DrawFn) -> DeviceModel:
    """Devices with a table of any shape whose larger reads do not take less time."""
    steps = draw(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 40)), min_size=2, max_size=6))
    sizes = list(itertools.accumulate(size for size, _ in steps))
    seconds = list(itertools.accumulate((step for _, step in steps), initial=draw(st.integers(1, 40))))[1:]
    reads = [ReadRate(size, size / (1e-6 * took)) for size, took in zip(sizes, seconds, strict=True)]
    page_bytes = draw(st.sampled_from([1, 512, 4096]))
    return DeviceModel("any", 8, 1e-5, draw(st.sampled_from([1e7, 1e8, 1e9])), tuple(reads), page_bytes)


def seconds_of(plan: ReadPlan, stride: int, device: DeviceModel) -> float:
    return float(device.bundle_read_seconds(plan.count, stride).sum())


def covered(plan: ReadPlan) -> list[int]:
    return [slot for first, count in zip(plan.first, plan.count, strict=True) for slot in range(first, first + count)]


def least_seconds(slots: list[int], stride: int, device: DeviceModel) -> float:
    """The cheapest of all ways to cut the slots into reads."""
    best = np.inf
    for cuts in itertools.product([False, True], repeat=len(slots) - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(slots)]
        spans = [slots[stop - 1] - slots[start] + 1 for start, stop in itertools.pairwise(edges)]
        best = min(best, float(device.bundle_read_seconds(np.array(spans), stride).sum()))
    return best


def quadratic_seconds(slots: npt.NDArray[np.int64], stride: int, device: DeviceModel) -> float:
    """The same for many slots."""
    cost = device.bundle_read_seconds(np.arange(slots[-1] - slots[0] + 2), stride)
    best = np.zeros(slots.size + 1)
    for j in range(slots.size):
        best[j + 1] = (best[: j + 1] + cost[slots[j] - slots[: j + 1] + 1]).min()
    return float(best[-1])


@given(slots=slot_sets)
def test_runs_are_the_maximal_runs(slots: list[int]) -> None:
    plan = plan_with_gap(slots, 0)
    assert covered(plan) == slots
    assert (np.diff(plan.first) > plan.count[:-1]).all()
    assert plan.first.dtype == plan.count.dtype == np.int32
    assert plan.rows == len(slots)
    assert plan.reads == len(plan.first)


@given(slots=slot_sets, gap=st.integers(0, 8))
def test_gaps_are_read_across_up_to_the_limit(slots: list[int], gap: int) -> None:
    plan = plan_with_gap(slots, gap)
    expected = set(slots)
    for left, right in itertools.pairwise(slots):
        if right - left - 1 <= gap:
            expected |= set(range(left, right))
    assert covered(plan) == sorted(expected)
    assert plan.reads == sum(slot - 1 not in expected for slot in expected)


@given(slots=slot_sets.filter(bool), device=devices(), stride=st.integers(1, 2000))
def test_no_way_to_cut_the_slots_is_cheaper(slots: list[int], device: DeviceModel, stride: int) -> None:
    plan = plan_cheapest(slots, stride, device)
    assert set(slots) <= set(covered(plan))
    assert (plan.first[1:] >= plan.first[:-1] + plan.count[:-1]).all()
    assert seconds_of(plan, stride, device) == pytest.approx(least_seconds(slots, stride, device), rel=1e-12)


@given(seed=st.integers(0, 1000), device=devices(), stride=st.integers(1, 300), share=st.floats(0.02, 0.95))
def test_no_way_to_cut_many_slots_is_cheaper(seed: int, device: DeviceModel, stride: int, share: float) -> None:
    slots = np.flatnonzero(np.random.default_rng(seed).random(500) < share)
    if slots.size:
        plan = plan_cheapest(slots, stride, device)
        assert np.isin(slots, covered(plan)).all()
        assert seconds_of(plan, stride, device) == pytest.approx(quadratic_seconds(slots, stride, device), rel=1e-12)


@pytest.mark.parametrize("name", list(builtin_devices()))
@pytest.mark.parametrize("stride", [4096, 24576])
@pytest.mark.parametrize("share", [0.03, 0.25, 0.6])
def test_plans_for_the_built_in_devices_are_the_cheapest(name: str, stride: int, share: float) -> None:
    device = builtin_devices()[name]
    random = np.random.default_rng(0)
    slots = np.flatnonzero(random.random(3000) < share * (1 + np.sin(np.arange(3000) / 50)))
    plan = plan_cheapest(slots, stride, device)
    assert seconds_of(plan, stride, device) == pytest.approx(quadratic_seconds(slots, stride, device), rel=1e-12)


@given(slots=slot_sets, stride=st.sampled_from([1024, 4096, 8192, 24576]))
def test_without_a_table_the_gap_decides(slots: list[int], stride: int) -> None:
    device = builtin_devices()["ufs4.0"]
    plan = plan_cheapest(slots, stride, device)
    expected = plan_with_gap(slots, collapse_gap(device.operation_in_bundles(stride)))
    assert np.array_equal(plan.first, expected.first)
    assert np.array_equal(plan.count, expected.count)


def test_a_table_of_very_many_sizes_is_planned_for_exactly() -> None:
    random = np.random.default_rng(3)
    seconds = np.cumsum(random.random(400)) + 5
    rates = tuple(ReadRate(size, size / took) for size, took in zip(range(10, 4010, 10), seconds, strict=True))
    device = DeviceModel("rough", 1, 1.0, 15.0, rates, page_bytes=1)
    slots = np.flatnonzero(random.random(800) < 0.3)
    plan = plan_cheapest(slots, 7, device)
    assert seconds_of(plan, 7, device) == pytest.approx(quadratic_seconds(slots, 7, device), rel=1e-12)


def test_a_read_that_is_slower_than_two_halves_is_cut() -> None:
    # 4 bundles cost 100, 2 cost 10: a device that falls over at some size.
    rates = tuple(ReadRate(size, size / took) for size, took in ((1, 9.0), (2, 10.0), (4, 100.0)))
    plan = plan_cheapest([3, 4, 5, 6], 1, DeviceModel("cliff", 1, 1.0, 1.0, rates, page_bytes=1))
    assert list(plan.count) == [2, 2]


@pytest.mark.parametrize("slots", [[1, 1], [2, 1], [-1, 3], [[1, 2]], [0.5, 1.5]])
def test_slots_that_are_not_ascending_are_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="slots"):
        plan_with_gap(slots, 0)
    with pytest.raises(ValueError, match="slots"):
        plan_cheapest(slots, 4096, builtin_devices()["nvme"])


def test_a_negative_gap_is_refused() -> None:
    with pytest.raises(ValueError, match="gap"):
        plan_with_gap([1], -1)
