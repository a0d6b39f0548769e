"""How long reading a token's neurons takes, and how fast storage must be for so many tokens a second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadingTime:
    """What reading without a cache takes, as `cluster` modelled it on held-out tokens with access collapse.

    Attributes:
        device: Name of the device that was modelled.
        io_seconds: Mean of a token; pinned neurons cost nothing.
        bytes_per_second: What the device reads at most.
        tokens_per_second: What is wanted; None if nothing is.
    """

    device: str
    io_seconds: float
    bytes_per_second: float
    tokens_per_second: float | None

    @property
    def most_tokens_per_second(self) -> float | None:
        """As many as the device could read for if computing took no time; None if nothing is read."""
        return 1 / self.io_seconds if self.io_seconds else None

    @property
    def speed_needed(self) -> float | None:
        """How many times as fast as the device storage must be, in operations and in bytes, for what is wanted."""
        return speed_needed(self.io_seconds, self.tokens_per_second)


def speed_needed(io_seconds: float, tokens_per_second: float | None) -> float | None:
    """How many times as fast storage must be for its reads to keep up, if computing is done while it reads.

    Args:
        io_seconds: What the reads of a token take now.
        tokens_per_second: What is wanted; None if nothing is.
    """
    return None if tokens_per_second is None else io_seconds * tokens_per_second
