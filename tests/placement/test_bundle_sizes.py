"""Bundle sizes that follow from weight formats: the same in cluster, bench and relayout."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.activations.trace import TraceBlock
from neuralink_cli.bench.bench import BenchOptions, bench_layouts
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from neuralink_cli.errors import OptionError
from neuralink_cli.placement.bundle_sizes import bundle_bytes_of
from neuralink_cli.storage.budget import DramBudget
from tests.checkpoints import tensors_of, write_checkpoint, write_random_trace
from tests.layouts import relayout

GATED = TraceBlock("layers.0", 10, 4096, "silu", 0.0, {"gate": 8192, "up": 8192, "down": 8192})
PLAIN = TraceBlock("layers.0", 10, 64, "relu", 0.0, {"up": 256, "down": 256})


@pytest.mark.parametrize(
    ("block", "weights", "resident", "expected"),
    [
        (GATED, "source", "none", 24_576),
        (GATED, "q8_0", "none", 13_056),
        (GATED, "q4_0", "none", 6_912),
        (GATED, "q4_0", "gate", 4_608),
        (GATED, "gate=q8_0,up=iq4_nl", "none", 4_352 + 2_304 + 8_192),
        (PLAIN, "q4_0", "none", 72),
        (PLAIN, "q8_0", "gate", 68),
    ],
)
def test_sizes(block: TraceBlock, weights: str, resident: str, expected: int) -> None:
    assert bundle_bytes_of(block, weights, resident=resident) == expected


def test_rows_that_blocks_do_not_fill() -> None:
    odd = TraceBlock("layers.7", 10, 48, "relu", 0.0, {"up": 96, "down": 96})
    assert bundle_bytes_of(odd, "source", resident="none") == 192
    with pytest.raises(OptionError, match=r"layers\.7 has rows of 48 weights, q4_0 needs a multiple of 32"):
        bundle_bytes_of(odd, "q4_0", resident="none")


def test_every_stage_has_the_same_sizes(tmp_path: Path) -> None:
    model = write_checkpoint(
        tmp_path / "model", "llama", tensors=tensors_of("llama", hidden=64), config={"hidden_size": 64}
    )
    trace = write_random_trace(model, tmp_path / "trace")
    device = find_device("ufs4.0")
    for weights in ("source", "q4_0"):
        options = ClusterOptions(device, effort="fast", weights=weights)
        header = cluster(trace, tmp_path / weights, options).header
        assert ("weights" in header.parameters) == (weights != "source")
        assert {block.bundle_bytes for block in header.blocks} == {3 * 64 * 4 if weights == "source" else 3 * 36}
    # The weights are random bytes, not all of them finite: only the plan is asked for.
    plan = relayout(model, tmp_path / "source", tmp_path / "layout")
    assert plan.bundled is not None
    assert {block.stride for block in plan.bundled.blocks} == {3 * 64 * 4}
    dram = DramBudget(fraction=0.2)
    by_name = bench_layouts([tmp_path / "source"], trace, BenchOptions(dram=dram, weights=("q4_0",)))
    by_size = bench_layouts([tmp_path / "source"], trace, BenchOptions(dram=dram, bundle_bytes=(108,)))
    assert by_name.rows == by_size.rows
    with pytest.raises(OptionError, match="cannot be combined with --bundle-bytes"):
        cluster(trace, tmp_path / "x", ClusterOptions(device, weights="q4_0", bundle_bytes=5))
