"""Plans the reads that fetch bundles: neighbours together, and across gaps of unwanted bundles where that pays.

The device model gives the cost of a read by its size. Without a table of measured sizes that is `operation + bytes /
bandwidth`, and a gap is worth reading across exactly if that takes less time than an operation. With a table, the price
of a byte depends on the read it is part of, so no fixed gap is right; dynamic programming then finds the cheapest way
to cut the wanted slots into reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Slots
from neuralink_cli.devices.cost import collapse_gap
from neuralink_cli.devices.device import DeviceModel
from neuralink_cli.kernels import kernel

# Into how many stages the lengths of reads are divided, so that a table of very many sizes takes little memory.
_MOST_STAGES = 32


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """Reads of one block, ascending and disjoint: read k brings the slots `first[k]` to `first[k] + count[k] - 1`.

    Both are int32 `[reads]`.
    """

    first: Slots
    count: Slots

    @property
    def reads(self) -> int:
        """Number of reads."""
        return len(self.first)

    @property
    def rows(self) -> int:
        """Number of bundles they bring."""
        return int(self.count.sum(dtype=np.int64))


def plan_with_gap(slots: npt.ArrayLike, gap: int) -> ReadPlan:
    """Reads that go across every gap of at most `gap` unwanted slots.

    Args:
        slots: Integers `[k]`, ascending, each once.
        gap: Slots, >= 0.

    Raises:
        ValueError: The slots are not ascending or negative, or `gap` is.
    """
    wanted = as_slots(slots)
    if gap < 0:
        raise ValueError(f"the gap must be at least 0 slots, not {gap}")
    return _cut(wanted, np.diff(wanted) > gap + 1)


def plan_cheapest(slots: npt.ArrayLike, stride: int, device: DeviceModel) -> ReadPlan:
    """The reads that take the least time on a device model. Exact: no other way to cut the slots is faster.

    Args:
        slots: Integers `[k]`, ascending, each once.
        stride: Bytes of a bundle.

    Raises:
        ValueError: The slots are not ascending or negative.
    """
    wanted = as_slots(slots)
    if not device.reads:
        return plan_with_gap(wanted, collapse_gap(device.operation_in_bundles(stride)))
    if not wanted.size:
        return plan_with_gap(wanted, 0)
    # Rounded up, so that a block's plans share few tables.
    longest = 1 << int(wanted[-1] - wanted[0]).bit_length()
    prices = _price_list(device, stride, longest)
    starts = np.empty(wanted.size, dtype=np.int32)
    _cheapest_starts(wanted, prices.seconds, prices.stage, prices.most, prices.least, starts)
    return _cut(wanted, starts[1:] != starts[:-1])


def as_slots(slots: npt.ArrayLike) -> Slots:
    """Slots as contiguous int32.

    Raises:
        ValueError: They are not one-dimensional, not ascending, or negative.
    """
    given = np.asarray(slots)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"slots must be whole numbers, not {given.dtype}")
    wanted = np.ascontiguousarray(given, dtype=np.int32)
    if wanted.ndim != 1 or (wanted.size and wanted[0] < 0) or not (wanted[1:] > wanted[:-1]).all():
        raise ValueError("slots must be ascending, each once, and not negative")
    return wanted


def _cut(wanted: Slots, before: npt.NDArray[np.bool_]) -> ReadPlan:
    """The plan with a new read before slot `wanted[k + 1]` wherever `before[k]`."""
    if not wanted.size:
        return ReadPlan(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))
    cuts = np.flatnonzero(before)
    first = wanted[np.concatenate(([0], cuts + 1))]
    last = wanted[np.concatenate((cuts, [wanted.size - 1]))]
    return ReadPlan(first, last - first + np.int32(1))


@dataclass(frozen=True, eq=False)
class _PriceList:
    """The time of reads of up to `longest` bundles on a device, and bounds on how it grows with their length.

    `seconds` is float64 `[2 * longest + 1]`. Lengths fall into stages, `stage` is uint8 `[longest + 1]`. `most[s, d]`
    and `least[s, d]`, float64 `[stages, longest + 1]`, bound `seconds[x + d] - seconds[x]` for all x of stage s and
    later.
    """

    seconds: npt.NDArray[np.float64]
    stage: npt.NDArray[np.uint8]
    most: npt.NDArray[np.float64]
    least: npt.NDArray[np.float64]


@lru_cache(maxsize=16)
def _price_list(device: DeviceModel, stride: int, longest: int) -> _PriceList:
    lengths = np.arange(2 * longest + 1)
    seconds = device.bundle_read_seconds(lengths, stride)
    # The price is linear between these lengths.
    rounding = device.rounding_bytes(stride)
    known = [int((rate.bytes - rounding) // stride) + one for rate in device.reads for one in (0, 1)]
    kinks = np.unique(np.clip([1, *known], 1, longest))
    begins = kinks[:: -(-kinks.size // _MOST_STAGES)]
    stage = np.maximum(np.searchsorted(begins, lengths[: longest + 1], side="right") - 1, 0).astype(np.uint8)
    most, least = np.empty((2, begins.size, longest + 1))
    _bound_growth(seconds, kinks, begins, stage, most, least)
    return _PriceList(seconds, stage, most, least)


@kernel
def _bound_growth(seconds: Any, kinks: Any, begins: Any, stage: Any, most: Any, least: Any) -> None:
    """Fill `most` and `least`: as a function of x, the growth bends only where x or x + d is at a kink."""
    stages = begins.size
    for d in range(most.shape[1]):
        for s in range(stages):
            growth = seconds[begins[s] + d] - seconds[begins[s]]
            most[s, d] = least[s, d] = growth
        for kink in kinks:
            for x in (kink, kink - d):
                if x >= 1:
                    growth = seconds[x + d] - seconds[x]
                    most[stage[x], d] = max(most[stage[x], d], growth)
                    least[stage[x], d] = min(least[stage[x], d], growth)
        for s in range(stages - 2, -1, -1):
            most[s, d] = max(most[s, d], most[s + 1, d])
            least[s, d] = min(least[s, d], least[s + 1, d])


@kernel
def _cheapest_starts(slots: Any, seconds: Any, stage: Any, most: Any, least: Any, starts: Any) -> None:
    """Write for every slot the first slot of the read that brings it, int32 `[k]`.

    `best[j]` is the least time that fetches the first j slots. The read that brings slot j may begin at any earlier
    slot, but most can soon be ruled out: a start is dropped once another is ahead of it by more than it could ever
    make up as both reads grow.
    """
    n = slots.size
    best = np.empty(n + 1)
    best[0] = 0.0
    chosen = np.empty(n, dtype=np.int32)
    begin = np.empty(n, dtype=np.int32)
    alive = 0
    for j in range(n):
        begin[alive] = j
        alive += 1
        cheapest, ahead = np.inf, j
        for a in range(alive - 1, -1, -1):
            i = begin[a]
            cost = best[i] + seconds[slots[j] - slots[i] + 1]
            if cost < cheapest:
                cheapest, ahead = cost, i
        best[j + 1] = cheapest
        chosen[j] = ahead
        kept = 0
        for a in range(alive):
            i = begin[a]
            apart = slots[i] - slots[ahead]
            lead = best[i] - best[ahead]
            # Look up the growth of the shorter of the two reads.
            if apart > 0:
                hopeless = lead >= most[stage[slots[j] - slots[i] + 1], apart]
            elif apart < 0:
                hopeless = -lead <= least[stage[slots[j] - slots[ahead] + 1], -apart]
            else:
                hopeless = False
            if not hopeless:
                begin[kept] = i
                kept += 1
        alive = kept
    j = n - 1
    while j >= 0:
        i = chosen[j]
        for k in range(i, j + 1):
            starts[k] = slots[i]
        j = i - 1
