"""Ways that read the same are replayed once, and their figures are those of each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuralink_cli.bench import ways
from neuralink_cli.bench.bench import BenchOptions, bench_layouts
from neuralink_cli.bench.replay import replay_block
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from tests.traces import write_clustered_trace

BLOCKS = 2
DEVICE = find_device("ufs4.0")
# Gaps pay between small bundles; with large ones an operation costs less than a bundle.
SMALL, LARGE = 1024, 65536


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ways")
    write_clustered_trace(folder / "trace", blocks=BLOCKS)
    cluster(folder / "trace", folder / "placement", ClusterOptions(DEVICE, order="linked"))
    return folder


def test_ways_that_read_the_same_are_replayed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        replayed.append(arguments)
        return replay_block(*arguments, **options)

    monkeypatch.setattr(ways, "replay_block", counted)
    done: list[int] = []

    def rows(size: int) -> dict[ways.Way, tuple[float, int]]:
        replayed.clear()
        options = BenchOptions(devices=(DEVICE,), bundle_bytes=(size,))
        report = bench_layouts([folder / "placement"], folder / "trace", options)
        done.append(len(replayed))
        return {row.way: (row.figures.io_mean, row.figures.longest_read) for row in report.rows}

    small, large = rows(SMALL), rows(LARGE)
    # Four orders, with access collapse and without, with a cache and without.
    assert len(small) == len(large) == 16
    assert done == [16 * BLOCKS, 8 * BLOCKS]
    assert all(large[way] == large[replace(way, collapse=False)] for way in large)
    assert any(small[way] != small[replace(way, collapse=False)] for way in small)


def test_together_they_take_what_each_takes_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BenchOptions(devices=(DEVICE,), bundle_bytes=(SMALL, LARGE))
    together = bench_layouts([folder / "placement"], folder / "trace", options)
    monkeypatch.setattr(ways, "_alike", lambda tasks, _: [[k] for k in range(len(tasks))])
    assert bench_layouts([folder / "placement"], folder / "trace", options) == together
