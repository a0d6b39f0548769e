"""Which tokens order the neurons and which are held out to measure the order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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

    The cut is at the start of the first sequence that begins in that last part, so that no context is shared; where
    that would leave less than half of it, the cut is exactly there.

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
