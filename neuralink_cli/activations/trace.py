"""The trace file: for every calibration token and FFN block, which neurons fired (one bit each)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.checkpoint.blocks import FFNBlock
from neuralink_cli.checkpoint.stage_file import StageFile, StreamedTensor, array_tensor, write_stage_file
from neuralink_cli.errors import InputError

Bits = npt.NDArray[np.uint8]
SEQUENCE_LENGTHS = "sequence_lengths"


@dataclass(frozen=True)
class TraceBlock:
    """What the trace knows of one block; `part_bytes` maps each role to the bytes of one neuron's weights."""

    id: str
    neurons: int
    hidden: int
    activation: str
    threshold: float
    part_bytes: Mapping[str, int]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's bits."""
        return (self.neurons + 7) // 8


@dataclass(frozen=True)
class TraceSource:
    """A dataset, or a contiguous part of its sequences: those from `first_sequence` on, of `total_sequences`.

    `sha256` is of all token ids of the source; `parameters` are those of the run that can change the bits.
    """

    name: str
    sha256: str
    first_sequence: int
    sequences: int
    total_sequences: int
    tokens: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class TraceHeader:
    """Everything a trace says beside its bits."""

    model: Mapping[str, str]
    signal: str
    calibration: Mapping[str, Any] | None
    blocks: tuple[TraceBlock, ...]
    sources: tuple[TraceSource, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.tokens for source in self.sources)


def trace_block(block: FFNBlock, threshold: float) -> TraceBlock:
    """The trace's entry for a block of a checkpoint."""
    part_bytes = {part.role: block.hidden * part.element_bytes for part in block.parts}
    return TraceBlock(block.id, block.neurons, block.hidden, block.activation, threshold, part_bytes)


def write_trace(
    path: Path,
    header: TraceHeader,
    sequence_lengths: npt.NDArray[np.uint32],
    fired: Callable[[str], Iterable[Bits]],
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> str:
    """Write a trace and return its `content_sha256`.

    Args:
        sequence_lengths: Tokens of each sequence, in order, over all sources.
        fired: For a block id, yields its bits in token order: uint8 arrays `[tokens, ceil(neurons / 8)]`, bit j % 8 of
            byte j // 8 being neuron j.

    Raises:
        OutputError: As `write_stage_file`.
    """
    tensors = [
        StreamedTensor(f"{block.id}.fired", "U8", (header.tokens, block.row_bytes), partial(fired, block.id))
        for block in header.blocks
    ]
    tensors.append(array_tensor(SEQUENCE_LENGTHS, sequence_lengths))
    return write_stage_file(path, "trace", asdict(header), tensors, overwrite=overwrite, progress=progress)


class Trace(StageFile):
    """An open trace. Use as a context manager.

    Raises:
        InputError: Not a trace, or tensors that do not fit its metadata.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "trace")
        try:
            self.info = _parse(self.document)
            self.sequence_lengths: npt.NDArray[np.uint32] = self.array(SEQUENCE_LENGTHS, "U32")
            self._check()
        except InputError:
            self.close()
            raise

    def fired(self, block: TraceBlock, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of the tokens `start` to `stop` of a block: uint8 `[stop - start, ceil(neurons / 8)]`."""
        stop = self.info.tokens if stop is None else stop
        rows = self.read(f"{block.id}.fired", start * block.row_bytes, stop * block.row_bytes)
        return rows.reshape(stop - start, block.row_bytes)

    def source_ranges(self) -> tuple[tuple[int, int], ...]:
        """First token and end of each source."""
        ends = np.cumsum([source.tokens for source in self.info.sources]).tolist()
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def source_sequence_lengths(self) -> tuple[npt.NDArray[np.uint32], ...]:
        """Sequence lengths of each source."""
        counts = [source.sequences for source in self.info.sources]
        return tuple(np.split(self.sequence_lengths, np.cumsum(counts)[:-1]))

    def _check(self) -> None:
        info = self.info
        if len({block.id for block in info.blocks}) != len(info.blocks):
            raise InputError("names a block twice", where=self.path)
        for block in info.blocks:
            entry = self.entry(f"{block.id}.fired")
            if entry.dtype != "U8" or entry.shape != (info.tokens, block.row_bytes):
                raise InputError(
                    f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, "
                    f"not U8 [{info.tokens}, {block.row_bytes}]",
                    where=self.path,
                )
        if self.sequence_lengths.shape != (sum(source.sequences for source in info.sources),):
            raise InputError("sequence_lengths does not fit the sources", where=self.path)
        for source, lengths in zip(info.sources, self.source_sequence_lengths(), strict=True):
            if int(lengths.sum(dtype=np.int64)) != source.tokens:
                raise InputError(f"sequence lengths of {source.name!r} do not add up to its tokens", where=self.path)


def _parse(document: Mapping[str, Any]) -> TraceHeader:
    blocks: Sequence[Mapping[str, Any]] = document["blocks"]
    return TraceHeader(
        model=document["model"],
        signal=document["signal"],
        calibration=document["calibration"],
        blocks=tuple(TraceBlock(**block) for block in blocks),
        sources=tuple(TraceSource(**source) for source in document["sources"]),
    )
