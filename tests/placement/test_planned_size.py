"""What is announced of a placement's size, beside the files that ordering really makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.clustering.ordered_spool import OrderedSpool
from neuralink_cli.clustering.preflight import disk_bytes
from neuralink_cli.devices.device import default_device
from neuralink_cli.errors import OutputError
from neuralink_cli.placement.held_out import split_tokens
from neuralink_cli.placement.planned_size import placement_bytes, spool_bytes
from tests.traces import write_clustered_trace

OPTIONS = ClusterOptions(default_device(), effort="fast", jobs=1)


def test_a_placement_of_many_small_blocks_and_its_spool_are_as_large_as_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small blocks, such as experts, more is said than there is in arrays."""
    trace, placement = tmp_path / "t", tmp_path / "p"
    write_clustered_trace(trace, blocks=60, neurons=32, tokens=(640, 640))
    ends = []
    put = OrderedSpool.put

    def watched(spool: OrderedSpool, *arguments: Any) -> None:
        put(spool, *arguments)
        ends.append(spool._end)

    monkeypatch.setattr(OrderedSpool, "put", watched)
    cluster(trace, placement, OPTIONS)
    with Trace(trace) as opened:
        planned, spooled = placement_bytes(opened), spool_bytes(opened, split_tokens(opened, OPTIONS.held_out))
    size = placement.stat().st_size
    assert size <= planned <= 1.15 * size
    assert ends[-1] <= spooled <= 1.3 * ends[-1]


def test_a_disk_that_is_a_byte_too_small_is_noticed_before_anything_is_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "t"
    write_clustered_trace(trace, blocks=2, neurons=32, tokens=(640,))
    with Trace(trace) as opened:
        needed = disk_bytes(opened, split_tokens(opened, OPTIONS.held_out))
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr("neuralink_cli.clustering.cluster.order_blocks", pytest.fail)
    with pytest.raises(OutputError, match=f"needs {needed:,} bytes of disk, {free:,} are free"):
        cluster(trace, tmp_path / "p", OPTIONS)
