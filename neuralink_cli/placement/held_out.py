"""Splits tokens into those the ordering sees and those held out, and counts the reads of an order."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import FiredTokens, Trace
from neuralink_cli.arrays import Bytes
from neuralink_cli.errors import InputError
from neuralink_cli.kernels import kernel, popcount
from neuralink_cli.placement.bits import Bits

Range = tuple[int, int]


@dataclass(frozen=True)
class TokenSplit:
    """Per source, the range of tokens that the ordering sees, and the ranges held out from it."""

    ordering: tuple[Range, ...]
    held_out: tuple[tuple[Range, ...], ...]


def split_tokens(trace: Trace, fraction: float) -> TokenSplit:
    """Hold out about the last `fraction` of each source's tokens, in whole sequences.

    The cut is at the start of the first sequence that begins in that last part; where that would leave less than half
    of it, at the nearest start of a sequence. A source of one sequence has nothing held out. A sequence that is, token
    for token, also on the side of the ordering is left out, and so is the rest of a document that began there.
    """
    ordering, tails = [], []
    for (start, stop), lengths in zip(trace.source_ranges(), trace.source_sequence_lengths(), strict=True):
        cut = _cut(start, stop, start + np.cumsum(lengths, dtype=np.int64) - lengths, fraction)
        ordering.append((start, cut))
        tails.append((cut, stop))
    seen = {digest.tobytes() for made in ordering for digest in digests_in(trace, made)}
    return TokenSplit(tuple(ordering), tuple(unseen_ranges(trace, tail, seen) for tail in tails))


def _cut(start: int, stop: int, starts: npt.NDArray[np.int64], fraction: float) -> int:
    target = stop - round((stop - start) * fraction)
    inside = starts[starts > start]
    if target == stop or not inside.size:
        return stop
    later = inside[(inside >= target) & (inside <= (target + stop) / 2)]
    return int(later[0]) if later.size else int(inside[np.argmin(np.abs(inside - target))])


def digests_in(trace: Trace, tokens: Range) -> Bytes:
    """Digests of the sequences with a token in a range: uint8 `[sequences, 16]`."""
    first, last = _sequences(trace, tokens)
    return trace.sequence_digests[first:last]


def unseen_ranges(trace: Trace, tokens: Range, seen: Set[bytes]) -> tuple[Range, ...]:
    """What is left of a range of whole sequences without those whose digest is in `seen`, neighbours joined.

    The rest of a document that began in one of those is left out too, unless less than half of the tokens would be
    left: a text of one document has nothing but its own rest to be measured on.
    """
    first, last = _sequences(trace, tokens)
    starts = trace.sequence_starts[first:last].tolist()
    lengths = trace.sequence_lengths[first:last].tolist()
    carried = [0] * len(starts) if trace.sequence_carried is None else trace.sequence_carried[first:last].tolist()
    unseen: list[Range] = []
    fresh: list[Range] = []
    # Whether the document that a sequence carries on began in one whose digest is in `seen`.
    known = first > 0 and trace.sequence_digests[first - 1].tobytes() in seen
    for digest, start, length, rest in zip(trace.sequence_digests[first:last], starts, lengths, carried, strict=True):
        if digest.tobytes() in seen:
            known = True
            continue
        unseen.append((start, start + length))
        skipped = rest if known else 0
        if skipped < length:
            fresh.append((start + skipped, start + length))
            known = False
    enough = 2 * sum(stop - start for start, stop in fresh) >= sum(stop - start for start, stop in unseen)
    return _joined(fresh if enough else unseen)


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _sequences(trace: FiredTokens, tokens: Range) -> tuple[int, int]:
    """First and end of the sequences with a token in a range."""
    start, stop = tokens
    if start >= stop:
        return 0, 0
    starts = trace.sequence_starts
    return int(np.searchsorted(starts, start, side="right")) - 1, int(np.searchsorted(starts, stop, side="left"))


def sequence_starts_in(trace: FiredTokens, ranges: Sequence[Range]) -> npt.NDArray[np.int64]:
    """Where the sequences of some ascending ranges start, the first of each cut to its range: int64, ascending."""
    found = [np.zeros(0, dtype=np.int64)]
    for tokens in ranges:
        first, last = _sequences(trace, tokens)
        found.append(np.maximum(trace.sequence_starts[first:last], tokens[0]))
    return np.concatenate(found)


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
