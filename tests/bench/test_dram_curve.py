"""The curve over DRAM says what the bench says, and its runs are those of the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.bench import BenchOptions, bench_layouts
from neuralink_cli.bench.contenders import TokenRange, choose_tokens, first_tokens, read_contender
from neuralink_cli.bench.dram_curve import SHARES, DramCurve, dram_curve
from neuralink_cli.bench.ways import fired_at
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from neuralink_cli.placement.placement import ORIGINAL
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.policies import DEFAULT_POLICY
from tests.traces import write_clustered_trace

DEVICE = find_device("ufs4.0")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("curve") / "trace"
    write_clustered_trace(path)
    return path


def curve_of(trace: Path, placement: Path) -> DramCurve:
    with Trace(trace) as opened:
        contender = read_contender(placement, opened)
        tokens = choose_tokens(opened, [contender], None, None)
        return dram_curve(opened, contender, DEVICE, DEFAULT_POLICY, tokens)


def test_its_points_are_those_of_the_bench(trace: Path, tmp_path: Path) -> None:
    cluster(trace, tmp_path / "p", ClusterOptions(DEVICE, order="linked"))
    curve = curve_of(trace, tmp_path / "p")
    assert [point.share for line in curve.lines for point in line.points] == list(SHARES) * 4
    for share in (0.0, 0.2):
        options = BenchOptions(devices=(DEVICE,), dram=DramBudget(fraction=share))
        rows = bench_layouts([tmp_path / "p"], trace, options).rows
        cached = [row for row in rows if (row.way.cache != "none") == (share > 0)]
        wanted = {(row.way.name, row.way.collapse): (row.figures.io_mean, row.figures.hit_rate) for row in cached}
        for line in curve.lines:
            point = line.points[SHARES.index(share)]
            assert (point.io_mean, point.hit_rate) == wanted[line.order, line.collapse]


def test_runs_hold_every_neuron_that_fires(trace: Path, tmp_path: Path) -> None:
    cluster(trace, tmp_path / "p", ClusterOptions(DEVICE, order="linked"))
    curve = curve_of(trace, tmp_path / "p")
    with Trace(trace) as opened:
        contender = read_contender(tmp_path / "p", opened)
        tokens = choose_tokens(opened, [contender], None, None)
        fired = [
            np.unpackbits(fired_at(opened, k, tokens), axis=1, count=60, bitorder="little").astype(bool)
            for k in range(3)
        ]
    original = [np.arange(60, dtype=np.int32)] * 3
    for runs, orders in ((curve.runs[0], original), (curve.runs[2], [block.order for block in contender.blocks])):
        ordered = [bits[:, order] for bits, order in zip(fired, orders, strict=True)]
        starts = sum(int((bits & ~np.pad(bits, ((0, 0), (1, 0)))[:, :-1]).sum()) for bits in ordered)
        assert int(runs.counts.sum()) == starts
        assert int((runs.counts * np.arange(61)).sum()) == sum(int(bits.sum()) for bits in ordered)
    assert curve.runs[0].order == ORIGINAL


def test_shares_that_do_not_hold_what_is_pinned_are_left_out(trace: Path, tmp_path: Path) -> None:
    cluster(trace, tmp_path / "p", ClusterOptions(DEVICE, order="linked", pin_hot=0.2))
    shares = [point.share for point in curve_of(trace, tmp_path / "p").lines[0].points]
    assert shares == [share for share in SHARES if share == 0 or share >= 0.2]


def test_the_first_tokens_are_of_every_source_in_proportion() -> None:
    tokens = (TokenRange("a", 10, 40), TokenRange("a", 50, 120), TokenRange("b", 200, 250))
    assert first_tokens(tokens, 60) == (
        TokenRange("a", 10, 40),
        TokenRange("a", 50, 60),
        TokenRange("b", 200, 220),
    )
    assert first_tokens(tokens, 1000) == tokens
