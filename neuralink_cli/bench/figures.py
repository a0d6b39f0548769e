"""The figures of a replay per token: one row of the bench."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuralink_cli.bench.replay import TokenFigures
from neuralink_cli.bench.replay_kernels import ACTIVE, CACHED, LONGEST, READ, READS, STRETCHES


@dataclass(frozen=True)
class Figures:
    """Means per token over all blocks, unless stated otherwise.

    Attributes:
        name: Name of the source, or "total".
        active: Neurons that fired.
        cached: Neurons that fired and were in DRAM.
        reads: Read operations.
        mean_read_length: Neurons per read, including those brought along.
        longest_read: Neurons of the longest read of all tokens.
        bytes_useful: Bytes of the neurons that were wanted.
        bytes_read: All bytes read.
        io_mean: Seconds of reading; `io_p50`, `io_p95` and `io_p99` are its quantiles over tokens.
        useful_bytes_per_second: The effective bandwidth: useful bytes divided by the read time.
        bytes_per_second: All bytes read divided by the read time.
    """

    name: str
    tokens: int
    active: float
    cached: float
    reads: float
    mean_read_length: float
    longest_read: int
    bytes_useful: float
    bytes_read: float
    io_mean: float
    io_p50: float
    io_p95: float
    io_p99: float
    useful_bytes_per_second: float
    bytes_per_second: float

    @property
    def hit_rate(self) -> float:
        """Share of the active neurons that were in DRAM."""
        return self.cached / self.active if self.active else 0.0


def summarise(figures: TokenFigures, name: str, start: int, stop: int) -> Figures:
    """The figures of the tokens `start` to `stop`."""
    counts = figures.counts[start:stop]
    seconds = figures.seconds[start:stop]
    tokens = stop - start
    active, cached, reads = (float(counts[:, column].mean()) for column in (ACTIVE, CACHED, READS))
    stretches, read = int(counts[:, STRETCHES].sum()), int(counts[:, READ].sum())
    useful_bytes = float(figures.useful_bytes[start:stop].mean())
    read_bytes = float(figures.read_bytes[start:stop].mean())
    mean = float(seconds.mean())
    p50, p95, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.95, 0.99)))
    return Figures(
        name=name,
        tokens=tokens,
        active=active,
        cached=cached,
        reads=reads,
        mean_read_length=read / stretches if stretches else 0.0,
        longest_read=int(counts[:, LONGEST].max()),
        bytes_useful=useful_bytes,
        bytes_read=read_bytes,
        io_mean=mean,
        io_p50=p50,
        io_p95=p95,
        io_p99=p99,
        useful_bytes_per_second=useful_bytes / mean if mean else 0.0,
        bytes_per_second=read_bytes / mean if mean else 0.0,
    )
