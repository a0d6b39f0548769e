"""How long reading a token's neurons takes, and how fast storage must be for so many tokens a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReadingTime:
    """What reading without a cache takes, as `cluster` modelled it on held-out tokens with access collapse.

    Attributes:
        device: Name of the device that was modelled.
        io_seconds: Mean of a token; pinned neurons cost nothing.
        tokens_per_second: What is wanted; None if nothing is.
    """

    device: str
    io_seconds: float
    tokens_per_second: float | None

    def as_document(self) -> dict[str, Any]:
        """Everything for JSON."""
        return {
            "device": self.device,
            "io_seconds": self.io_seconds,
            "most_tokens_per_second": self.most_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
            "speed_needed": self.speed_needed,
        }

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
