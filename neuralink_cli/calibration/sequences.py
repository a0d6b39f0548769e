"""Token sequences: tokenizes samples, packed or one by one, and groups the sequences into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.calibration.encoder import Encoder
from neuralink_cli.calibration.texts import Sample

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens that the model sees together.

    Attributes:
        ids: int32 `[1 .. max_length]`.
        carried: So many of them, from the first on, belong to a document that an earlier sequence began.
    """

    ids: TokenIds
    carried: int = 0


@dataclass(frozen=True)
class SequenceOptions:
    """How samples become sequences of at most `max_length` tokens; `max_tokens` limits the source."""

    max_length: int
    packing: bool
    max_tokens: int | None = None


@dataclass(frozen=True)
class Batch:
    """Sequences `first` to `stop` of the source with index `source`, which run together."""

    source: int
    first: int
    stop: int
    tokens: int


def tokenize(samples: Iterable[Sample], tokenizer: Any, options: SequenceOptions) -> Iterator[TokenSequence]:
    """Tokenize one source into sequences of at most `max_length` tokens.

    Packing joins the tokens of all documents and cuts them every `max_length`. Lines that continue each other are one
    document and get special tokens once. Without packing, every sample that is not blank is one document and one
    sequence, cut to `max_length` tokens including special tokens, without the line break at its end. Special tokens are
    the tokens that the tokenizer adds by itself.
    """
    encoder = Encoder(tokenizer)
    sequences = (
        _pack(samples, encoder, options.max_length) if options.packing else _cut(samples, encoder, options.max_length)
    )
    return sequences if options.max_tokens is None else _limit(sequences, options.max_tokens)


def sequences_sha256(sequences: Iterable[TokenIds]) -> str:
    """SHA-256 of a source. For each sequence: its length as uint32 and its token ids as int32, all little-endian."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.uint32(sequence.size).astype("<u4").tobytes())
        digest.update(sequence.astype("<i4").tobytes())
    return digest.hexdigest()


def plan_batches(sources: Sequence[Sequence[int]], batch_size: int, packing: bool) -> list[Batch]:
    """Group consecutive sequences of each source, given by their lengths, into batches of at most `batch_size`.

    With packing, only sequences of the same length share a batch, so no padding is needed.
    """
    batches = []
    for index, lengths in enumerate(sources):
        first = 0
        for stop in range(1, len(lengths) + 1):
            full = stop - first == batch_size
            if stop == len(lengths) or full or (packing and lengths[stop] != lengths[first]):
                batches.append(Batch(index, first, stop, sum(lengths[first:stop])))
                first = stop
    return batches


def batch_arrays(sequences: Sequence[TokenIds], pad_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Sequences padded on the right to the longest: `[rows, width]` of ids, and a mask that is false for padding."""
    lengths = np.array([sequence.size for sequence in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate(sequences)
    return ids, mask


def _pack(samples: Iterable[Sample], encoder: Encoder, length: int) -> Iterator[TokenSequence]:
    held: list[int] = []
    # Where documents begin among them, ascending.
    begins: list[int] = []
    for document in _documents(samples):
        begins.append(len(held))
        for ids in _encode_document(document, encoder):
            held += ids
            whole = len(held) - len(held) % length
            for start in range(0, whole, length):
                yield _sequence(held[start : start + length], begins, start)
            del held[:whole]
            begins = [begin - whole for begin in begins if begin >= whole]
    if held:
        yield _sequence(held, begins, 0)


def _sequence(ids: list[int], begins: list[int], start: int) -> TokenSequence:
    """Tokens from `start` on, of those in which documents begin at `begins`."""
    carried = next((begin - start for begin in begins if begin >= start), len(ids))
    return TokenSequence(np.array(ids, dtype=np.int32), min(carried, len(ids)))


def _cut(samples: Iterable[Sample], encoder: Encoder, length: int) -> Iterator[TokenSequence]:
    for sample in samples:
        if sample.blank:
            continue
        opening, closing = ([], []) if sample.templated else (encoder.opening, encoder.closing)
        room = max(length - len(opening) - len(closing), 0)
        ids: list[int] = []
        for piece in encoder.encode([sample.text.rstrip("\r\n")]):
            ids += piece
            if len(ids) >= room:
                break
        sequence = (opening + ids[:room] + closing)[:length]
        if ids:
            yield TokenSequence(np.array(sequence, dtype=np.int32))


def _limit(sequences: Iterable[TokenSequence], tokens: int) -> Iterator[TokenSequence]:
    for sequence in sequences:
        ids = sequence.ids[:tokens]
        yield TokenSequence(ids, min(sequence.carried, ids.size))
        tokens -= ids.size
        if tokens <= 0:
            return


def _documents(samples: Iterable[Sample]) -> Iterator[Iterator[Sample]]:
    """Groups of consecutive samples that continue each other."""
    count = 0

    def number(sample: Sample) -> int:
        nonlocal count
        count += not sample.continues
        return count

    return (document for _, document in groupby(samples, number))


def _encode_document(document: Iterator[Sample], encoder: Encoder) -> Iterator[list[int]]:
    first = next(document)
    if not first.templated:
        yield encoder.opening
    yield from encoder.encode(sample.text for sample in chain([first], document))
    if not first.templated:
        yield encoder.closing
