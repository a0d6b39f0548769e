"""Thresholds for a chosen active ratio, from a histogram of the magnitudes of a block's signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Activations that are zero for every negative input: at a threshold of 0, leaving out other neurons is exact.
EXACT_AT_ZERO = frozenset({"relu", "relu2", "relu6", "fatrelu", "drelu"})
# The bin of a magnitude is the upper half of its float32: the exponent and the first 8 bits of the fraction.
BIN_SHIFT = 15
BINS = 1 << 16
# Counts are kept by power of two: magnitudes are of some 25 of them.
_PER_POWER = 1 << 8
# What the histogram of a block usually takes; 30 powers.
HISTOGRAM_BYTES = 30 * _PER_POWER * 8
_LARGEST_FINITE = 0x7F7FFFFF
# Experts with fewer tokens have too few values for their own threshold.
_FEWEST_TOKENS = 16

# Adds to counts, in place, those that other processes have in their stead.
AddUp = Callable[[npt.NDArray[np.int64]], None]


class MagnitudeHistogram:
    """Counts of |s| in 65,536 bins, each at most 0.4 % wide. Takes memory for the powers of two that occur."""

    def __init__(self) -> None:
        self._powers: dict[int, npt.NDArray[np.int64]] = {}

    def add(self, counts: npt.NDArray[np.int64]) -> None:
        """Add counts per bin, int64 `[BINS]`."""
        of_powers = counts.reshape(-1, _PER_POWER)
        for power in np.flatnonzero(of_powers.any(axis=1)).tolist():
            if power in self._powers:
                self._powers[power] += of_powers[power]
            else:
                self._powers[power] = of_powers[power].copy()

    def add_up(self, add_up: AddUp) -> None:
        """Add the counts of other processes."""
        counts = self._counts()
        add_up(counts)
        self._powers = {}
        self.add(counts)

    @property
    def total(self) -> int:
        """The number of values added."""
        return sum(int(counts.sum()) for counts in self._powers.values())

    def _counts(self) -> npt.NDArray[np.int64]:
        counts = np.zeros((BINS // _PER_POWER, _PER_POWER), dtype=np.int64)
        for power, of_power in self._powers.items():
            counts[power] = of_power
        return counts.reshape(BINS)

    def threshold(self, active_ratio: float) -> float:
        """The float32 that about `active_ratio` of the values exceed, interpolated linearly within its bin.

        It is 0 if fewer values than that are beyond the smallest bin.
        """
        wanted = active_ratio * self.total
        counts = self._counts()
        at_least = np.cumsum(counts[::-1])[::-1]
        index = int(np.flatnonzero(at_least >= wanted)[-1])
        if index == 0:
            return 0.0
        above = int(at_least[index] - counts[index])
        lower, upper = _edge(index), _edge(index + 1)
        return float(np.float32(upper - (upper - lower) * (wanted - above) / int(counts[index])))


@dataclass(frozen=True)
class BlockHistograms:
    """The histograms of all blocks.

    Attributes:
        layers: For each block, the histogram of all experts of its layer; None if it is no expert.
        neurons: For each block, its neurons.
    """

    blocks: Sequence[MagnitudeHistogram]
    layers: Sequence[MagnitudeHistogram | None]
    neurons: Sequence[int]

    def add_up(self, add_up: AddUp) -> None:
        """Add the counts of other processes, which have as many histograms."""
        # One after the other, so that only one is in memory as a whole: there are thousands of experts.
        for histogram in {id(each): each for each in (*self.blocks, *self.layers) if each is not None}.values():
            histogram.add_up(add_up)

    def thresholds(self, active_ratio: float) -> list[float]:
        """For each block the threshold at which its neurons fire at `active_ratio`.

        An expert with too few tokens gets the common threshold of all experts of its layer.
        """
        found = []
        for own, layer, neurons in zip(self.blocks, self.layers, self.neurons, strict=True):
            few = own.total < _FEWEST_TOKENS * neurons
            found.append((layer if few and layer is not None else own).threshold(active_ratio))
        return found


def _edge(index: int) -> float:
    bits = min(index << BIN_SHIFT, _LARGEST_FINITE)
    return float(np.array(bits, dtype=np.int32).view(np.float32))
