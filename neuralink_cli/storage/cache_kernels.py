"""The compiled part of the neuron cache: which neurons of a block stay in DRAM, under several policies.

All state is in the arrays of a `CacheState`, so that a whole replay can run as one kernel. Slots identify neurons.

- S3-FIFO (Yang et al., SOSP '23): new neurons enter a small queue of a tenth of the capacity. At its end, neurons used
  at least twice move to the main queue; the others are evicted and remembered in a ghost queue of ids. A neuron that
  comes back while remembered enters the main queue at once. At the end of the main queue, each counted use (at most 3)
  buys another round.
- Linking-aligned S3-FIFO: the same, but neurons of long runs enter with lower probability: reading them again is
  cheap, and a run with holes is read in pieces. A hash decides once for the whole run.
- LRU: evicts the least recently used neuron.
- Window: keeps the neurons of the last k tokens, with k as large as fits at the moment; all neurons last used at the
  oldest token are evicted together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Neurons
from neuralink_cli.kernels import inlined_kernel, kernel

NONE, S3FIFO, LRU, WINDOW = range(4)
ABSENT = -1

# Elements of `CacheState.counters`.
POLICY = 0
PINNED = 1
SMALL_TARGET = 2
SMALL_HEAD = 3
SMALL_SIZE = 4
MAIN_HEAD = 5
MAIN_SIZE = 6
GHOST_CLOCK = 7
GHOST_SIZE = 8
FREE = 9
TOKEN = 10
LOOKED_UP = 11
HITS = 12
RUN_LENGTH = 13
ADMIT_BELOW = 14
TAKE_UNWANTED = 15
SEED = 16
COUNTERS = 17

MAX_FREQUENCY = 3
# Uses in the small queue that earn a place in the main queue.
PROMOTED_FROM = 2


class CacheState(NamedTuple):
    """State of the cache of one block of n neurons, c of which can be cached besides the pinned ones.

    Attributes:
        row_of: int32 `[n]`, the row of the pool that holds a slot's bundle, or -1.
        frequency: uint8 `[n]`, uses since admission, at most 3 (S3-FIFO).
        stamp: int64 `[n]`, how many ghosts there were when the slot became one (S3-FIFO); the token of its last use
            (LRU, window).
        small: int32 `[c]`, ring of the small queue.
        main: int32 `[c]`, ring of the main queue.
        newer: int32 `[n + 1]`, the slot used next after this one; element n is the list's head (LRU, window).
        older: int32 `[n + 1]`, the slot used just before this one.
        free: int32 `[c]`, stack of unused rows.
        counters: int64 `[COUNTERS]`, see the constants of this module.
    """

    row_of: Neurons
    frequency: npt.NDArray[np.uint8]
    stamp: npt.NDArray[np.int64]
    small: Neurons
    main: Neurons
    newer: Neurons
    older: Neurons
    free: Neurons
    counters: npt.NDArray[np.int64]


def new_state(
    neurons: int,
    rows: int,
    pinned: Neurons,
    policy: int,
    *,
    run_length: int,
    admission: float,
    take_unwanted: bool,
    seed: int,
) -> CacheState:
    """An empty cache.

    Args:
        rows: Rows of the pool, including those of pinned neurons.
        pinned: int32, slots that always live in rows 0, 1, ...
        policy: `NONE`, `S3FIFO`, `LRU` or `WINDOW`.
        run_length: Runs at least this long are admitted at random; 0 for none.
        admission: The probability that such a run is admitted.
        take_unwanted: Whether neurons that a read brought along are admitted too (S3-FIFO).
        seed: Seed of the random admission.
    """
    evictable = rows - pinned.size
    counters = np.zeros(COUNTERS, dtype=np.int64)
    counters[POLICY] = policy
    counters[PINNED] = pinned.size
    counters[SMALL_TARGET] = max(evictable // 10, 1)
    counters[GHOST_SIZE] = evictable - evictable // 10
    counters[FREE] = evictable
    counters[RUN_LENGTH] = run_length
    counters[ADMIT_BELOW] = round(admission * 2**32)
    counters[TAKE_UNWANTED] = take_unwanted
    counters[SEED] = seed
    row_of = np.full(neurons, ABSENT, dtype=np.int32)
    row_of[pinned] = np.arange(pinned.size, dtype=np.int32)
    recency = neurons + 1 if policy in (LRU, WINDOW) else 0
    ring = evictable if policy == S3FIFO else 0
    return CacheState(
        row_of=row_of,
        frequency=np.zeros(neurons, dtype=np.uint8),
        # No ghost: further back than any ghost queue reaches.
        stamp=np.full(neurons, -rows - 1, dtype=np.int64),
        small=np.zeros(ring, dtype=np.int32),
        main=np.zeros(ring, dtype=np.int32),
        newer=np.full(recency, neurons, dtype=np.int32),
        older=np.full(recency, neurons, dtype=np.int32),
        # The stack gives out low rows first.
        free=np.arange(rows - 1, pinned.size - 1, -1, dtype=np.int32),
        counters=counters,
    )


@kernel
def look_up(state: CacheState, slots: Neurons, rows: Neurons) -> None:
    """Start a token: the row of each slot it uses goes to `rows`, or -1."""
    counters = state.counters
    counters[TOKEN] += 1
    counters[LOOKED_UP] += slots.size
    policy, pinned = counters[POLICY], counters[PINNED]
    for k in range(slots.size):
        slot = slots[k]
        row = state.row_of[slot]
        rows[k] = row
        if row < 0:
            continue
        counters[HITS] += 1
        if row < pinned:
            continue
        if policy == S3FIFO:
            if state.frequency[slot] < MAX_FREQUENCY:
                state.frequency[slot] += 1
        else:
            _unlink(state, slot)
            _link_newest(state, slot)


@kernel
def admit(state: CacheState, slots: Neurons, wanted: npt.NDArray[np.bool_], rows: Neurons) -> None:
    """Offer what was read for the token; the row where each slot now lives goes to `rows`, or -1."""
    policy = state.counters[POLICY]
    for k in range(slots.size):
        rows[k] = ABSENT
    if policy == S3FIFO:
        _admit_by_run(state, slots, wanted, rows)
    elif policy == LRU:
        _admit_recent(state, slots, wanted, rows)
    elif policy == WINDOW:
        _admit_token(state, slots, wanted, rows)
    if policy != NONE:
        for k in range(slots.size):
            # A slot admitted early may be evicted again by now, and its row reused.
            if rows[k] >= 0:
                rows[k] = state.row_of[slots[k]]


@kernel
def _admit_by_run(state: CacheState, slots: Neurons, wanted: npt.NDArray[np.bool_], rows: Neurons) -> None:
    counters = state.counters
    if counters[FREE] + counters[SMALL_SIZE] + counters[MAIN_SIZE] == 0:
        return
    start = 0
    while start < slots.size:
        stop = start + 1
        while stop < slots.size and slots[stop] == slots[stop - 1] + 1:
            stop += 1
        length = counters[RUN_LENGTH]
        # While there is room, every neuron is admitted.
        welcome = length == 0 or stop - start < length or counters[FREE] >= stop - start
        if welcome or _chance(state, slots[start]) < counters[ADMIT_BELOW]:
            for k in range(start, stop):
                slot = slots[k]
                if state.row_of[slot] < 0 and (wanted[k] or counters[TAKE_UNWANTED]):
                    _enter(state, slot)
                    rows[k] = 0
        start = stop


@kernel
def _chance(state: CacheState, slot: int) -> int:
    """A number in [0, 2^32) from the token, the slot and the seed: the finaliser of SplitMix64."""
    mixed = np.uint64(state.counters[TOKEN]) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.uint64(slot) * np.uint64(0xD1B54A32D192ED03) + np.uint64(state.counters[SEED])
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32))  # type: ignore[return-value]


@inlined_kernel
def _enter(state: CacheState, slot: int) -> None:
    """Admit a slot to the small queue, or to the main queue if it is remembered as a ghost."""
    counters = state.counters
    if counters[FREE] == 0 and (counters[SMALL_SIZE] < counters[SMALL_TARGET] or not _leave_small(state)):
        _leave_main(state)
    counters[FREE] -= 1
    state.row_of[slot] = state.free[counters[FREE]]
    state.frequency[slot] = 0
    if counters[GHOST_CLOCK] - state.stamp[slot] <= counters[GHOST_SIZE]:
        _append(state.main, counters, MAIN_HEAD, slot)
    else:
        _append(state.small, counters, SMALL_HEAD, slot)


@inlined_kernel
def _leave_small(state: CacheState) -> bool:
    """Evict the first slot of the small queue that was not used enough; move slots before it to the main queue."""
    counters = state.counters
    while counters[SMALL_SIZE] > 0:
        slot = _take(state.small, counters, SMALL_HEAD)
        if state.frequency[slot] < PROMOTED_FROM:
            state.stamp[slot] = counters[GHOST_CLOCK]
            counters[GHOST_CLOCK] += 1
            _release(state, slot)
            return True
        state.frequency[slot] = 0
        _append(state.main, counters, MAIN_HEAD, slot)
    return False


@kernel
def _leave_main(state: CacheState) -> None:
    """Evict the first slot of the main queue that was not used since it entered or got its last chance."""
    counters = state.counters
    while True:
        slot = _take(state.main, counters, MAIN_HEAD)
        if state.frequency[slot] == 0:
            state.stamp[slot] = -counters[GHOST_SIZE] - 1
            _release(state, slot)
            return
        state.frequency[slot] -= 1
        _append(state.main, counters, MAIN_HEAD, slot)


@inlined_kernel
def _append(ring: Neurons, counters: npt.NDArray[np.int64], head: int, slot: int) -> None:
    place = counters[head] + counters[head + 1]
    ring[place if place < ring.size else place - ring.size] = slot
    counters[head + 1] += 1


@inlined_kernel
def _take(ring: Neurons, counters: npt.NDArray[np.int64], head: int) -> int:
    slot: int = ring[counters[head]]
    counters[head] = counters[head] + 1 if counters[head] + 1 < ring.size else 0
    counters[head + 1] -= 1
    return slot


@inlined_kernel
def _release(state: CacheState, slot: int) -> None:
    """Free the row of a slot."""
    state.free[state.counters[FREE]] = state.row_of[slot]
    state.counters[FREE] += 1
    state.row_of[slot] = ABSENT


@kernel
def _admit_recent(state: CacheState, slots: Neurons, wanted: npt.NDArray[np.bool_], rows: Neurons) -> None:
    head = state.row_of.size
    for k in range(slots.size):
        slot = slots[k]
        if not wanted[k] or state.row_of[slot] >= 0:
            continue
        if state.counters[FREE] == 0:
            oldest = state.newer[head]
            if oldest == head:
                return
            _unlink(state, oldest)
            _release(state, oldest)
        _settle(state, slot)
        rows[k] = 0


@kernel
def _admit_token(state: CacheState, slots: Neurons, wanted: npt.NDArray[np.bool_], rows: Neurons) -> None:
    head = state.row_of.size
    counters = state.counters
    needed = 0
    for k in range(slots.size):
        if wanted[k] and state.row_of[slots[k]] < 0:
            needed += 1
    while counters[FREE] < needed and state.newer[head] != head:
        token = state.stamp[state.newer[head]]
        if token == counters[TOKEN]:
            break
        while state.newer[head] != head and state.stamp[state.newer[head]] == token:
            oldest = state.newer[head]
            _unlink(state, oldest)
            _release(state, oldest)
    for k in range(slots.size):
        if counters[FREE] == 0:
            return
        if wanted[k] and state.row_of[slots[k]] < 0:
            _settle(state, slots[k])
            rows[k] = 0


@kernel
def _settle(state: CacheState, slot: int) -> None:
    """Give a slot a free row, as the one used last."""
    state.counters[FREE] -= 1
    state.row_of[slot] = state.free[state.counters[FREE]]
    _link_newest(state, slot)


@kernel
def _link_newest(state: CacheState, slot: int) -> None:
    head = state.row_of.size
    newest = state.older[head]
    state.older[slot] = newest
    state.newer[slot] = head
    state.newer[newest] = slot
    state.older[head] = slot
    state.stamp[slot] = state.counters[TOKEN]


@kernel
def _unlink(state: CacheState, slot: int) -> None:
    before, after = state.older[slot], state.newer[slot]
    state.newer[before] = after
    state.older[after] = before
