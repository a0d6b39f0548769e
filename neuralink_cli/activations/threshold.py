"""Thresholds that make a block fire at a ratio of choice, from a histogram of its signal's magnitudes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Activations that are zero for every negative input: what they let through at a threshold of 0 is all that matters.
EXACT_AT_ZERO = frozenset({"relu", "relu2", "relu6", "fatrelu", "drelu"})
# A magnitude's bin is the upper half of its bits as a float32: its exponent and the first 8 bits of its fraction.
BIN_SHIFT = 15
BINS = 1 << 16
_LARGEST_FINITE = 0x7F7FFFFF


class MagnitudeHistogram:
    """Counts of |s| in 65,536 bins, each at most 0.4 % wide."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, dtype=np.int64)

    def add(self, counts: npt.NDArray[np.int64]) -> None:
        """Add values that have been counted into bins, int64 `[BINS]`."""
        self._counts += counts

    @property
    def total(self) -> int:
        """How many values have been added."""
        return int(self._counts.sum())

    def threshold(self, active_ratio: float) -> float:
        """The t, a float32, for which about `active_ratio` of the values are greater; between two edges, linearly.

        It is 0 when fewer values than that are beyond the smallest bin.
        """
        wanted = active_ratio * self.total
        at_least = np.cumsum(self._counts[::-1])[::-1]
        index = int(np.flatnonzero(at_least >= wanted)[-1])
        if index == 0:
            return 0.0
        above = int(at_least[index] - self._counts[index])
        lower, upper = _edge(index), _edge(index + 1)
        return float(np.float32(upper - (upper - lower) * (wanted - above) / int(self._counts[index])))


def _edge(index: int) -> float:
    bits = min(index << BIN_SHIFT, _LARGEST_FINITE)
    return float(np.array(bits, dtype=np.int32).view(np.float32))
