"""Splits tokens into those the ordering sees and those held out, and counts the reads of an order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.errors import InputError
from neuralink_cli.kernels import kernel, popcount
from neuralink_cli.placement.bits import Bits

Range = tuple[int, int]


@dataclass(frozen=True)
class TokenSplit:
    """Per source, the range of tokens that the ordering sees and the range held out from it."""

    ordering: tuple[Range, ...]
    held_out: tuple[Range, ...]


def split_tokens(
    source_ranges: tuple[Range, ...], sequence_lengths: tuple[npt.NDArray[np.uint32], ...], fraction: float
) -> TokenSplit:
    """Hold out about the last `fraction` of each source's tokens.

    The cut is at the start of the first sequence that begins in that last part, so that no context is shared. If that
    would leave less than half of the part, the cut is exactly at its start.

    Args:
        source_ranges: First token and end of each source.
        sequence_lengths: Tokens of each sequence, per source.
    """
    ordering, held_out = [], []
    for (start, stop), lengths in zip(source_ranges, sequence_lengths, strict=True):
        target = stop - round((stop - start) * fraction)
        starts = start + np.cumsum(lengths, dtype=np.int64) - lengths
        later = starts[(starts >= target) & (starts <= (target + stop) / 2)]
        cut = int(later[0]) if later.size and target < stop else target
        ordering.append((start, cut))
        held_out.append((cut, stop))
    return TokenSplit(tuple(ordering), tuple(held_out))


@dataclass(frozen=True)
class ReadStatistics:
    """The reads for the active neurons of every token, if each run of consecutive active slots is one read."""

    tokens: int
    active: int
    """Neurons read, over all tokens."""
    reads: int
    """Runs of consecutive active slots, over all tokens."""

    @property
    def reads_per_token(self) -> float:
        """Mean number of reads of a token."""
        return self.reads / self.tokens if self.tokens else 0.0

    @property
    def mean_read_length(self) -> float:
        """Mean number of bundles in a read; 0.0 if there are no reads."""
        return self.active / self.reads if self.reads else 0.0


def read_statistics(bits: Bits, order: npt.NDArray[np.int32], tokens: int) -> ReadStatistics:
    """Count the reads of an order exactly, as sum_p |b_p| - sum_p |b_p & b_{p+1}| over its slots p.

    Args:
        bits: uint64[n, ceil(tokens/64)], neuron-major.
        order: int32[slots], `order[slot]` = neuron; usually all n, but any selection works.
        tokens: Number of tokens in `bits`.

    Raises:
        InputError: `order` has a neuron that is not in `bits`, or `bits` does not hold `tokens` tokens.
    """
    n, words = bits.shape
    if words != -(-tokens // 64):
        raise InputError(f"bit vectors of {words} words do not hold {tokens} tokens")
    if order.size and (int(order.min()) < 0 or int(order.max()) >= n):
        raise InputError(f"the order has a neuron outside the block of {n}")
    active, joined = _count_joins(bits, np.ascontiguousarray(order, dtype=np.int32))
    return ReadStatistics(tokens=tokens, active=int(active), reads=int(active) - int(joined))


@kernel
def _count_joins(bits: Bits, order: npt.NDArray[np.int32]) -> tuple[np.int64, np.int64]:
    """Sums over slots of |b_p| and of |b_p & b_{p+1}|."""
    active = np.uint64(0)
    joined = np.uint64(0)
    for slot in range(order.size):
        row = bits[order[slot]]
        following = bits[order[min(slot + 1, order.size - 1)]]
        ones = np.uint64(0)
        both = np.uint64(0)
        for w in range(row.size):
            ones += popcount(row[w])
            both += popcount(row[w] & following[w])
        active += ones
        if slot + 1 < order.size:
            joined += both
    return np.int64(active), np.int64(joined)
