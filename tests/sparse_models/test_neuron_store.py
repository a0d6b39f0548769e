from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from neuralink_cli.errors import OptionError
from neuralink_cli.layout.bundled_layout import BundledLayout
from neuralink_cli.sparse_models.counters import FlashCounters
from neuralink_cli.sparse_models.neuron_store import NeuronStore
from neuralink_cli.storage.cache import POLICIES
from neuralink_cli.storage.reader import FlashReader
from tests.checkpoints import NEURONS
from tests.layouts import LayoutFactory, Made


@pytest.fixture(scope="module")
def made(layouts: LayoutFactory) -> Made:
    return layouts.bundled("llama", resident="gate")


@pytest.fixture
def reader(made: Made) -> Iterator[FlashReader]:
    with FlashReader(made.layout) as opened:
        yield opened


def bundles_of(made: Made) -> np.ndarray:
    """All bundles of the first block, by slot."""
    with BundledLayout(made.layout) as layout:
        block = layout.index.blocks[0]
        return layout.file.read(block.bundles.tensor).reshape(block.neurons, block.stride)


def some_slots(random: np.random.Generator) -> np.ndarray:
    count = int(random.integers(0, NEURONS + 1))
    return np.sort(random.choice(NEURONS, count, replace=False)).astype(np.int32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [0, 4, 9, NEURONS])
def test_it_gives_the_bundles_whatever_is_cached(made: Made, reader: FlashReader, policy: str, capacity: int) -> None:
    store = NeuronStore(reader, reader.blocks[0], capacity, policy)
    expected, random = bundles_of(made), np.random.default_rng(capacity)
    asked = 0
    for _ in range(60):
        slots = some_slots(random)
        assert np.array_equal(store.fetch(slots), expected[slots])
        asked += slots.size
    counters = store.counters
    assert counters.looked_up == asked
    assert counters.bytes_useful == (asked - counters.hits) * reader.blocks[0].stride
    # Pinned neurons are there whatever the policy.
    assert (counters.hits > 0) == (capacity > 0)
    assert store.cache_bytes == capacity * reader.blocks[0].stride


def test_what_it_gives_is_a_copy(made: Made, reader: FlashReader) -> None:
    store = NeuronStore(reader, reader.blocks[0], NEURONS, "lru")
    slots = np.arange(NEURONS, dtype=np.int32)
    store.fetch(slots)[:] = 0
    store.fetch(slots)[:] = 0
    assert np.array_equal(store.fetch(slots), bundles_of(made))


def test_threads_take_turns(made: Made, reader: FlashReader) -> None:
    store = NeuronStore(reader, reader.blocks[0], 8, "linked-s3fifo")
    expected = bundles_of(made)
    asked = [some_slots(np.random.default_rng(seed)) for seed in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.fetch, asked))
    assert all(np.array_equal(a, expected[slots]) for a, slots in zip(found, asked, strict=True))
    assert store.counters.looked_up == sum(slots.size for slots in asked)


def test_an_unknown_policy(reader: FlashReader) -> None:
    with pytest.raises(OptionError, match="cache 'mru' is not one of linked-s3fifo"):
        NeuronStore(reader, reader.blocks[0], 8, "mru")


def test_counters_add_up() -> None:
    one, two = FlashCounters(10, 4, 2, 4096, 600, 0.5, 0.75), FlashCounters(2, 1, 1, 512, 100, 0.25, 0.25)
    assert one + two == FlashCounters(12, 5, 3, 4608, 700, 0.75, 1.0)
    assert one + two - two == one
    assert one.hit_rate == 0.4
    assert FlashCounters().hit_rate == 0.0
