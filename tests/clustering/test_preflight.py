"""What ordering takes, by blocks at a time, tokens and neurons; the whole command is measured elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.clustering import preflight
from neuralink_cli.clustering.preflight import block_bytes, cluster_needs
from neuralink_cli.placement.held_out import split_tokens
from neuralink_cli.placement.planned_size import header_bytes
from tests.traces import write_clustered_trace, write_routed_trace


def test_a_block_takes_its_vectors_and_what_is_made_of_them(tmp_path: Path) -> None:
    write_clustered_trace(tmp_path / "t", blocks=2, neurons=96, tokens=(6400,))
    with Trace(tmp_path / "t") as trace:
        split = split_tokens(trace, 0.0)
        block = trace.info.blocks[0]
        vectors = 96 * 6400 // 8
        found = block_bytes(trace, block, split, 0.0)
        # The vectors, a shuffled and a padded copy of them with 3 rows, and 48 partners of 16 bytes a neuron.
        assert found == 3 * vectors + 3 * 6400 // 8 + 48 * 16 * 96
        assert block_bytes(trace, block, split, 0.1) == found + vectors
        one, two = (cluster_needs(trace, split, 0.0, jobs) for jobs in (1, 2))
        # One thread orders both blocks, one after the other, and keeps holes as large as half of all pairs.
        more = 1.06 * (found - 8 * 96**2 // 4)
        assert more - 2 < two.memory_bytes - one.memory_bytes < more + (1 << 20)
        assert one.disk_bytes == two.disk_bytes == 2 * 12 * 2 * 96 + header_bytes(trace)


def test_an_expert_takes_the_tokens_routed_to_it(tmp_path: Path) -> None:
    write_routed_trace(tmp_path / "t", neurons=64, tokens=12_800)
    with Trace(tmp_path / "t") as trace:
        split = split_tokens(trace, 0.0)
        assert block_bytes(trace, trace.info.blocks[0], split, 0.0) == (3 * 64 + 3) * 6400 // 8 + 48 * 16 * 64


def test_a_thread_keeps_what_it_linked_and_measured_the_block_before_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "resident_bytes", lambda: 0)
    needed = {}
    for blocks in (1, 2):
        write_clustered_trace(tmp_path / str(blocks), blocks=blocks, neurons=96, tokens=(6400, 12_800))
        with Trace(tmp_path / str(blocks)) as trace:
            needed[blocks] = cluster_needs(trace, split_tokens(trace, 0.5), 0.0, 1).memory_bytes
            needed[blocks] -= round(1.06 * preflight._IN_MEMORY * header_bytes(trace))
    # Half the tokens of the larger source: their vectors, and twice their places; and half of all pairs.
    kept = 96 * 6400 // 8 + 2 * 4 * 6400 + 8 * 96**2 // 4
    assert needed[2] - needed[1] == pytest.approx(1.06 * kept, abs=2)
