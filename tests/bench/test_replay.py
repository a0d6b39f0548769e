"""The replay against a token-by-token oracle, and what the bench makes of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.bench import replay_kernels
from neuralink_cli.bench.bench import BenchOptions, BenchReport, bench_layouts
from neuralink_cli.bench.replay import BlockCache, ReadPrices, TokenFigures, firing_slots, read_prices, replay_block
from neuralink_cli.devices.device import DeviceModel, ReadRate, builtin_devices
from neuralink_cli.errors import VerificationError
from neuralink_cli.progress import no_progress
from neuralink_cli.storage import cache_kernels
from neuralink_cli.storage.budget import DramBudget
from neuralink_cli.storage.cache import POLICIES, CachePolicy, NeuronCache
from neuralink_cli.storage.read_planning import plan_cheapest, plan_with_gap
from tests.checkpoints import write_random_trace
from tests.layouts import LayoutFactory

NEURONS = 60
LINEAR = DeviceModel("linear", 8, 1e-5, 1e9)
MEASURED = DeviceModel(
    "measured", 8, 1e-5, 2e9, (ReadRate(4096, 3e8), ReadRate(16384, 5e8), ReadRate(65536, 1.9e9), ReadRate(2**20, 2e9))
)
NO_SLOTS = np.zeros(0, dtype=np.int32)


def random_bits(tokens: int, *, seed: int = 0, neurons: int = NEURONS) -> npt.NDArray[np.bool_]:
    random = np.random.default_rng(seed)
    chance = random.random(neurons) ** 3
    return random.random((tokens, neurons)) < chance


def pack(fired: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.packbits(fired, axis=1, bitorder="little")


@given(seed=st.integers(0, 50), tokens=st.integers(0, 30), neurons=st.integers(1, 70))
def test_slots_that_fire(seed: int, tokens: int, neurons: int) -> None:
    fired = random_bits(tokens, seed=seed, neurons=neurons)
    order = np.random.default_rng(seed).permutation(neurons).astype(np.int32)
    firing = firing_slots(pack(fired), order)
    assert firing.tokens == tokens
    for token in range(tokens):
        assert firing.of(token).tolist() == np.flatnonzero(fired[token][order]).tolist()


def seconds_of(plan_first: npt.NDArray[np.int32], plan_count: npt.NDArray[np.int32], prices: ReadPrices) -> float:
    return float(prices.seconds[plan_count].sum()) if plan_first.size else 0.0


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("policy", [*POLICIES, "eager"])
@pytest.mark.parametrize("pinned", [0, 5])
def test_a_replay_is_what_a_runtime_would_do(policy: str, pinned: int, collapse: bool) -> None:
    """Token by token with the cache and the planner that a runtime uses."""
    rules = POLICIES.get(policy) or CachePolicy(cache_kernels.S3FIFO, take_unwanted=True)
    fired = random_bits(200, seed=7)
    firing = firing_slots(pack(fired), np.random.default_rng(2).permutation(NEURONS).astype(np.int32))
    capacity, stride = 18, 4096
    prices = read_prices(LINEAR, NEURONS, stride, collapse=collapse)
    figures = TokenFigures.empty(firing.tokens)
    held = BlockCache(rules, capacity, np.arange(pinned, dtype=np.int32))
    reads = replay_block(firing, prices, held, stride, figures, record=True)
    assert reads is not None

    cache = NeuronCache(NEURONS, capacity, policy=rules, pinned=pinned)
    for token in range(firing.tokens):
        active = firing.of(token)
        missing = active[cache.look_up(active) < 0]
        plan = plan_cheapest(missing, stride, LINEAR) if collapse else plan_with_gap(missing, 0)
        first, count = reads.of(token)
        assert (first.tolist(), count.tolist()) == (plan.first.tolist(), plan.count.tolist())
        read = [slot for f, c in zip(first, count, strict=True) for slot in range(f, f + c)]
        cache.admit(np.array(read, dtype=np.int32), np.isin(read, missing))
        expected = LINEAR.read_seconds(count * stride).sum()
        assert figures.seconds[token] == pytest.approx(float(expected), rel=1e-12)
        counts = figures.counts[token]
        assert counts[replay_kernels.ACTIVE] == active.size
        assert counts[replay_kernels.CACHED] == active.size - missing.size
        assert counts[replay_kernels.READS] == counts[replay_kernels.STRETCHES] == count.size
        assert counts[replay_kernels.LONGEST] == max(count, default=0)
        assert figures.useful_bytes[token] == missing.size * stride
        assert figures.read_bytes[token] == len(read) * stride


@pytest.mark.parametrize("device", [MEASURED, *builtin_devices().values()], ids=lambda device: device.name)
@pytest.mark.parametrize("stride", [1000, 4096, 24576])
def test_collapsed_reads_are_the_cheapest_on_every_device(device: DeviceModel, stride: int) -> None:
    firing = firing_slots(pack(random_bits(60, seed=3)), np.arange(NEURONS, dtype=np.int32))
    prices = read_prices(device, NEURONS, stride, collapse=True)
    figures = TokenFigures.empty(firing.tokens)
    replay_block(firing, prices, BlockCache(POLICIES["none"], 0, NO_SLOTS), stride, figures)
    for token in range(firing.tokens):
        plan = plan_cheapest(firing.of(token), stride, device)
        assert figures.seconds[token] == pytest.approx(seconds_of(plan.first, plan.count, prices), rel=1e-12)


@given(steps=st.lists(st.floats(0, 5), min_size=1, max_size=25), start=st.floats(0, 30))
def test_gaps_that_no_cheapest_plan_crosses(steps: list[float], start: float) -> None:
    seconds = np.concatenate([[0.0], start + np.cumsum(steps)])
    n = seconds.size - 1
    gap = int(replay_kernels.never_across(seconds))
    for g in range(n + 1):
        pays = any(
            seconds[a + g + b] < seconds[a] + seconds[b]
            for a, b in itertools.product(range(1, n + 1), repeat=2)
            if a + g + b <= n
        )
        assert not (pays and g >= gap)


def test_unbundled_is_a_read_for_every_part() -> None:
    firing = firing_slots(pack(random_bits(50)), np.arange(NEURONS, dtype=np.int32))
    nothing = BlockCache(POLICIES["none"], 0, NO_SLOTS)
    whole, parts = TokenFigures.empty(50), TokenFigures.empty(50)
    replay_block(firing, read_prices(LINEAR, NEURONS, 8192, collapse=False), nothing, 8192, whole)
    prices = read_prices(LINEAR, NEURONS, 8192, parts=2, collapse=False)
    replay_block(firing, prices, nothing, 8192, parts, parts=2)
    reads = whole.counts[:, replay_kernels.READS]
    assert (parts.counts[:, replay_kernels.READS] == 2 * reads).all()
    assert (parts.read_bytes == whole.read_bytes).all()
    np.testing.assert_allclose(parts.seconds - whole.seconds, reads * LINEAR.operation_seconds)


@pytest.mark.parametrize("stride", [2304, 512, 4096, 6144])
def test_whole_pages_are_read(stride: int) -> None:
    """Against the pages that every read touches, one by one; and in the price, on average over places."""
    firing = firing_slots(
        pack(random_bits(300, seed=5)), np.random.default_rng(1).permutation(NEURONS).astype(np.int32)
    )
    figures = TokenFigures.empty(firing.tokens)
    nothing = BlockCache(POLICIES["none"], 0, NO_SLOTS)
    prices = read_prices(LINEAR, NEURONS, stride, collapse=False)
    reads = replay_block(firing, prices, nothing, stride, figures, record=True)
    assert reads is not None
    for token in range(firing.tokens):
        pages = 0
        for first, count in zip(*reads.of(token), strict=True):
            pages += len({byte // 4096 for byte in range(first * stride, (first + count) * stride, 256)})
        assert figures.read_bytes[token] == 4096 * pages
    # Reads start anywhere, so the average is what the price says of a read.
    starts = np.arange(4096 * 3)
    moved = [-(-(start + 2) * stride // 4096) * 4096 - start * stride // 4096 * 4096 for start in starts]
    assert np.mean(moved) == pytest.approx(2 * stride + LINEAR.rounding_bytes(stride))
    expected = LINEAR.operation_seconds + np.mean(moved) / LINEAR.bytes_per_second
    assert prices.seconds[2] == pytest.approx(expected)


def test_a_token_waits_for_every_block_that_it_reads() -> None:
    late = replace(LINEAR, latency_seconds=1e-3)
    firing = firing_slots(pack(random_bits(100, seed=9)), np.arange(NEURONS, dtype=np.int32))
    nothing = BlockCache(POLICIES["none"], 0, NO_SLOTS)
    soon, after = TokenFigures.empty(100), TokenFigures.empty(100)
    for _ in range(2):
        replay_block(firing, read_prices(LINEAR, NEURONS, 4096, collapse=True), nothing, 4096, soon)
        replay_block(firing, read_prices(late, NEURONS, 4096, collapse=True), nothing, 4096, after)
    waited = 2e-3 * (soon.counts[:, replay_kernels.READS] > 0)
    assert (waited > 0).sum() > 0
    np.testing.assert_allclose(after.seconds - soon.seconds, waited)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_token_waits_until_the_queue_is_full(parts: int) -> None:
    table = (ReadRate(4096, 1e8), ReadRate(40960, 4e8))
    bare = replace(LINEAR, reads=table, queue_depth=8)
    filling = replace(
        bare, reads=tuple(replace(rate, fill_seconds=fill) for rate, fill in zip(table, (1e-3, 4e-3), strict=True))
    )
    firing = firing_slots(pack(random_bits(100, seed=9)), np.arange(NEURONS, dtype=np.int32))
    nothing = BlockCache(POLICIES["none"], 0, NO_SLOTS)
    soon, after = TokenFigures.empty(100), TokenFigures.empty(100)
    for device, figures in ((bare, soon), (filling, after)):
        prices = read_prices(device, NEURONS, 8192, parts=parts, collapse=True)
        replay_block(firing, prices, nothing, 8192, figures, parts=parts)
    reads, slots = soon.counts[:, replay_kernels.STRETCHES], soon.counts[:, replay_kernels.READ]
    assert (soon.counts == after.counts).all()
    expected = []
    for count, total in zip(reads.tolist(), slots.tolist(), strict=True):
        # Bundles and their halves are whole pages.
        size = 0 if not count else int(total / count + 0.5) * 8192 / parts
        expected.append(0.0 if not count else np.interp(size, [4096, 40960], [1e-3, 4e-3]) * min(count * parts / 8, 1))
    assert len(set(expected)) > 3
    np.testing.assert_allclose(after.seconds - soon.seconds, expected, atol=1e-12)


def test_blocks_add_up() -> None:
    figures = TokenFigures.empty(40)
    nothing = BlockCache(POLICIES["none"], 0, NO_SLOTS)
    prices = read_prices(LINEAR, NEURONS, 512, collapse=False)
    longest = []
    for seed in (1, 2):
        firing = firing_slots(pack(random_bits(40, seed=seed)), np.arange(NEURONS, dtype=np.int32))
        reads = replay_block(firing, prices, nothing, 512, figures, record=True)
        assert reads is not None
        longest.append([max(reads.of(token)[1], default=0) for token in range(40)])
    assert figures.counts[:, replay_kernels.LONGEST].tolist() == np.max(longest, axis=0).tolist()
    active = sum(random_bits(40, seed=seed).sum(axis=1) for seed in (1, 2))
    assert (figures.counts[:, replay_kernels.ACTIVE] == active).all()
    assert (figures.useful_bytes == 512 * active).all()


@pytest.fixture(scope="module")
def measured(layouts: LayoutFactory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = layouts.bundled()
    trace = write_random_trace(made.model, tmp_path_factory.mktemp("bench") / "t.safetensors")
    return made.layout, trace


def run(paths: list[Path], trace: Path, **options: Any) -> BenchReport:
    return bench_layouts(paths, trace, BenchOptions(**options), progress=no_progress)


def test_rows_of_a_bench(measured: tuple[Path, Path]) -> None:
    layout, trace = measured
    report = run([layout], trace, devices=(LINEAR,), dram=DramBudget(fraction=0.2))
    assert [(part.start, part.stop) for part in report.tokens] == [(480, 600)]
    ways = [(row.way.name, row.way.collapse, row.way.cache) for row in report.rows]
    names = ["unbundled", "original", "frequency", "linked"]
    assert ways == [(n, c, p) for p in ("none", "linked-s3fifo") for n in names for c in (False, True)]
    by_way = dict(zip(ways, report.rows, strict=True))
    for cache in ("none", "linked-s3fifo"):
        assert by_way["original", False, cache].gain.value == 1.0
        for name in names:
            plain, collapsed = by_way[name, False, cache].figures, by_way[name, True, cache].figures
            assert plain.active == collapsed.active
            if cache == "none":
                assert plain.cached == 0
                assert plain.bytes_read >= 4096 * plain.reads
                assert collapsed.io_mean <= plain.io_mean
            else:
                assert plain.cached > 0
    for row in report.rows:
        figures = row.figures
        assert figures.io_p50 <= figures.io_p95 <= figures.io_p99
        assert figures.bytes_read >= figures.bytes_useful
        same_way = by_way["original", row.way.collapse, row.way.cache].figures.io_mean
        naive = by_way["original", False, row.way.cache].figures.io_mean
        assert row.gain.value == pytest.approx(same_way / figures.io_mean)
        assert row.gain_over_naive.value == pytest.approx(naive / figures.io_mean)
        assert row.gain.low <= row.gain.value <= row.gain.high
        assert row.gain_over_naive.low <= row.gain_over_naive.value <= row.gain_over_naive.high


def test_a_gate_looks_at_the_lower_end_of_the_interval(measured: tuple[Path, Path]) -> None:
    layout, trace = measured
    report = run([layout], trace, devices=(LINEAR,), policy="none", held_out=1.0)
    row = next(row for row in report.rows if row.way.layout and row.way.collapse)
    between = (row.gain.low + row.gain.value) / 2
    assert row.gain.low < between < row.gain.value
    report.check_gain(row.gain.low - 1e-9)
    with pytest.raises(VerificationError, match=r"gain .* is not reliably"):
        report.check_gain(between)
    report.check_gain(None, row.gain_over_naive.low - 1e-9)
    with pytest.raises(VerificationError, match="gain over naive reading"):
        report.check_gain(None, row.gain_over_naive.low + 1e-6)


def test_the_frequency_order_is_that_of_the_stored_frequencies(measured: tuple[Path, Path]) -> None:
    """A layout in frequency order itself would have the same figures: compare with a replay by hand."""
    from neuralink_cli.activations.trace import Trace
    from neuralink_cli.layout.bundled_layout import BundledLayout

    layout, path = measured
    report = run([layout], path, devices=(LINEAR,), policy="none")
    row = next(row for row in report.rows if row.way.name == "frequency" and not row.way.collapse)
    reads = 0
    with BundledLayout(layout) as opened, Trace(path) as trace:
        for block, traced in zip(opened.index.blocks, trace.info.blocks, strict=True):
            stored = opened.file.read(block.frequency.tensor).view("<f4")
            by_neuron = dict(zip(opened.order(block.id).tolist(), stored.tolist(), strict=True))
            order = sorted(by_neuron, key=lambda neuron: (-by_neuron[neuron], neuron))
            fired = np.unpackbits(trace.fired(traced, 480, 600), axis=1, bitorder="little")[:, order]
            reads += int((np.diff(fired, axis=1, prepend=0) == 1).sum())
    assert row.figures.reads == pytest.approx(reads / 120)


def test_a_layout_of_pinned_neurons_needs_dram_for_them(measured: tuple[Path, Path]) -> None:
    from neuralink_cli.errors import OptionError

    layout, trace = measured
    with pytest.raises(OptionError, match=r"10 bytes of DRAM are too few for this layout; allow at least [\d,]+ bytes"):
        run([layout], trace, dram=DramBudget(bytes=10))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_real_reads_stay_in_their_block(parts: int) -> None:
    from neuralink_cli.bench.contenders import ContenderBlock
    from neuralink_cli.bench.real_reads import read_ranges_of

    order = np.arange(10, dtype=np.int32)
    block = ContenderBlock("layers.0", 10, 0.0, 60, parts, 0, order, np.zeros(10, dtype=np.float32), 4096)
    offsets, sizes = read_ranges_of(block, np.array([0, 7], np.int32), np.array([2, 3], np.int32), parts)
    bytes_read = [b for offset, size in zip(offsets, sizes, strict=True) for b in range(offset, offset + size)]
    assert len(set(bytes_read)) == len(bytes_read) == 5 * 60
    assert min(bytes_read) == 4096
    assert max(bytes_read) == 4096 + 10 * 60 - 1
    assert len(offsets) == 2 * parts
