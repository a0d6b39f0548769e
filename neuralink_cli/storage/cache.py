"""The DRAM cache in front of a layout: which bundles of a block stay in memory between tokens.

The published linking-aligned admission leaves open how long a run must be, and with what probability it is admitted.
Both were chosen by the modelled I/O time (UFS 4.0, access collapse, a refined order, bundles of 4 and 16 KiB) on
held-out tokens of two datasets: runs of 2, 3, 4, 6, 8 and 16 with probabilities of 0 to 0.5 for DRAM of 5 and 10 % of
the neurons, runs of 2, 3 and 4 for 20, 40 and 60 %. Runs of 2 or more (all but lone neurons) with a probability of 0.1
did best overall: 1 to 5 % less time than plain S3-FIFO in most cases. A probability of 0 is up to 1 % better where DRAM
is scarce, but worse than plain S3-FIFO at 60 %, where neurons that are always part of a run never get in. The longer
the minimum run, the less there is to gain. Admitting neurons that a read brought along changes less than 1 % (they are
part of a run, so few would enter); they are not admitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Neurons
from neuralink_cli.errors import OptionError
from neuralink_cli.storage import cache_kernels, policies
from neuralink_cli.storage.cache_kernels import CacheState, new_state
from neuralink_cli.storage.policies import DEFAULT_POLICY


@dataclass(frozen=True)
class CachePolicy:
    """How a cache decides which neurons to keep.

    Attributes:
        kind: `NONE`, `S3FIFO`, `LRU` or `WINDOW` of `cache_kernels`.
        run_length: Neurons of runs at least this long are admitted at random (S3-FIFO); 0 for none.
        admission: The probability that such a run is admitted.
        take_unwanted: Whether neurons that a read brought along are admitted too (S3-FIFO).
    """

    kind: int
    run_length: int = 0
    admission: float = 1.0
    take_unwanted: bool = False


POLICIES: dict[str, CachePolicy] = {
    policies.LINKED_S3FIFO: CachePolicy(cache_kernels.S3FIFO, run_length=2, admission=0.1),
    policies.S3FIFO: CachePolicy(cache_kernels.S3FIFO),
    policies.LRU: CachePolicy(cache_kernels.LRU),
    policies.WINDOW: CachePolicy(cache_kernels.WINDOW),
    policies.NO_CACHE: CachePolicy(cache_kernels.NONE),
}


def cache_policy(name: str) -> CachePolicy:
    """A policy by name.

    Raises:
        OptionError: No policy has this name.
    """
    if name not in POLICIES:
        raise OptionError(f"cache {name!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[name]


class NeuronCache:
    """Which neurons of one block are in DRAM, and in which row of a pool of bundles. Deterministic; not thread-safe.

    It holds no weights: the caller keeps a pool of `capacity` bundles and copies bundles to the rows that `admit`
    returns. For every token first `look_up` what fires, then read what is missing, then `admit` what was read.

    >>> cache = NeuronCache(neurons=1536, capacity=300, pinned=20)
    >>> rows = cache.look_up(slots)                    # use pool[rows[rows >= 0]] now: `admit` may reuse rows
    >>> rows = cache.admit(read_slots, wanted)         # pool[rows[rows >= 0]] = bundles[rows >= 0]

    Args:
        neurons: Neurons of the block.
        capacity: Bundles that the pool has room for, pinned ones included.
        policy: A key of `POLICIES`.
        pinned: Slots 0 to `pinned` - 1 are in rows 0 to `pinned` - 1 for good; the caller fills those at the start.
        seed: Seed of the random admission of long runs.

    Raises:
        OptionError: An unknown policy, or a pool that does not even hold the pinned neurons.
    """

    def __init__(
        self,
        neurons: int,
        capacity: int,
        *,
        policy: str | CachePolicy = DEFAULT_POLICY,
        pinned: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= pinned <= capacity:
            raise OptionError(f"a cache of {capacity} neurons does not hold the {pinned} pinned ones")
        self.neurons = neurons
        self.capacity = capacity
        self.pinned = pinned
        rules = cache_policy(policy) if isinstance(policy, str) else policy
        self._state = cache_state(rules, neurons, capacity, np.arange(pinned, dtype=np.int32), seed)

    def look_up(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Start a token: find the neurons that it uses.

        Args:
            slots: int32 `[k]`, ascending.

        Returns:
            int32 `[k]`, the pool row of each, or -1. Valid until `admit`, which may give rows to other neurons.
        """
        # Always the same array type: numba would compile again for any other.
        slots = np.ascontiguousarray(slots, dtype=np.int32)
        rows = np.empty(slots.size, dtype=np.int32)
        cache_kernels.look_up(self._state, slots, rows)
        return rows

    def admit(self, slots: npt.NDArray[np.int32], wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Offer the neurons that were read for the token.

        Args:
            slots: int32 `[m]`, ascending, all slots that the reads covered; they show how long runs are.
            wanted: bool `[m]`, False for slots that a read across a gap brought along.

        Returns:
            int32 `[m]`, the row to copy each bundle to, all different; -1 if not admitted or cached already.
        """
        slots = np.ascontiguousarray(slots, dtype=np.int32)
        wanted = np.ascontiguousarray(wanted, dtype=np.bool_)
        rows = np.empty(slots.size, dtype=np.int32)
        cache_kernels.admit(self._state, slots, wanted, rows)
        return rows

    @property
    def looked_up(self) -> int:
        """Neurons asked for so far."""
        return int(self._state.counters[cache_kernels.LOOKED_UP])

    @property
    def hits(self) -> int:
        """How many of them were in DRAM."""
        return int(self._state.counters[cache_kernels.HITS])

    @property
    def hit_rate(self) -> float:
        """Share of the neurons asked for that were in DRAM; 0.0 if none was asked for."""
        return self.hits / self.looked_up if self.looked_up else 0.0

    @property
    def resident(self) -> npt.NDArray[np.int32]:
        """Slots in the cache, ascending, pinned ones included."""
        return np.flatnonzero(self._state.row_of >= 0).astype(np.int32)


def cache_state(policy: CachePolicy, neurons: int, capacity: int, pinned: Neurons, seed: int = 0) -> CacheState:
    """The state of an empty cache; `pinned` are the slots (int32) that rows 0, 1, ... hold for good."""
    return new_state(
        neurons,
        capacity,
        pinned,
        policy.kind,
        run_length=policy.run_length,
        admission=policy.admission,
        take_unwanted=policy.take_unwanted,
        seed=seed,
    )
