"""What fetching neurons took: counters that only grow, and their differences."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class FlashCounters:
    """Neurons looked up and found in DRAM; reads, their bytes, the bytes asked for, and their time.

    `io_seconds` is the time spent waiting for reads, `fetch_seconds` that of the whole fetch: look-up, reads, copies.
    """

    looked_up: int = 0
    hits: int = 0
    reads: int = 0
    bytes_read: int = 0
    bytes_useful: int = 0
    io_seconds: float = 0.0
    fetch_seconds: float = 0.0

    def __add__(self, other: FlashCounters) -> FlashCounters:
        return FlashCounters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: FlashCounters) -> FlashCounters:
        return FlashCounters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of the neurons looked up that were in DRAM; 0.0 if none was looked up."""
        return self.hits / self.looked_up if self.looked_up else 0.0
