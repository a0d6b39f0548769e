"""The whole of `cluster`: which order is stored, what is said of it, and that only the input decides."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import networkx
import numpy as np
import pytest

from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.clustering.graph_export import export_graphs
from neuralink_cli.devices.cost import order_cost
from neuralink_cli.devices.device import builtin_devices
from neuralink_cli.errors import InputError, OptionError, OutputError
from neuralink_cli.ordering.orders import ORDER_MAKERS
from neuralink_cli.placement.bits import transpose_bits
from neuralink_cli.placement.gain import block_gains, source_gains, total_gain
from neuralink_cli.placement.placement import ORDER_NAMES, Placement, PlacementHeader
from neuralink_cli.progress import no_progress
from tests.traces import write_clustered_trace, write_routed_trace

OPTIONS = ClusterOptions(device=builtin_devices()["ufs4.0"], effort="fast")


def run(trace: Path, output: Path, **options: Any) -> PlacementHeader:
    return cluster(trace, output, replace(OPTIONS, **options), progress=no_progress).header


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    write_clustered_trace(path)
    return path


def runs_of(fired: np.ndarray) -> int:
    padded = np.pad(fired.astype(np.int8), ((0, 0), (1, 0)))
    return int((np.diff(padded, axis=1) == 1).sum())


def test_every_order_has_a_name_and_a_maker() -> None:
    assert set(ORDER_MAKERS) == set(ORDER_NAMES)


def test_linking_and_refinement_gain_on_tokens_they_never_saw(trace: Path, tmp_path: Path) -> None:
    header = run(trace, tmp_path / "p")
    for gain in [*block_gains(header), *source_gains(header), total_gain(header)]:
        assert gain.orders["linked"].mean_read_length > 1.5 * gain.orders["original"].mean_read_length
        assert gain.orders["linked"].gain > 1.1
        assert gain.orders["original"].gain == 1
    assert [gain.name for gain in source_gains(header)] == ["source-0", "source-1"]


def test_figures_are_those_of_the_held_out_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t"
    fired = write_clustered_trace(path, tokens=(500,))
    header = run(path, tmp_path / "p", held_out=0.2)
    with Placement(tmp_path / "p") as placement:
        for block in header.blocks:
            (part,) = block.held_out
            held_out = fired[block.id][400:]
            assert (part.tokens, part.active) == (100, held_out.sum())
            assert part.orders["original"].reads == runs_of(held_out)
            stored = placement.blocks[block.id].order
            assert part.orders[block.order].reads == runs_of(held_out[:, stored])
            bits = transpose_bits(np.packbits(held_out, axis=1, bitorder="little"), block.neurons)
            assert part.orders[block.order].cost == order_cost(bits, stored, block.operation_in_bundles)
            frequency = placement.blocks[block.id].frequency
            assert np.allclose(frequency, fired[block.id][:400].mean(axis=0)[stored])


@pytest.mark.parametrize("order", ORDER_NAMES)
def test_the_order_asked_for_is_stored_or_the_original(trace: Path, tmp_path: Path, order: str) -> None:
    header = run(trace, tmp_path / "p", order=order)
    for block in header.blocks:
        costs = {
            name: sum(part.orders[name].cost for part in block.held_out)
            for name in ORDER_NAMES
            if name in block.held_out[0].orders
        }
        assert block.order in (order, "original") if order != "refined" else block.order in costs
        assert costs[block.order] <= costs["original"]
        if order == "refined":
            assert costs[block.order] == min(costs.values())


def test_an_order_worse_than_the_original_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_clustered_trace(path, shuffle=False)
    header = run(path, tmp_path / "p", order="frequency")
    chosen = {block.order for block in header.blocks}
    assert "original" in chosen
    with Placement(tmp_path / "p") as placement:
        for block in header.blocks:
            if block.order == "original":
                assert placement.blocks[block.id].order.tolist() == list(range(block.neurons))


def test_pinned_neurons_come_first_in_one_link_and_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "t"
    fired = write_clustered_trace(path, tokens=(500,))
    header = run(path, tmp_path / "p", pin_hot=0.1)
    with Placement(tmp_path / "p") as placement:
        for block in header.blocks:
            placed = placement.blocks[block.id]
            assert block.pinned == 6
            frequency = fired[block.id][:400].mean(axis=0)
            hottest = np.argsort(-frequency, kind="stable")[:6]
            assert placed.order[:6].tolist() == hottest.tolist()
            assert placed.links[:2].tolist() == [0, 6]
            held_out = fired[block.id][400:].copy()
            held_out[:, hottest] = False
            assert block.held_out[0].active == held_out.sum()
            rest = np.setdiff1d(np.arange(block.neurons), hottest)
            assert block.held_out[0].orders["original"].reads == runs_of(held_out[:, rest])
            assert block.held_out[0].orders["linked"].reads < runs_of(held_out)


@pytest.mark.parametrize("order", ["original", "frequency", "linked", "refined"])
def test_pinned_slots_hold_the_hottest_neurons_and_the_gain_is_that_of_the_stored_order(
    tmp_path: Path, order: str
) -> None:
    path = tmp_path / "t"
    fired = write_clustered_trace(path, tokens=(500,))
    header = run(path, tmp_path / "p", pin_hot=0.1, order=order)
    with Placement(tmp_path / "p") as placement:
        for block in header.blocks:
            stored = placement.blocks[block.id].order
            frequency = fired[block.id][:400].mean(axis=0)
            hottest = np.argsort(-frequency, kind="stable")[: block.pinned]
            assert block.pinned == 6
            assert stored[:6].tolist() == hottest.tolist()
            read_from_flash = fired[block.id][400:][:, stored[6:]]
            assert block.held_out[0].orders[block.order].reads == runs_of(read_from_flash)


def test_an_expert_that_keeps_its_order_pins_nothing(tmp_path: Path) -> None:
    header = run(write_routed_trace(tmp_path / "t"), tmp_path / "p", pin_hot=0.1, fewest_tokens=10**6)
    with Placement(tmp_path / "p") as placement:
        for block in header.blocks:
            assert (block.order, block.pinned) == ("original", 0)
            assert placement.blocks[block.id].order.tolist() == list(range(block.neurons))


@pytest.mark.parametrize("jobs", [2, 5])
def test_the_number_of_jobs_does_not_matter(trace: Path, tmp_path: Path, jobs: int) -> None:
    run(trace, tmp_path / "one", jobs=1)
    run(trace, tmp_path / "many", jobs=jobs)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_bundle_size_and_residency_decide_the_price_of_an_operation(trace: Path, tmp_path: Path) -> None:
    device = OPTIONS.device
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("a", {}, 4096),
        ("b", {"resident": "gate"}, 2048),
        ("c", {"bundle_bytes": 24_000}, 24_000),
    ]
    for name, options, size in cases:
        block = run(trace, tmp_path / name, **options).blocks[0]
        assert block.bundle_bytes == size
        assert block.operation_in_bundles == device.operation_in_bundles(size)
        assert block.collapse_gap < block.operation_in_bundles <= block.collapse_gap + 1


def test_nothing_held_out_is_said_not_guessed(trace: Path, tmp_path: Path) -> None:
    header = run(trace, tmp_path / "p", held_out=0.0)
    assert total_gain(header).orders == {}


def test_wrong_options_and_inputs(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not one of"):
        run(trace, tmp_path / "p", order="alphabetical")
    with pytest.raises(OptionError, match="pin-hot"):
        run(trace, tmp_path / "p", pin_hot=1.5)
    with pytest.raises(OptionError, match="held-out"):
        run(trace, tmp_path / "p", held_out=1.0)
    (tmp_path / "there").write_text("x")
    with pytest.raises(OutputError, match="already exists"):
        run(trace, tmp_path / "there")
    damaged = tmp_path / "damaged"
    content = bytearray(trace.read_bytes())
    content[-5000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        run(damaged, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_graphs_have_the_counts_the_shares_and_the_slots_of_all_tokens(tmp_path: Path) -> None:
    fired = write_clustered_trace(tmp_path / "t", tokens=(150, 83))
    run(tmp_path / "t", tmp_path / "p")
    export_graphs(tmp_path / "t", tmp_path / "p", tmp_path / "graphs")
    with Placement(tmp_path / "p") as placement:
        for name, bits in fired.items():
            graph = networkx.read_graphml(tmp_path / "graphs" / f"{name}.graphml", node_type=int)
            counts = bits.T.astype(int) @ bits
            np.fill_diagonal(counts, 0)
            assert {slot: neuron for neuron, slot in graph.nodes(data="slot")} == dict(
                enumerate(placement.blocks[name].order.tolist())
            )
            assert dict(graph.nodes(data="frequency")) == dict(enumerate((bits.sum(axis=0) / 233).tolist()))
            # The eight strongest links of either end.
            strongest = np.argsort(-counts, axis=1, kind="stable")[:, :8]
            pairs = {(min(i, j), max(i, j)) for i, its in enumerate(strongest.tolist()) for j in its if counts[i, j]}
            found = {(min(i, j), max(i, j)): count for i, j, count in graph.edges(data="count")}
            assert found == {(i, j): counts[i, j] for i, j in pairs}


def test_graphs_are_readable_and_name_slots(trace: Path, tmp_path: Path) -> None:
    run(trace, tmp_path / "p")
    export_graphs(trace, tmp_path / "p", tmp_path / "graphs")
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == [f"layers.{k}.graphml" for k in range(3)]
    graph = networkx.read_graphml(tmp_path / "graphs" / "layers.1.graphml", node_type=int)
    assert graph.number_of_nodes() == 60
    assert sorted(slot for _, slot in graph.nodes(data="slot")) == list(range(60))
    assert all(count > 0 for _, _, count in graph.edges(data="count"))
    with pytest.raises(OutputError, match="already exists"):
        export_graphs(trace, tmp_path / "p", tmp_path / "graphs")
    (tmp_path / "graphs" / "layers.0.graphml").write_text("old")
    export_graphs(trace, tmp_path / "p", tmp_path / "graphs", overwrite=True)
    assert networkx.read_graphml(tmp_path / "graphs" / "layers.0.graphml").number_of_nodes() == 60
    (tmp_path / "graphs" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not deleted"):
        export_graphs(trace, tmp_path / "p", tmp_path / "graphs", overwrite=True)


def test_an_interruption_stops_the_other_blocks_too(trace: Path, tmp_path: Path) -> None:
    """As Ctrl-C does, an exception in the main thread ends refinements that would have taken minutes."""
    seen: list[str] = []

    def order_or_stop(*arguments: Any) -> NoReturn:
        between_sweeps = arguments[-1]
        if not seen:
            seen.append("first")
            raise KeyboardInterrupt
        for _ in range(6000):
            time.sleep(0.01)
            between_sweeps()
        raise AssertionError("was never told to stop")

    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuralink_cli.clustering.ordering_work.order_block", order_or_stop)
        with pytest.raises(KeyboardInterrupt):
            run(trace, tmp_path / "p", jobs=2)
    assert time.monotonic() - start < 30
    assert not list(tmp_path.iterdir())


def test_gains_of_what_is_stored_come_with_intervals_and_over_both_baselines(trace: Path, tmp_path: Path) -> None:
    header = run(trace, tmp_path / "p", order="linked")
    total, by_source = total_gain(header), source_gains(header)
    whole = {gain.order: gain for gain in header.gains if gain.source is None}
    assert {"original", "frequency", "linked", "stored"} <= set(whole)
    for name, figures in total.orders.items():
        assert whole[name].gain.value == pytest.approx(figures.gain)
        assert whole[name].gain_over_naive.value == pytest.approx(figures.gain_over_naive)
        assert whole[name].gain.low <= whole[name].gain.value <= whole[name].gain.high
    assert whole["original"].gain.value == 1
    assert whole["original"].gain_over_naive.value > 1
    assert whole["linked"].gain.low < whole["linked"].gain.value < whole["linked"].gain.high
    for source in by_source:
        measured = next(g for g in header.gains if g.source == source.name and g.order == "linked")
        assert measured.gain.value == pytest.approx(source.orders["linked"].gain)
    with Placement(tmp_path / "p") as placement:
        assert placement.info.gains == header.gains
    assert run(trace, tmp_path / "none", held_out=0.0).gains == ()
