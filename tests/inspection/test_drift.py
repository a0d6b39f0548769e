from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.bench.bench import BenchOptions, bench_layouts
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.errors import InputError, OptionError, VerificationError
from neuralink_cli.inspection.diff import diff
from neuralink_cli.inspection.drift import drift
from neuralink_cli.placement.placement import Placement
from neuralink_cli.storage.budget import DramBudget
from tests.traces import recorded, write_clustered_trace, write_routed_trace

# No table of read sizes and no latency: then bench models what cluster does.
LINE = DeviceModel("line", 32, 2e-5, 1e9)
NO_CACHE = BenchOptions(devices=(LINE,), dram=DramBudget(bytes=0))
Cluster = Callable[..., Path]


@pytest.fixture
def ordered(tmp_path: Path) -> Cluster:
    """Orders a trace of the folder and returns the placement."""

    def make(trace: Path, name: str = "placement", **options: object) -> Path:
        output = tmp_path / name
        made = ClusterOptions(device=LINE, effort="fast", jobs=1)
        cluster(trace, output, replace(made, **options), overwrite=True)  # type: ignore[arg-type]
        return output

    return make


def close(one: Ratio, other: Ratio) -> bool:
    return np.allclose([one.value, one.low, one.high], [other.value, other.low, other.high], rtol=1e-12)


@pytest.mark.parametrize("pinned", [0.0, 0.1])
def test_on_the_trace_that_made_it_an_order_gains_what_it_states(
    tmp_path: Path, ordered: Cluster, pinned: float
) -> None:
    trace = tmp_path / "trace"
    write_clustered_trace(trace)
    report = drift(ordered(trace, pin_hot=pinned), trace)
    assert report.gain_then is not None
    assert report.gain_over_naive_then is not None
    assert close(report.gain, report.gain_then)
    assert close(report.gain_over_naive, report.gain_over_naive_then)
    assert report.change == "holds"
    assert sum(part.tokens for part in report.tokens) + report.left_out == 700
    for block in report.blocks:
        assert block.gain == pytest.approx(block.gain_then)


def test_gains_are_those_of_bench_on_the_same_tokens(tmp_path: Path, ordered: Cluster) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    recorded(0, [[40, 30, 20], [50]], [33, 64], [40]).write(old)
    recorded(1, [[40, 30, 25], [35, 16]], [33, 64], [40]).write(new)
    # The digests of both are numbered from 0, so some of the new sequences count as those that made the order.
    placement = ordered(old)
    report = drift(placement, new)
    assert 0 < report.left_out < 146
    bench = bench_layouts([placement], new, NO_CACHE)
    assert report.tokens == bench.tokens
    (row,) = [row for row in bench.rows if row.way.layout is not None and row.way.collapse]
    assert close(report.gain, row.gain)
    assert close(report.gain_over_naive, row.gain_over_naive)


def test_active_shares_are_counts(tmp_path: Path, ordered: Cluster) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_clustered_trace(old)
    fresh = recorded(5, [[30, 30, 30]], [60, 60, 60], [])
    digests = fresh.digests.copy()
    digests[:] ^= 1
    model = {"fingerprint": "ab" * 32, "model_type": "opt", "architecture": "opt"}
    replace(fresh, digests=digests, header=replace(fresh.header, model=model)).write(new)
    report = drift(ordered(old), new)
    assert report.left_out == 0
    fired = [fresh.fired[block.id] for block in report.blocks]
    assert [block.active_ratio for block in report.blocks] == pytest.approx([bits.mean() for bits in fired])
    assert report.active_ratio == pytest.approx(np.mean([bits.mean() for bits in fired]))
    assert [block.moved for block in report.moved_most] == sorted((b.moved for b in report.blocks), reverse=True)
    # Any neuron fires, in clusters or not: the order is worth nothing there.
    assert report.gain.high < report.gain_then.low  # type: ignore[union-attr]
    assert report.change == "fell"


def test_ordering_again_is_what_cluster_does(tmp_path: Path, ordered: Cluster) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_clustered_trace(old, tokens=(200,))
    write_clustered_trace(new, tokens=(400, 300))
    stale = ordered(old, held_out=0.0)
    report = drift(stale, new, reorder=True, jobs=1)
    assert report.gain_then is None
    assert report.change == "unknown"
    made = report.reordered
    assert made is not None
    fresh = ordered(new, "fresh", held_out=0.2)
    with Placement(fresh) as placement:
        stated = next(gain for gain in placement.info.gains if gain.source is None and gain.order == "stored")
    assert close(made.gain, stated.gain)
    compared = diff(stale, fresh, trace=new).cost
    assert compared is not None
    assert close(compared.ratio, made.saving)
    assert sum(part.tokens for part in compared.tokens) == made.tokens == 100


def test_experts_have_figures_of_the_tokens_routed_to_them(tmp_path: Path, ordered: Cluster) -> None:
    trace = write_routed_trace(tmp_path / "trace")
    report = drift(ordered(trace, fewest_tokens=0), trace)
    assert report.gain_then is not None
    assert close(report.gain, report.gain_then)


def test_the_gate_asks_the_upper_end(tmp_path: Path, ordered: Cluster) -> None:
    trace = tmp_path / "trace"
    write_clustered_trace(trace)
    report = replace(drift(ordered(trace), trace), gain=Ratio(1.5, 1.4, 1.6))
    report.check_gain(None)
    report.check_gain(1.6)
    with pytest.raises(VerificationError, match=r"fallen to 1\.50 \(1\.40 to 1\.60\), reliably below 1\.61"):
        report.check_gain(1.61)


def test_what_cannot_be_measured(tmp_path: Path, ordered: Cluster) -> None:
    trace = tmp_path / "trace"
    write_clustered_trace(trace)
    with pytest.raises(OptionError, match="every token"):
        drift(ordered(trace, held_out=0.0), trace)
    with pytest.raises(InputError, match="is a trace, but only layouts and placements can drift"):
        drift(trace, trace)
    single = tmp_path / "single"
    recorded(0, [[40, 40]], [33], []).write(single)
    placement = ordered(single, held_out=0.5)
    other = recorded(3, [[50]], [33], [])
    replace(other, digests=other.digests ^ np.uint8(1)).write(tmp_path / "one")
    with pytest.raises(OptionError, match="can be held out to measure a new order"):
        drift(placement, tmp_path / "one", reorder=True)
