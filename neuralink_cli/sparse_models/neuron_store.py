"""Fetches the bundles of one block: from DRAM if cached, else from flash."""

from __future__ import annotations

import threading
import time

import numpy as np

from neuralink_cli.arrays import Bytes, Slots
from neuralink_cli.layout.plan import FlashBlock
from neuralink_cli.sparse_models.counters import FlashCounters
from neuralink_cli.storage.cache import NeuronCache
from neuralink_cli.storage.reader import BundleReads, FlashReader


class NeuronStore:
    """Fetches bundles of a block through a cache. Any number of threads may use it; they take turns.

    Args:
        capacity: Bytes to keep in DRAM, pinned ones included; 0 for no cache, not even of pinned neurons.
        policy: One of `neuralink_cli.storage.policies.POLICY_NAMES`.
    """

    def __init__(self, reader: FlashReader, block: FlashBlock, capacity: int, policy: str) -> None:
        self.block = block
        pinned = block.pinned if capacity else 0
        self._reader = reader
        self._lock = threading.Lock()
        self._cache = NeuronCache(block.neurons, capacity, policy=policy, pinned=pinned)
        self._pool = np.empty((capacity, block.stride), dtype=np.uint8)
        # Memory that is not there is better missed now than while tokens are computed.
        self._pool.fill(0)
        self._counters = FlashCounters()
        if pinned:
            reads = reader.read_bundles(block, np.arange(pinned, dtype=np.int32))
            self._pool[:pinned] = reads.bundles[reads.wanted]

    @property
    def cache_bytes(self) -> int:
        """DRAM that the cached bundles take."""
        return self._pool.nbytes

    @property
    def counters(self) -> FlashCounters:
        """What has been fetched so far; loading the pinned neurons is not counted."""
        with self._lock:
            return self._counters

    def fetch(self, slots: Slots) -> Bytes:
        """The bundles of the neurons in some slots.

        Args:
            slots: int32 `[k]`, ascending, each once.

        Returns:
            uint8 `[k, stride]`, a copy.

        Raises:
            InputError: The file was truncated while open, or the device fails.
        """
        with self._lock:
            started = time.perf_counter()
            rows = self._cache.look_up(slots)
            cached = rows >= 0
            bundles = np.empty((slots.size, self.block.stride), dtype=np.uint8)
            # Before `admit`, which may reuse rows of the pool.
            bundles[cached] = self._pool[rows[cached]]
            missing = slots[~cached]
            counted = FlashCounters(looked_up=slots.size, hits=slots.size - missing.size)
            if missing.size:
                reads = self._reader.read_bundles(self.block, missing)
                bundles[~cached] = reads.bundles[reads.wanted]
                self._keep(reads)
                counted += FlashCounters(
                    reads=reads.reads,
                    bytes_read=reads.bytes_read,
                    bytes_useful=reads.bytes_useful,
                    io_seconds=reads.seconds,
                )
            counted += FlashCounters(fetch_seconds=time.perf_counter() - started)
            self._counters += counted
            return bundles

    def _keep(self, reads: BundleReads) -> None:
        wanted = np.zeros(reads.slots.size, dtype=np.bool_)
        wanted[reads.wanted] = True
        rows = self._cache.admit(reads.slots, wanted)
        kept = rows >= 0
        self._pool[rows[kept]] = reads.bundles[kept]
