"""Replays tokens against an order of a block: which reads a runtime would make, and how long a device takes for them.

For each token the neurons that fire are looked up in the cache, the missing ones are cut into reads, and what was read
is offered to the cache. A token's time is the sum of what the device model says for each of its reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Order
from neuralink_cli.bench import replay_kernels
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.placement.placement import inverse
from neuralink_cli.storage.cache import CachePolicy, cache_state


@dataclass(frozen=True, eq=False)
class FiringSlots:
    """The slots that fire at each token, for one order of a block.

    Attributes:
        neurons: Neurons of the block.
        slots: int32, ascending within each token, one token after the other.
        starts: int64 `[tokens + 1]`, where the slots of each token start.
    """

    neurons: int
    slots: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.starts.size - 1

    def of(self, token: int) -> npt.NDArray[np.int32]:
        """The slots that fire at one token."""
        return self.slots[self.starts[token] : self.starts[token + 1]]


def firing_slots(fired: npt.NDArray[np.uint8], order: Order) -> FiringSlots:
    """The slots that fire, from a trace.

    Args:
        fired: uint8 `[tokens, ceil(n / 8)]`, bit j % 8 of byte j // 8 being neuron j.
        order: int32 `[n]`, `order[slot] = neuron`, a permutation.
    """
    fired = np.ascontiguousarray(fired)
    starts = np.empty(fired.shape[0] + 1, dtype=np.int64)
    replay_kernels.count_active(fired, starts)
    slots = np.empty(int(starts[-1]), dtype=np.int32)
    replay_kernels.list_slots(fired, inverse(np.ascontiguousarray(order, dtype=np.int32)), starts, slots)
    return FiringSlots(order.size, slots, starts)


@dataclass(frozen=True, eq=False)
class ReadPrices:
    """What reads of a block cost, and how its missing neurons are cut into reads.

    Attributes:
        seconds: float64 `[n + 1]`, the time of a read of that many bundles.
        apart: Gaps of at least this many slots are not read across.
        search: Whether the cheapest way to cut what lies between such gaps has to be searched for.
        part_bytes: Bytes of a bundle, or of one part if each part lies on its own.
        page_bytes: A read moves whole pages of this size.
        latency: Seconds that a token waits for the block beyond the time of its reads, if there are any.
        fill: float64 `[n + 1]`, seconds that it waits because the queue has to fill, by the bundles of a read.
        queue_reads: Reads of slots that fill the queue.
    """

    seconds: npt.NDArray[np.float64]
    apart: int
    search: bool
    part_bytes: float
    page_bytes: int
    latency: float
    fill: npt.NDArray[np.float64]
    queue_reads: float


# Cached: the search for the gap takes a second for the largest blocks, which are all alike.
@lru_cache(maxsize=64)
def read_prices(device: DeviceModel, neurons: int, bundle_bytes: int, *, parts: int = 1, collapse: bool) -> ReadPrices:
    """The prices of reads on a device.

    Args:
        neurons: Neurons of the block.
        bundle_bytes: Bytes of a bundle.
        parts: Stretches of equal size, far from each other, that the bundle is stored in: 1 if it is bundled.
        collapse: Whether to read across gaps where that is cheaper. If not, every run of slots is a read.
    """
    part_bytes = bundle_bytes / parts
    seconds = device.bundle_read_seconds(np.arange(neurons + 1), part_bytes) * parts
    seconds[0] = 0.0
    apart, search = 1, False
    if collapse and device.reads:
        apart, search = max(int(replay_kernels.never_across(seconds)), 1), True
    elif collapse:
        apart = collapse_gap(device.operation_in_bundles(part_bytes)) + 1
    fill = device.fill_seconds(np.arange(neurons + 1) * part_bytes + device.rounding_bytes(part_bytes))
    queue_reads = device.queue_depth / parts
    return ReadPrices(seconds, apart, search, part_bytes, device.page_bytes, device.latency_seconds, fill, queue_reads)


@dataclass(frozen=True, eq=False)
class TokenFigures:
    """What each token took, over all blocks replayed so far.

    Attributes:
        counts: int64 `[tokens, COLUMNS]` of `replay_kernels`: neurons active and cached; reads of the device; stretches
            of slots that were read, several reads each if bundles are stored in parts; the slots of the longest
            stretch, and of all; pages of one part.
        useful_bytes: int64 `[tokens]`, of the missing neurons.
        read_bytes: int64 `[tokens]`, of the pages that were read.
        seconds: float64 `[tokens]`, time of the reads.
    """

    counts: npt.NDArray[np.int64]
    useful_bytes: npt.NDArray[np.int64]
    read_bytes: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, tokens: int) -> TokenFigures:
        """Nothing replayed yet."""
        zeros = np.zeros(tokens, dtype=np.int64)
        counts = np.zeros((tokens, replay_kernels.COLUMNS), dtype=np.int64)
        return cls(counts, zeros, zeros.copy(), np.zeros(tokens))


@dataclass(frozen=True, eq=False)
class BlockReads:
    """The reads of all tokens of a block: `first` and `count` int32, those of token t before `ends[t]`."""

    first: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]

    def of(self, token: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """First slots and numbers of slots of the reads of one token."""
        start = int(self.ends[token - 1]) if token else 0
        stop = int(self.ends[token])
        return self.first[start:stop], self.count[start:stop]


@dataclass(frozen=True, eq=False)
class BlockCache:
    """The cache in front of a block: its policy, its rows, and the slots (int32) pinned in the first of them."""

    policy: CachePolicy
    capacity: int
    pinned: npt.NDArray[np.int32]


def replay_block(
    firing: FiringSlots,
    prices: ReadPrices,
    cache: BlockCache,
    bundle_bytes: int,
    figures: TokenFigures,
    *,
    parts: int = 1,
    record: bool = False,
) -> BlockReads | None:
    """Replay the tokens of one block and add what they take to `figures`.

    Args:
        bundle_bytes: Bytes of a bundle.
        parts: As for `read_prices`; each read of slots is this many reads of the device.
        record: Whether to return the reads.
    """
    state = cache_state(cache.policy, firing.neurons, cache.capacity, cache.pinned)
    first = np.empty(firing.slots.size if record else 0, dtype=np.int32)
    count = np.empty_like(first)
    ends = np.zeros(firing.tokens, dtype=np.int64)
    counts = np.zeros_like(figures.counts)
    replay_kernels.replay_tokens(
        firing.slots,
        firing.starts,
        state,
        prices.seconds,
        prices.apart,
        prices.search,
        prices.latency,
        prices.fill,
        prices.queue_reads,
        prices.part_bytes,
        prices.page_bytes,
        counts,
        figures.seconds,
        first,
        count,
        ends,
        record,
    )
    missing = counts[:, replay_kernels.ACTIVE] - counts[:, replay_kernels.CACHED]
    figures.useful_bytes[:] += missing * bundle_bytes
    figures.read_bytes[:] += counts[:, replay_kernels.PAGES] * prices.page_bytes * parts
    counts[:, replay_kernels.READS] *= parts
    np.maximum(
        figures.counts[:, replay_kernels.LONGEST],
        counts[:, replay_kernels.LONGEST],
        out=counts[:, replay_kernels.LONGEST],
    )
    figures.counts[:, replay_kernels.LONGEST] = 0
    figures.counts[:] += counts
    return BlockReads(first, count, ends) if record else None
