"""The compiled part of a replay: all tokens of one block through cache and read planning, in one go."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.kernels import kernel
from neuralink_cli.storage.cache_kernels import NONE, POLICY, CacheState, admit, look_up

# Columns of the counts of a replay.
ACTIVE, CACHED, READS, STRETCHES, LONGEST, READ, PAGES, COLUMNS = range(8)


@kernel
def count_active(fired: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> None:
    """Where the slots of each token start: int64 `[tokens + 1]`, from bits uint8 `[tokens, bytes]`."""
    starts[0] = 0
    for t in range(fired.shape[0]):
        active = 0
        for b in range(fired.shape[1]):
            bits = fired[t, b]
            while bits:
                bits &= bits - np.uint8(1)
                active += 1
        starts[t + 1] = starts[t] + active


@kernel
def list_slots(
    fired: npt.NDArray[np.uint8], slot_of: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], slots: Any
) -> None:
    """The slots that fire at each token, ascending, one token after the other: int32 `[starts[-1]]`."""
    marks = np.zeros(slot_of.size, dtype=np.uint8)
    for t in range(fired.shape[0]):
        for b in range(fired.shape[1]):
            if fired[t, b]:
                for bit in range(8):
                    if fired[t, b] >> bit & 1:
                        marks[slot_of[8 * b + bit]] = 1
        position = starts[t]
        for slot in range(marks.size):
            if marks[slot]:
                slots[position] = slot
                position += 1
                marks[slot] = 0


@kernel
def never_across(seconds: npt.NDArray[np.float64]) -> int:
    """The shortest gap that no cheapest plan reads across, whatever lies on its two sides.

    Args:
        seconds: float64 `[n + 1]`, the time of a read of k bundles, not falling with k.
    """
    n = seconds.size - 1
    # The most time that two reads of m bundles together take.
    dearest = np.zeros(n + 1)
    for m in range(2, n + 1):
        for a in range(1, m // 2 + 1):
            dearest[m] = max(dearest[m], seconds[a] + seconds[m - a])
    gap = 0
    for m in range(2, n + 1):
        while gap <= m - 2 and seconds[m] < dearest[m - gap]:
            gap += 1
    return gap


@kernel
def plan_reads(
    wanted: npt.NDArray[np.int32],
    seconds: npt.NDArray[np.float64],
    apart: int,
    search: bool,
    first: npt.NDArray[np.int32],
    count: npt.NDArray[np.int32],
    best: npt.NDArray[np.float64],
    chosen: npt.NDArray[np.int32],
) -> int:
    """Cut wanted slots into reads, and return how many reads there are.

    Args:
        wanted: int32 `[k]`, ascending.
        seconds: float64, the time of a read of that many bundles.
        apart: Gaps of at least this many slots are not read across.
        search: Whether to find the cheapest way to cut what lies between such gaps, instead of reading it at once.
        first: int32 `[>= k]`, receives the first slot of each read.
        count: int32 `[>= k]`, receives its number of slots.
        best: float64 `[> k]`, for the search.
        chosen: int32 `[>= k]`, for the search.
    """
    reads = 0
    start = 0
    while start < wanted.size:
        stop = start + 1
        while stop < wanted.size and wanted[stop] - wanted[stop - 1] <= apart:
            stop += 1
        if not search:
            first[reads] = wanted[start]
            count[reads] = wanted[stop - 1] - wanted[start] + 1
            reads += 1
        else:
            best[0] = 0.0
            for j in range(start, stop):
                least = np.inf
                for i in range(j, start - 1, -1):
                    cost = best[i - start] + seconds[wanted[j] - wanted[i] + 1]
                    if cost < least:
                        least = cost
                        chosen[j] = i
                best[j - start + 1] = least
            # Walk back to count the reads, and again to write them in order.
            pieces = 0
            j = stop - 1
            while j >= start:
                pieces += 1
                j = chosen[j] - 1
            place = reads + pieces
            reads = place
            j = stop - 1
            while j >= start:
                place -= 1
                first[place] = wanted[chosen[j]]
                count[place] = wanted[j] - wanted[chosen[j]] + 1
                j = chosen[j] - 1
        start = stop
    return reads


@kernel
def replay_tokens(
    slots: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    state: CacheState,
    seconds: npt.NDArray[np.float64],
    apart: int,
    search: bool,
    latency: float,
    fill: npt.NDArray[np.float64],
    queue_reads: float,
    part_bytes: float,
    page_bytes: int,
    counts: npt.NDArray[np.int64],
    times: npt.NDArray[np.float64],
    first: npt.NDArray[np.int32],
    count: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64],
    recording: bool,
) -> None:
    """Replay all tokens of a block, and add what each takes to `counts` and `times`.

    Args:
        slots: int32, the slots that fire, ascending within each token.
        starts: int64 `[tokens + 1]`, where the slots of each token start.
        state: Of the cache in front; changed in place.
        seconds: float64 `[n + 1]`, the time of a read of that many bundles.
        apart: As in `plan_reads`.
        search: As in `plan_reads`.
        latency: Seconds that a token with any reads takes beyond them.
        fill: float64 `[n + 1]`, seconds that it takes because the queue has to fill, by the mean slots of its reads.
        queue_reads: How many reads fill it; fewer take their share of `fill`.
        part_bytes: Bytes of a slot; slot 0 starts with a page.
        page_bytes: Bytes of a page.
        counts: int64 `[tokens, COLUMNS]`; the longest read is the longest over blocks, the others add up.
        times: float64 `[tokens]`, seconds.
        first: int32, as long as `slots` if recording, receives the first slots of all reads.
        count: int32, receives their numbers of slots.
        ends: int64 `[tokens]`, receives where the reads of each token end in them.
        recording: Whether to write these three.
    """
    n = state.row_of.size
    rows = np.empty(n, dtype=np.int32)
    missing = np.empty(n, dtype=np.int32)
    read_first = np.empty(n, dtype=np.int32)
    read_count = np.empty(n, dtype=np.int32)
    best = np.empty(n + 1, dtype=np.float64)
    chosen = np.empty(n, dtype=np.int32)
    covered = np.empty(n, dtype=np.int32)
    wanted = np.empty(n, dtype=np.bool_)
    caching = state.counters[POLICY] != NONE
    recorded = 0
    for t in range(starts.size - 1):
        active = slots[starts[t] : starts[t + 1]]
        look_up(state, active, rows)
        misses = 0
        for k in range(active.size):
            if rows[k] < 0:
                missing[misses] = active[k]
                misses += 1
        reads = plan_reads(missing[:misses], seconds, apart, search, read_first, read_count, best, chosen)
        total = 0
        k = 0
        for r in range(reads):
            length = read_count[r]
            times[t] += seconds[length]
            counts[t, LONGEST] = max(counts[t, LONGEST], length)
            stop = math.ceil((read_first[r] + length) * part_bytes / page_bytes)
            counts[t, PAGES] += stop - math.floor(read_first[r] * part_bytes / page_bytes)
            if caching:
                for slot in range(read_first[r], read_first[r] + length):
                    covered[total] = slot
                    wanted[total] = k < misses and missing[k] == slot
                    if wanted[total]:
                        k += 1
                    total += 1
            else:
                total += length
            if recording:
                first[recorded] = read_first[r]
                count[recorded] = length
                recorded += 1
        if reads:
            # The mean, rounded to the nearest.
            times[t] += latency + fill[(2 * total + reads) // (2 * reads)] * min(reads / queue_reads, 1.0)
        if caching:
            admit(state, covered[:total], wanted[:total], rows)
        counts[t, ACTIVE] += active.size
        counts[t, CACHED] += active.size - misses
        counts[t, READS] += reads
        counts[t, STRETCHES] += reads
        counts[t, READ] += total
        if recording:
            ends[t] = recorded
