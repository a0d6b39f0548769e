"""The FFN weights of a running model: an open layout, a cache per block, and what fetching took."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from neuralink_cli.sparse_models.counters import FlashCounters
from neuralink_cli.sparse_models.neuron_store import NeuronStore
from neuralink_cli.sparse_models.settings import RunSettings
from neuralink_cli.storage.budget import split_budget
from neuralink_cli.storage.reader import FlashReader


class FlashWeights:
    """Opens a bundled layout for running. Use as a context manager, or call `close`.

    Attributes:
        reader: The open layout.
        stores: One per block, in order.
        resident_bytes: DRAM of the resident rows and biases, set by the code that loads them, as what follows.
        dense_bytes: DRAM of all weights outside FFN blocks.
        working_bytes: The most that fetching and decoding neurons takes.
        programs_bytes: What the process had taken before it loaded weights.

    Raises:
        InputError, VerificationError: As `FlashReader`.
        OptionError: The DRAM budget is too small, or the cache policy is unknown.
    """

    def __init__(self, directory: Path, settings: RunSettings) -> None:
        self.reader = FlashReader(
            directory, device=settings.device, direct=settings.direct, queue_depth=settings.queue_depth
        )
        self.resident_bytes = self.dense_bytes = self.working_bytes = self.programs_bytes = 0
        try:
            capacities = split_budget(settings.dram, self.reader.blocks)
            self.stores = tuple(
                NeuronStore(self.reader, block, capacity, settings.cache)
                for block, capacity in zip(self.reader.blocks, capacities, strict=True)
            )
            # A throw-away fetch loads the compiled kernels, so that the first token is not charged for it.
            first = NeuronStore(self.reader, self.reader.blocks[0], capacities[0], settings.cache)
            first.fetch(np.zeros(1, dtype=np.int32))
        except BaseException:
            self.reader.close()
            raise

    def __enter__(self) -> FlashWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the layout; harmless when closed already. The model cannot run afterwards."""
        self.reader.close()

    @property
    def counters(self) -> FlashCounters:
        """What has been fetched so far, all blocks together."""
        total = FlashCounters()
        for store in self.stores:
            total += store.counters
        return total

    @property
    def cache_bytes(self) -> int:
        """DRAM of the cached bundles."""
        return sum(store.cache_bytes for store in self.stores)

    @property
    def flash_bytes(self) -> int:
        """Bytes of all bundles in flash."""
        return sum(store.block.bundles.bytes for store in self.stores)
