"""One block, with tokens of several sources: what its order is made from, and what is measured on the others."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neuralink_cli.activations.trace import Trace
from neuralink_cli.devices.cost import order_cost, token_costs
from neuralink_cli.ordering.baselines import frequency_order
from neuralink_cli.ordering.block_ordering import BlockOptions, block_bits, cost_sequences, order_block
from neuralink_cli.ordering.orders import NeuronOrder, OrderingTask, make_orders, pinned_first
from neuralink_cli.placement.bits import transpose_bits
from neuralink_cli.placement.held_out import split_tokens
from tests.traces import numbered_digests, recorded

sequences_of_sources = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=3)
RATIO = 3.0


def bits_of(fired: NDArray[np.bool_]) -> NDArray[np.uint64]:
    return transpose_bits(np.packbits(fired, axis=1, bitorder="little"), fired.shape[1])


def plain_costs(fired: NDArray[np.bool_]) -> tuple[float, float]:
    """What a token costs with gaps read across where that is cheaper, and without, as the module of costs says it."""
    active = np.flatnonzero(fired)
    gaps = (np.diff(active) - 1).tolist()
    first = RATIO if active.size else 0.0
    return active.size + first + sum(min(gap, RATIO) for gap in gaps), active.size + RATIO * runs_of(fired[None])


def sequences_in(lengths: NDArray[np.uint32], ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end of the sequences that lie in some ranges."""
    ends = np.cumsum(lengths).tolist()
    found = zip([0, *ends[:-1]], ends, strict=True)
    return [(start, stop) for start, stop in found if any(a <= start and stop <= b for a, b in ranges)]


def runs_of(fired: NDArray[np.bool_]) -> int:
    return int((fired & ~np.pad(fired, ((0, 0), (1, 0)))[:, :-1]).sum())


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    sequences_of_sources,
    st.integers(2, 24),
    st.booleans(),
    st.sampled_from(["original", "frequency", "linked", "refined"]),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.3, 0.7]),
    st.integers(0, 30),
    st.integers(1, 12),
)
def test_an_order_comes_from_the_ordering_tokens_of_all_sources_and_is_measured_on_the_others(
    seed: int,
    sequences: list[list[int]],
    neurons: int,
    expert: bool,
    name: str,
    pinned: int,
    fraction: float,
    fewest: int,
    texts: int,
) -> None:
    made = recorded(seed, sequences, [5] if expert else [neurons], [neurons] if expert else [])
    # Few texts: sequences to hold out are of a text that the order sees, and left out.
    made.digests = numbered_digests(texts)[np.arange(len(made.lengths)) % texts]
    pinned = min(pinned, neurons - 1)
    with TemporaryDirectory() as folder:
        made.write(Path(folder) / "t")
        with Trace(Path(folder) / "t") as trace:
            block = trace.info.blocks[-1]
            split = split_tokens(trace, fraction)
            names = [source.name for source in trace.info.sources]
            options = BlockOptions(name, pinned, RATIO, "fast", fewest)
            result = order_block(trace, block, split, names, options)
            fired = made.fired[block.id]
            on = np.isin(np.arange(len(fired)), made.routed.get(block.id, np.arange(len(fired))))
            assert np.array_equal(block_bits(trace, block, split.ordering), bits_of(rows(fired, on, *split.ordering)))

    ordering = rows(fired, on, *split.ordering)
    counts = ordering.sum(axis=0)
    too_few = expert and len(ordering) < fewest
    hot = frequency_order(counts)[: 0 if too_few else pinned]
    rest = np.setdiff1d(np.arange(neurons, dtype=np.int32), hot)
    compared = {"original", "frequency", "linked", name}
    unchanged = NeuronOrder(*[np.arange(rest.size, dtype=np.int32)] * 2)
    parts = make_orders(OrderingTask(bits_of(ordering[:, rest]), RATIO, "fast"), compared)
    whole = {key: pinned_first(hot, rest, unchanged if too_few else order) for key, order in parts.items()}

    assert (result.tokens, result.pinned) == (len(ordering), hot.size)
    assert result.costs.collapsed.keys() == compared
    costs = dict.fromkeys(compared, 0.0)
    sequence = 0
    for part, source, ranges in zip(result.held_out, names, split.held_out, strict=True):
        held = rows(fired, on, *ranges)
        tokens = sum(stop - start for start, stop in ranges)
        assert (part.source, part.tokens, part.routed) == (source, tokens, len(held))
        held[:, hot] = False
        assert part.active == held.sum()
        assert part.orders.keys() == compared
        for key, cost in part.orders.items():
            assert cost.reads == runs_of(held[:, whole[key].order])
            assert cost.cost == order_cost(bits_of(held), whole[key].order, RATIO)
            costs[key] += cost.cost
        for start, stop in sequences_in(made.lengths, ranges):
            held = rows(fired, on, (start, stop))
            held[:, hot] = False
            for key, order in whole.items():
                collapsed = sum(plain_costs(token[order.order])[0] for token in held)
                assert result.costs.collapsed[key][sequence] == pytest.approx(collapsed)
            naive = sum(plain_costs(token[whole["original"].order])[1] for token in held)
            assert result.costs.naive[sequence] == pytest.approx(naive)
            sequence += 1
    assert {cost.shape for cost in (result.costs.naive, *result.costs.collapsed.values())} == {(sequence,)}
    if too_few:
        assert result.chosen == "original"
    else:
        # The one asked for, unless another costs less.
        rivals = [name, "original", "frequency", "linked"] if name == "refined" else [name, "original"]
        assert costs[result.chosen] == min(costs[key] for key in rivals)
        assert result.chosen == name or costs[result.chosen] < costs[name]
    order = whole[result.chosen]
    assert result.placed.order.tolist() == order.order.tolist()
    assert result.placed.links.tolist() == order.links.tolist()
    # Of all tokens of the ordering, those that an expert did not run on too.
    tokens = sum(stop - start for start, stop in split.ordering)
    assert np.array_equal(result.placed.frequency, (counts[order.order] / max(tokens, 1)).astype(np.float32))


def rows(fired: NDArray[np.bool_], on: NDArray[np.bool_], *ranges: tuple[int, int]) -> NDArray[np.bool_]:
    """What fired on those tokens of some ranges that the block ran on."""
    return np.concatenate([fired[:0], *(fired[start:stop][on[start:stop]] for start, stop in ranges)])


@pytest.mark.parametrize("expert", [False, True])
def test_vectors_made_in_stretches_are_those_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: bool
) -> None:
    """However ranges lie to stretches, and though what is left of one goes into the next."""
    made = recorded(3, [[150], [40, 90], [33]], [] if expert else [70], [70] if expert else [])
    made.write(tmp_path / "t")
    ranges = [(0, 131), (140, 141), (141, 270), (300, 313)]
    with Trace(tmp_path / "t") as trace:
        block = trace.info.blocks[0]
        whole = block_bits(trace, block, ranges)
        monkeypatch.setattr("neuralink_cli.ordering.block_ordering.STRETCH", 64)
        assert np.array_equal(block_bits(trace, block, ranges), whole)
        assert block_bits(trace, block, []).shape == (70, 0)
    on = np.isin(np.arange(313), made.routed.get(block.id, np.arange(313)))
    assert np.array_equal(whole, bits_of(rows(made.fired[block.id], on, *ranges)))


def test_few_neurons_take_little_memory_on_many_held_out_tokens(tmp_path: Path) -> None:
    """Nothing but places is there for every token, and the sums are those over all tokens at once."""
    trace = recorded(0, [[70_000, 9, 30_000]], [8], [])
    trace.write(tmp_path / "trace")
    with Trace(tmp_path / "trace") as opened:
        [block], ranges = opened.info.blocks, [(0, 100_009)]
        bits = block_bits(opened, block, ranges)
        orders = {"original": np.arange(8, dtype=np.int32), "linked": np.arange(8, dtype=np.int32)[::-1].copy()}
        cost_sequences(opened, block, ranges, bits, orders, 2.7)
        tracemalloc.start()
        found = cost_sequences(opened, block, ranges, bits, orders, 2.7)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * 4 * 100_009 + 500_000
    sequence = np.repeat(np.arange(3), [70_000, 9, 30_000])
    for name, order in orders.items():
        across, apart = token_costs(bits, order, 2.7, 100_009)
        assert np.array_equal(found.collapsed[name], np.bincount(sequence, across))
        if name == "original":
            assert np.array_equal(found.naive, np.bincount(sequence, apart))
