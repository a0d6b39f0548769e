from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import bootstrap_ratios
from neuralink_cli.errors import InputError, MismatchError, OptionError
from neuralink_cli.inspection.diff import DiffReport, diff
from neuralink_cli.placement.placement import Placement
from tests.layouts import LayoutFactory
from tests.traces import write_clustered_trace

LINE = DeviceModel("line", 32, 2e-5, 1e9)
FAST = DeviceModel("fast", 32, 1e-6, 1e9)
OPTIONS = ClusterOptions(device=LINE, order="linked", jobs=1)


def slow_cost(fired: np.ndarray, order: np.ndarray, ratio: float) -> float:
    """What a token costs in bundles, slot by slot."""
    slots = np.flatnonzero(fired[order])
    if not slots.size:
        return 0.0
    gaps = np.diff(slots) - 1
    return float(slots.size + ratio + np.minimum(gaps, ratio).sum())


def test_costs_and_their_interval_are_those_of_single_tokens(tmp_path: Path) -> None:
    trace, first, second = tmp_path / "trace", tmp_path / "first", tmp_path / "second"
    fired = write_clustered_trace(trace)
    cluster(trace, first, OPTIONS)
    cluster(trace, second, replace(OPTIONS, order="frequency"))
    report = diff(first, second, trace=trace)
    cost = report.cost
    assert cost is not None
    assert cost.device == "line"
    with Placement(first) as one, Placement(second) as other:
        orders = [{name: block.order for name, block in p.blocks.items()} for p in (one, other)]
    ratio = LINE.operation_in_bundles(4096)
    seconds = np.array(
        [
            [
                sum(4096 * slow_cost(fired[name][token], order[name], ratio) for name in order) / LINE.bytes_per_second
                for part in cost.tokens
                for token in range(part.start, part.stop)
            ]
            for order in orders
        ]
    )
    assert [cost.first_seconds, cost.second_seconds] == pytest.approx(seconds.mean(axis=1))
    # Sequences have 50 tokens, and whole ones are held out.
    sequences = seconds.reshape(2, -1, 50).sum(axis=2)
    (expected,) = bootstrap_ratios([(sequences[0], sequences[1])])
    assert [cost.ratio.value, cost.ratio.low, cost.ratio.high] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    assert set(cost.blocks) == {block.id for block in report.blocks} == set(fired)


def test_what_differs_is_named_and_nothing_else(tmp_path: Path) -> None:
    trace, first, second = tmp_path / "trace", tmp_path / "first", tmp_path / "second"
    write_clustered_trace(trace)
    cluster(trace, first, OPTIONS)
    same = diff(first, first)
    assert (same.same_model, same.same_content, same.differences, same.neighbours_kept) == (True, True, (), 1.0)
    assert same.sequences.first == same.sequences.second == same.sequences.both > 0
    cluster(trace, second, replace(OPTIONS, device=FAST, pin_hot=0.1))
    report = diff(first, second)
    named = {difference.what: (difference.first, difference.second) for difference in report.differences}
    assert named.keys() == {"device.name", "device.operation_seconds", "options.pin_hot", "blocks.pinned"}
    assert named["device.name"] == ("line", "fast")
    assert named["blocks.pinned"] == (dict.fromkeys(same_ids(report), 0), dict.fromkeys(same_ids(report), 6))
    assert report.same_model
    assert not report.same_content
    assert 0 < (report.neighbours_kept or 0) < 1


def same_ids(report: DiffReport) -> list[str]:
    return [block.id for block in report.blocks]


def test_kinds_of_layouts_are_compared_by_what_both_say(layouts: LayoutFactory) -> None:
    bundled, permuted = layouts.bundled(), layouts.permuted()
    for other in (permuted.layout, bundled.placement):
        report = diff(bundled.layout, other)
        assert [difference.what for difference in report.differences if difference.what != "options.layout"] == ["kind"]
        assert report.same_model
        assert report.neighbours_kept == 1


def test_traces_are_compared_by_what_they_saw(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_clustered_trace(first, tokens=(400, 300))
    write_clustered_trace(second, tokens=(400,), blocks=2)
    report = diff(first, second)
    assert (report.sequences.first, report.sequences.second, report.sequences.both) == (14, 8, 8)
    assert report.blocks == ()
    assert report.neighbours_kept is None
    named = {difference.what: (difference.first, difference.second) for difference in report.differences}
    assert named == {
        "data source-1.sha256": (f"{1:064x}", None),
        "data source-1.tokens": (300, None),
        "blocks": (["layers.2"], None),
    }


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    trace, placement = tmp_path / "trace", tmp_path / "placement"
    write_clustered_trace(trace)
    cluster(trace, placement, OPTIONS)
    with pytest.raises(MismatchError, match=r"is a trace, but .* is a placement"):
        diff(trace, placement)
    with pytest.raises(OptionError, match="traces have no order"):
        diff(trace, trace, trace=trace)
    device = tmp_path / "device.json"
    device.write_text('{"queue_depth": 1}')
    with pytest.raises(InputError, match="is a device profile, which cannot be compared"):
        diff(placement, device)
