"""The trace file: for every calibration token and FFN block, which neurons fired (one bit each)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from neuralink_cli.architectures.blocks import FFNBlock
from neuralink_cli.arrays import Bytes
from neuralink_cli.calibration.digests import DIGEST_BYTES
from neuralink_cli.checkpoint.origin import Origin, parse_origin
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.files.json_text import fields_of
from neuralink_cli.files.schema import Schema
from neuralink_cli.files.stage_file import StageFile, StreamedTensor, array_tensor, write_stage_file

Bits = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.uint32]
TRACE_SCHEMA = Schema("trace", __package__, "trace.schema.json")
SEQUENCE_LENGTHS = "sequence_lengths"
SEQUENCE_DIGESTS = "sequence_digests"
MOST_TOKENS = 2**32 - 1
SEQUENCE_CARRIED = "sequence_carried"


@dataclass(frozen=True, slots=True)
class TraceBlock:
    """One block in a trace.

    Attributes:
        part_bytes: For each role, the bytes of one neuron's weights.
        routed: For an expert, the number of tokens routed to it; None for a block that runs on all tokens.
    """

    id: str
    neurons: int
    hidden: int
    activation: str
    threshold: float
    part_bytes: Mapping[str, int]
    routed: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's bits."""
        return (self.neurons + 7) // 8

    @property
    def firing_role(self) -> str:
        """The part whose rows decide which neurons fire."""
        return "gate" if "gate" in self.part_bytes else "up"


@dataclass(frozen=True)
class TraceSource:
    """A dataset, or a contiguous part of its `total_sequences`, starting at `first_sequence`.

    `sha256` covers all token ids (or pixel values) of the source. `parameters` are the run's parameters that can change
    the bits.
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
    """Everything in a trace except its bits.

    `model` identifies the checkpoint; `origin` only says where it came from. `coverage` is how many bytes the FFN
    matrices of the model have, and those in blocks; None if that is not known.
    """

    model: Mapping[str, str]
    origin: Origin | None
    signal: str
    calibration: Mapping[str, Any] | None
    blocks: tuple[TraceBlock, ...]
    sources: tuple[TraceSource, ...]
    coverage: Mapping[str, int] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.tokens for source in self.sources)


def trace_block(block: FFNBlock, threshold: float) -> TraceBlock:
    """The trace's entry for a block of a checkpoint, before any token is routed to it if it is an expert."""
    part_bytes = {part.role: block.hidden * part.element_bytes for part in block.parts}
    routed = None if block.expert is None else 0
    return TraceBlock(block.id, block.neurons, block.hidden, block.activation, threshold, part_bytes, routed)


def bytes_per_token(blocks: Iterable[FFNBlock]) -> float:
    """Approximate bytes of a trace per token. Experts have rows for some tokens only."""
    return sum(
        -(-block.neurons // 8) if block.expert is None else block.expert.share * (-(-block.neurons // 8) + 4)
        for block in blocks
    )


def require_countable(tokens: int, where: Path) -> None:
    """Refuse more tokens than 32 bits count: places of tokens have as many, and counts of what fired together.

    Raises:
        UnsupportedError: There are more.
    """
    if tokens > MOST_TOKENS:
        raise UnsupportedError(
            f"would have {tokens:,} tokens, but the places of tokens in a trace have 32 bits: at most {MOST_TOKENS:,}",
            where=where,
            fix="profile or merge less text: an order needs far fewer tokens",
        )


def write_trace(
    path: Path,
    header: TraceHeader,
    sequence_lengths: npt.NDArray[np.uint32],
    sequence_digests: Bytes,
    fired: Callable[[str], Iterable[Bits]],
    tokens: Callable[[str], Iterable[Positions]] | None = None,
    *,
    sequence_carried: npt.NDArray[np.uint32] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> str:
    """Write a trace and return its `content_sha256`.

    Args:
        sequence_lengths: Tokens of each sequence, in order, over all sources.
        sequence_digests: uint8 `[sequences, 16]`, see `sequence_digest`.
        fired: For a block id, yields its bits in token order: uint8 arrays `[tokens, ceil(neurons / 8)]`, bit j % 8 of
            byte j // 8 being neuron j. For an expert, only the tokens routed to it.
        tokens: For the id of an expert, yields these tokens: uint32 arrays, ascending.
        sequence_carried: Of each sequence, the tokens at its start that belong to a document that an earlier one began;
            None if that is not known.

    Raises:
        OutputError: As `write_stage_file`.
        UnsupportedError: As `require_countable`.
    """
    require_countable(header.tokens, path)
    tensors = []
    for block in header.blocks:
        rows = header.tokens if block.routed is None else block.routed
        tensors.append(StreamedTensor(f"{block.id}.fired", "U8", (rows, block.row_bytes), partial(fired, block.id)))
        if block.routed is not None:
            assert tokens is not None
            tensors.append(StreamedTensor(f"{block.id}.tokens", "U32", (rows,), partial(tokens, block.id)))
    if sequence_carried is not None:
        tensors.append(array_tensor(SEQUENCE_CARRIED, sequence_carried))
    tensors.append(array_tensor(SEQUENCE_LENGTHS, sequence_lengths))
    tensors.append(array_tensor(SEQUENCE_DIGESTS, sequence_digests))
    return write_stage_file(path, TRACE_SCHEMA, fields_of(header), tensors, overwrite=overwrite, progress=progress)


class FiredTokens(Protocol):
    """What is read of a trace to order its blocks; see the methods of `Trace`."""

    @property
    def sequence_starts(self) -> npt.NDArray[np.int64]:
        """The first token of each sequence."""

    def tokens_of(self, block: TraceBlock, start: int = 0, stop: int | None = None) -> Positions:
        """The tokens from `start` to `stop` that a block ran on."""

    def rows(self, block: TraceBlock, start: int, stop: int) -> tuple[int, int]:
        """First row and end of a block's rows for the tokens from `start` to `stop`."""

    def read_rows(self, block: TraceBlock, first: int, last: int) -> Bits:
        """Rows of a block by their numbers."""


class Trace(StageFile):
    """An open trace. Use as a context manager.

    Raises:
        InputError: Not a trace, or its tensors do not fit its metadata.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, TRACE_SCHEMA)
        try:
            self.info = _parse(self.document)
            self.sequence_lengths: npt.NDArray[np.uint32] = self.array(SEQUENCE_LENGTHS, "U32")
            self.sequence_digests: Bytes = self.array(SEQUENCE_DIGESTS, "U8")
            self._check()
            self.sequence_carried = self._carried()
        except InputError:
            self.close()
            raise

    def fired(self, block: TraceBlock, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of the tokens from `start` to `stop` that a block ran on: uint8 `[tokens, ceil(neurons / 8)]`."""
        return self.read_rows(block, *self.rows(block, start, self.info.tokens if stop is None else stop))

    def read_rows(self, block: TraceBlock, first: int, last: int) -> Bits:
        """Rows `first` to `last` of a block, by their numbers: for an expert not the tokens of the trace."""
        rows = self.read(f"{block.id}.fired", first * block.row_bytes, last * block.row_bytes)
        return rows.reshape(last - first, block.row_bytes)

    def read_positions(self, block: TraceBlock, first: int, last: int) -> Positions:
        """The tokens of rows `first` to `last` of an expert."""
        return self.read(f"{block.id}.tokens", 4 * first, 4 * last).view("<u4")

    def tokens_of(self, block: TraceBlock, start: int = 0, stop: int | None = None) -> Positions:
        """The tokens from `start` to `stop` that a block ran on: uint32, ascending."""
        stop = self.info.tokens if stop is None else stop
        if block.routed is None:
            return np.arange(start, stop, dtype=np.uint32)
        return self.read_positions(block, *self.rows(block, start, stop))

    def fired_by_token(self, block: TraceBlock, start: int = 0, stop: int | None = None) -> Bits:
        """Bits of all tokens from `start` to `stop`; no bit is set for tokens that a block did not run on."""
        fired = self.fired(block, start, stop)
        if block.routed is None:
            return fired
        stop = self.info.tokens if stop is None else stop
        bits = np.zeros((stop - start, block.row_bytes), dtype=np.uint8)
        bits[self.tokens_of(block, start, stop).astype(np.int64) - start] = fired
        return bits

    def source_ranges(self) -> tuple[tuple[int, int], ...]:
        """First token and end of each source."""
        ends = np.cumsum([source.tokens for source in self.info.sources]).tolist()
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @cached_property
    def sequence_starts(self) -> npt.NDArray[np.int64]:
        """The first token of each sequence."""
        starts: npt.NDArray[np.int64] = np.cumsum(self.sequence_lengths, dtype=np.int64) - self.sequence_lengths
        return starts

    def source_sequence_lengths(self) -> tuple[npt.NDArray[np.uint32], ...]:
        """Sequence lengths of each source."""
        counts = [source.sequences for source in self.info.sources]
        return tuple(np.split(self.sequence_lengths, np.cumsum(counts)[:-1]))

    def rows(self, block: TraceBlock, start: int, stop: int) -> tuple[int, int]:
        """First row and end of the rows of a block for the tokens from `start` to `stop`."""
        if block.routed is None:
            return start, stop
        first, last = np.searchsorted(self._positions(block), [start, stop]).tolist()
        return first, last

    def _positions(self, block: TraceBlock) -> Positions:
        return self.read(f"{block.id}.tokens").view("<u4")

    def _check(self) -> None:
        info = self.info
        if info.tokens > MOST_TOKENS:
            raise InputError(f"says that it has {info.tokens:,} tokens, more than 32 bits count", where=self.path)
        if len({block.id for block in info.blocks}) != len(info.blocks):
            raise InputError("lists a block twice", where=self.path)
        for block in info.blocks:
            rows = info.tokens if block.routed is None else block.routed
            self._require(f"{block.id}.fired", "U8", (rows, block.row_bytes))
            if block.routed is not None:
                self._require(f"{block.id}.tokens", "U32", (rows,))
                positions = self._positions(block).astype(np.int64)
                if rows and (positions[-1] >= info.tokens or (np.diff(positions) <= 0).any()):
                    raise InputError(f"{block.id}.tokens are not ascending tokens of the trace", where=self.path)
        if self.sequence_lengths.shape != (sum(source.sequences for source in info.sources),):
            raise InputError("sequence_lengths does not fit the sources", where=self.path)
        if self.sequence_digests.shape != (self.sequence_lengths.size, DIGEST_BYTES):
            raise InputError("sequence_digests does not fit the sequences", where=self.path)
        for source, lengths in zip(info.sources, self.source_sequence_lengths(), strict=True):
            if int(lengths.sum(dtype=np.int64)) != source.tokens:
                raise InputError(f"sequence lengths of {source.name!r} do not add up to its tokens", where=self.path)

    def _carried(self) -> npt.NDArray[np.uint32] | None:
        """Of each sequence, the tokens of a document that an earlier one began; None in traces that do not say."""
        if SEQUENCE_CARRIED not in self:
            return None
        carried: npt.NDArray[np.uint32] = self.array(SEQUENCE_CARRIED, "U32")
        if carried.shape != self.sequence_lengths.shape or (carried > self.sequence_lengths).any():
            raise InputError("sequence_carried does not fit the sequences", where=self.path)
        return carried

    def _require(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        entry = self.entry(name)
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise InputError(
                f"tensor {name!r} is {entry.dtype} {list(entry.shape)}, not {dtype} {list(shape)}", where=self.path
            )


def _parse(document: Mapping[str, Any]) -> TraceHeader:
    blocks: Sequence[Mapping[str, Any]] = document["blocks"]
    return TraceHeader(
        model=document["model"],
        origin=parse_origin(document["origin"]),
        signal=document["signal"],
        calibration=document["calibration"],
        blocks=tuple(TraceBlock(**block) for block in blocks),
        sources=tuple(TraceSource(**source) for source in document["sources"]),
        coverage=document.get("coverage"),
    )
