"""All sequences of a run: every dataset tokenized, planned into batches, and described for the trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.arrays import Bytes
from neuralink_cli.calibration.batches import ModelBatch, TextBatch
from neuralink_cli.calibration.digests import sequence_digest
from neuralink_cli.calibration.sequences import (
    Batch,
    SequenceOptions,
    TokenIds,
    batch_arrays,
    plan_batches,
    sequences_sha256,
    tokenize,
)
from neuralink_cli.calibration.texts import Corpus
from neuralink_cli.errors import InputError, OptionError
from neuralink_cli.models.model_errors import require_known_tokens


class Source:
    """A dataset as sequences of tokens. The i-th has `lengths[i]` tokens.

    `sha256` is of what goes into the model; `digests`, uint8 `[sequences, 16]`, of each sequence of it, see
    `sequence_digest`; `parameters` are those of the run that can change its bits; the first `carried[i]` tokens of a
    sequence belong to a document that an earlier one began.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        lengths: Sequence[int],
        digests: Bytes,
        parameters: Mapping[str, Any],
        carried: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.lengths = tuple(lengths)
        self.digests = digests
        self.parameters = parameters
        self.carried = (0,) * len(self.lengths) if carried is None else tuple(carried)

    def batch(self, first: int, stop: int) -> ModelBatch:
        """The sequences from `first` to `stop`, together."""
        return self.batch_of(range(first, stop))

    def batch_of(self, sequences: Sequence[int]) -> ModelBatch:
        """Some sequences, together."""
        raise NotImplementedError


class TextSource(Source):
    """A dataset of texts, as token ids."""

    def __init__(
        self,
        name: str,
        sequences: Sequence[TokenIds],
        parameters: Mapping[str, Any],
        to_batch: TextBatch,
        pad_id: int,
        carried: Sequence[int] | None = None,
    ) -> None:
        digests = np.stack([sequence_digest(ids.astype("<i4").tobytes()) for ids in sequences])
        lengths = [ids.size for ids in sequences]
        super().__init__(name, sequences_sha256(sequences), lengths, digests, parameters, carried)
        self._sequences = sequences
        self._to_batch = to_batch
        self._pad_id = pad_id

    def batch_of(self, sequences: Sequence[int]) -> ModelBatch:
        """Some sequences, padded to the longest."""
        return self._to_batch(*batch_arrays([self._sequences[place] for place in sequences], self._pad_id))


@dataclass(frozen=True)
class Spread:
    """Sequences of the source with index `source`, which run through the model together."""

    source: int
    sequences: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class CalibrationData:
    """The sources and batches of the whole run, even if only a part is recorded."""

    sources: tuple[Source, ...]
    batches: tuple[Batch, ...]

    def part(self, part: tuple[int, int]) -> tuple[Batch, ...]:
        """The i-th of n contiguous parts of the batches, for (i, n) counted from 1.

        Raises:
            OptionError: The part has no batches.
        """
        number, count = part
        batches = self.batches[share_of(len(self.batches), number - 1, count)]
        if not batches:
            raise OptionError(
                f"--part {number}/{count} has no batches: there are only {len(self.batches)}",
                fix="make fewer parts or lower --batch-size",
            )
        return batches

    def spread_batches(self, tokens: int, batch_size: int) -> tuple[Spread, ...]:
        """Sequences with at least so many tokens, or all: spread evenly over each source, in proportion to its tokens.

        The batches hold sequences of one source and of one length.
        """
        total = sum(sum(source.lengths) for source in self.sources)
        share = min(tokens / total, 1.0)
        return tuple(
            Spread(index, tuple(group), sum(source.lengths[place] for place in group))
            for index, source in enumerate(self.sources)
            for group in _equal_lengths(spread(source.lengths, share), source.lengths, batch_size)
        )

    def spread_inputs(self, batches: Iterable[Spread]) -> Iterator[ModelBatch]:
        """What goes into the model for each batch of `spread_batches`."""
        return (self.sources[batch.source].batch_of(batch.sequences) for batch in batches)

    def inputs(self, batches: Iterable[Batch]) -> Iterator[ModelBatch]:
        """The model's input for each batch."""
        return (self.sources[batch.source].batch(batch.first, batch.stop) for batch in batches)

    def sequence_lengths(self, batches: Iterable[Batch]) -> npt.NDArray[np.uint32]:
        """Tokens of each sequence of the batches."""
        lengths = (self.sources[batch.source].lengths[batch.first : batch.stop] for batch in batches)
        return np.array([length for of_batch in lengths for length in of_batch], dtype=np.uint32)

    def sequence_carried(self, batches: Iterable[Batch]) -> npt.NDArray[np.uint32]:
        """Of each sequence of the batches, the tokens of a document that an earlier sequence began."""
        carried = (self.sources[batch.source].carried[batch.first : batch.stop] for batch in batches)
        return np.array([count for of_batch in carried for count in of_batch], dtype=np.uint32)

    def sequence_digests(self, batches: Iterable[Batch]) -> Bytes:
        """Digest of each sequence of the batches: uint8 `[sequences, 16]`."""
        return np.concatenate([self.sources[batch.source].digests[batch.first : batch.stop] for batch in batches])


def tokenize_source(
    corpus: Corpus,
    options: SequenceOptions,
    parameters: Mapping[str, Any],
    to_batch: TextBatch,
    *,
    vocabulary: int,
    pad_id: int,
    advance: Callable[[int], object],
) -> Source:
    """Tokenize a dataset.

    Args:
        parameters: The parameters of the run that can change the trace's bits; the dataset's own are added.
        to_batch: Turns token ids into the model's input.
        vocabulary: The number of token ids that the model has embeddings for.
        pad_id: The token that pads shorter sequences of a batch.
        advance: Called with the number of tokens since the last call.

    Raises:
        InputError: The tokenizer makes no tokens from the dataset, or tokens that the model does not know.
    """
    sequences = []
    for sequence in tokenize(corpus, corpus.tokenizer, options):
        require_known_tokens([sequence.ids.max()], vocabulary, corpus.rows.where)
        sequences.append(sequence)
        advance(sequence.ids.size)
    corpus.conclude()
    if not sequences:
        raise InputError("the tokenizer makes no tokens from it", where=corpus.rows.where)
    own = {
        "text_columns": None if corpus.rows.lines else list(corpus.columns),
        "split": corpus.rows.split,
        "revision": corpus.rows.revision,
        "num_samples": corpus.options.num_samples,
        "seed": corpus.options.seed,
        "max_tokens": options.max_tokens,
        "max_seq_length": options.max_length,
        "packing": options.packing,
    }
    carried = [sequence.carried for sequence in sequences]
    ids = [sequence.ids for sequence in sequences]
    return TextSource(corpus.name, ids, {**own, **parameters}, to_batch, pad_id, carried)


def share_of(items: int, number: int, count: int) -> slice:
    """The consecutive items, of so many, in a part of `count` parts numbered from 0: about as many in each."""
    return slice(number * items // count, (number + 1) * items // count)


def plan(sources: Sequence[Source], batch_size: int, packing: bool) -> CalibrationData:
    """Plan the batches of all sources."""
    batches = plan_batches([source.lengths for source in sources], batch_size, packing)
    return CalibrationData(tuple(sources), tuple(batches))


def spread(lengths: Sequence[int], share: float) -> list[int]:
    """The fewest evenly spaced sequences, given by their lengths, that hold at least a share of all tokens.

    Of n sequences c are those with the numbers floor((2 k + 1) n / 2 c) for k from 0 to c - 1.
    """
    wanted, total = share * sum(lengths), len(lengths)
    count = max(math.ceil(share * total), 1)
    while True:
        places = [(2 * k + 1) * total // (2 * count) for k in range(count)]
        if count == total or sum(lengths[place] for place in places) >= wanted:
            return places
        count += 1


def _equal_lengths(places: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of sequences of one length, which need no padding."""
    for _length, group in groupby(sorted(places, key=lambda place: lengths[place]), lambda place: lengths[place]):
        of_length = list(group)
        for start in range(0, len(of_length), batch_size):
            yield of_length[start : start + batch_size]
