"""Synthetic activations: neurons with long-tailed rates, in clusters that are on or off together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import TraceBlock, TraceHeader, TraceSource, write_trace
from neuralink_cli.calibration.digests import sequence_digest


def clustered_chunks(neurons: int, tokens: int, active: float, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """A trace in chunks of at most 256 tokens, uint8 `[tokens, ceil(neurons/8)]`, about a share of `active` bits set.

    The clusters have about 64 neurons, whose indexes are spread over the block.
    """
    rng = np.random.default_rng(seed)
    clusters = max(neurons // 64, 1)
    cluster = rng.integers(0, clusters, neurons)
    rate = rng.lognormal(0, 1.2, neurons)
    rate = np.minimum(rate * active * 1.25 / rate.mean(), 0.95).astype(np.float32)
    for first in range(0, tokens, 256):
        count = min(256, tokens - first)
        on = rng.gamma(0.3, 1 / 0.3, (count, clusters)).astype(np.float32)
        draws = rng.random((count, neurons), dtype=np.float32)
        yield np.packbits(draws < rate * on[:, cluster], axis=1, bitorder="little")


def write_synthetic_trace(
    path: Path,
    *,
    blocks: int,
    neurons: int,
    tokens: int,
    hidden: int,
    active: float,
    model_type: str = "llama",
    fingerprint: str = "0" * 64,
) -> None:
    """Write a trace of a model that never ran, generated block by block."""
    roles = ("gate", "up", "down") if model_type == "llama" else ("up", "down")
    source = TraceSource("synthetic", "0" * 64, 0, tokens // 512, tokens // 512, tokens, {})
    header = TraceHeader(
        model={"fingerprint": fingerprint, "model_type": model_type, "architecture": model_type},
        origin=None,
        signal="gate",
        calibration=None,
        blocks=tuple(
            TraceBlock(f"layers.{k}", neurons, hidden, "relu", 0.0, dict.fromkeys(roles, hidden * 2))
            for k in range(blocks)
        ),
        sources=(source,),
    )

    def fired(block_id: str) -> Iterator[npt.NDArray[np.uint8]]:
        return clustered_chunks(neurons, tokens, active, seed=int(block_id.removeprefix("layers.")))

    lengths = np.full(tokens // 512, 512, dtype=np.uint32)
    digests = np.stack([sequence_digest(f"{fingerprint} {k}".encode()) for k in range(lengths.size)])
    write_trace(path, header, lengths, digests, fired, overwrite=True)
