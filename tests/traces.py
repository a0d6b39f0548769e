"""Small traces without a model: clustered activations, and any activations of blocks and experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.trace import TraceBlock, TraceHeader, TraceSource, write_trace
from neuralink_cli.calibration.digests import DIGEST_BYTES, sequence_digest


def numbered_digests(count: int, first: int = 0) -> npt.NDArray[np.uint8]:
    """Digests of sequences that no other number has: uint8 `[count, 16]`."""
    digests = [sequence_digest(str(number).encode()) for number in range(first, first + count)]
    return np.stack(digests) if digests else np.zeros((0, DIGEST_BYTES), dtype=np.uint8)


def clustered(tokens: int, neurons: int, *, clusters: int, seed: int) -> np.ndarray:
    """bool `[tokens, neurons]`: neurons fire in clusters spread over the block; every tenth neuron never fires."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, clusters, neurons)
    on = rng.random((tokens, clusters)) < 0.2
    fired = on[:, cluster] & (rng.random((tokens, neurons)) < 0.8)
    fired[:, ::10] = False
    return fired


def write_clustered_trace(
    path: Path,
    *,
    blocks: int = 3,
    neurons: int = 60,
    tokens: tuple[int, ...] = (400, 300),
    shuffle: bool = True,
    source: str = "source",
) -> dict[str, np.ndarray]:
    """Write a trace of several sources and return what fired, by block id; unshuffled, clusters lie side by side."""
    total = sum(tokens)
    fired = {f"layers.{k}": clustered(total, neurons, clusters=6, seed=k) for k in range(blocks)}
    if not shuffle:
        fired = {name: bits[:, np.lexsort((bits.sum(axis=0), bits.T @ bits[:, 1]))] for name, bits in fired.items()}
    header = TraceHeader(
        model={"fingerprint": "ab" * 32, "model_type": "opt", "architecture": "opt"},
        origin=None,
        signal="gate",
        calibration=None,
        blocks=tuple(TraceBlock(name, neurons, 16, "relu", 0.0, {"up": 2048, "down": 2048}) for name in fired),
        sources=tuple(
            TraceSource(f"{source}-{k}", f"{k:064x}", 0, -(-count // 50), -(-count // 50), count, {})
            for k, count in enumerate(tokens)
        ),
    )
    lengths = [min(50, count - start) for count in tokens for start in range(0, count, 50)]
    packed = {name: np.packbits(bits, axis=1, bitorder="little") for name, bits in fired.items()}
    digests = numbered_digests(len(lengths))
    write_trace(path, header, np.array(lengths, dtype=np.uint32), digests, lambda name: [packed[name]])
    return fired


def write_routed_trace(path: Path, *, experts: int = 2, neurons: int = 60, tokens: int = 300) -> Path:
    """Write a trace of the experts of a layer, each of which runs on every other token."""
    fired = {f"layers.0.experts.{k}": clustered(tokens // 2, neurons, clusters=6, seed=k) for k in range(experts)}
    part_bytes = {"gate": 2048, "up": 2048, "down": 2048}
    header = TraceHeader(
        model={"fingerprint": "ab" * 32, "model_type": "mixtral", "architecture": "mixtral"},
        origin=None,
        signal="gate",
        calibration=None,
        blocks=tuple(TraceBlock(name, neurons, 16, "relu", 0.0, part_bytes, routed=tokens // 2) for name in fired),
        sources=(TraceSource("source", "0" * 64, 0, tokens // 50, tokens // 50, tokens, {}),),
    )
    packed = {name: np.packbits(bits, axis=1, bitorder="little") for name, bits in fired.items()}
    lengths = np.full(tokens // 50, 50, dtype=np.uint32)
    positions = np.arange(0, tokens, 2, dtype=np.uint32)
    digests = numbered_digests(lengths.size)
    write_trace(path, header, lengths, digests, lambda name: [packed[name]], lambda _name: [positions])
    return path


@dataclass
class Recorded:
    """What a trace is made of: which neurons fired, bool `[tokens, neurons]`, and for experts where tokens went."""

    header: TraceHeader
    lengths: npt.NDArray[np.uint32]
    digests: npt.NDArray[np.uint8]
    fired: Mapping[str, npt.NDArray[np.bool_]]
    routed: Mapping[str, npt.NDArray[np.int64]]

    def write(self, path: Path) -> None:
        def bits(name: str) -> list[npt.NDArray[np.uint8]]:
            rows = self.fired[name][self.routed[name]] if name in self.routed else self.fired[name]
            packed = np.packbits(rows, axis=1, bitorder="little")
            # In chunks, as they come from a model.
            return [packed[:2], packed[2:]]

        def tokens(name: str) -> list[npt.NDArray[np.uint32]]:
            return [self.routed[name].astype(np.uint32)]

        write_trace(path, self.header, self.lengths, self.digests, bits, tokens)


def recorded(seed: int, sequences: list[list[int]], neurons: list[int], experts: list[int]) -> Recorded:
    """Sources of sequences of these lengths, no two of the same text; blocks of these sizes that run on all tokens, and
    experts that do not.
    """
    random = np.random.default_rng(seed)
    total = sum(map(sum, sequences))
    fired: dict[str, npt.NDArray[np.bool_]] = {}
    routed: dict[str, npt.NDArray[np.int64]] = {}
    blocks = []
    for k, n in enumerate([*neurons, *experts]):
        name = f"layers.{k}"
        fired[name] = random.random((total, n)) < 0.4
        count = None
        if k >= len(neurons):
            routed[name] = np.flatnonzero(random.random(total) < random.random())
            fired[name][np.setdiff1d(np.arange(total), routed[name])] = False
            count = routed[name].size
        blocks.append(TraceBlock(name, n, 4, "relu", 0.0, {"up": 8, "down": 8}, count))
    sources = tuple(
        TraceSource(f"source-{k}", f"{k:064x}", 0, len(lengths), len(lengths), sum(lengths), {})
        for k, lengths in enumerate(sequences)
    )
    model = {"fingerprint": "0" * 64, "model_type": "opt", "architecture": "opt"}
    header = TraceHeader(model, None, "gate", None, tuple(blocks), sources)
    lengths = np.array(list(chain(*sequences)), dtype=np.uint32)
    return Recorded(header, lengths, numbered_digests(lengths.size), fired, routed)
