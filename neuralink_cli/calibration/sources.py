"""All sequences of a run: every dataset tokenized, planned into batches, and described for the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


class Source:
    """A dataset as sequences of tokens. The i-th has `lengths[i]` tokens.

    `sha256` is of what goes into the model; `digests`, uint8 `[sequences, 16]`, of each sequence of it, see
    `sequence_digest`; `parameters` are those of the run that can change its bits.
    """

    def __init__(
        self, name: str, sha256: str, lengths: Sequence[int], digests: Bytes, parameters: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.lengths = tuple(lengths)
        self.digests = digests
        self.parameters = parameters

    def batch(self, first: int, stop: int) -> ModelBatch:
        """Sequences `first` to `stop` as one batch."""
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
    ) -> None:
        digests = np.stack([sequence_digest(ids.astype("<i4").tobytes()) for ids in sequences])
        super().__init__(name, sequences_sha256(sequences), [ids.size for ids in sequences], digests, parameters)
        self._sequences = sequences
        self._to_batch = to_batch
        self._pad_id = pad_id

    def batch(self, first: int, stop: int) -> ModelBatch:
        """Sequences `first` to `stop`, padded to the longest."""
        return self._to_batch(*batch_arrays(self._sequences[first:stop], self._pad_id))


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
        batches = self.batches[(number - 1) * len(self.batches) // count : number * len(self.batches) // count]
        if not batches:
            raise OptionError(
                f"--part {number}/{count} has no batches: there are only {len(self.batches)}",
                fix="make fewer parts or lower --batch-size",
            )
        return batches

    def first_batches(self, tokens: int) -> tuple[Batch, ...]:
        """The first batches with at least this many tokens together, or all batches."""
        before = 0
        for number, batch in enumerate(self.batches):
            if before >= tokens:
                return self.batches[:number]
            before += batch.tokens
        return self.batches

    def inputs(self, batches: Iterable[Batch]) -> Iterator[ModelBatch]:
        """The model's input for each batch."""
        return (self.sources[batch.source].batch(batch.first, batch.stop) for batch in batches)

    def sequence_lengths(self, batches: Iterable[Batch]) -> npt.NDArray[np.uint32]:
        """Tokens of each sequence of the batches."""
        lengths = (self.sources[batch.source].lengths[batch.first : batch.stop] for batch in batches)
        return np.array([length for of_batch in lengths for length in of_batch], dtype=np.uint32)

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
        if int(sequence.max()) >= vocabulary:
            raise InputError(
                f"the tokenizer makes token {int(sequence.max())} from it, but the model has only {vocabulary} tokens",
                where=corpus.rows.where,
                fix="use the tokenizer that belongs to the model",
            )
        sequences.append(sequence)
        advance(sequence.size)
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
    return TextSource(corpus.name, sequences, {**own, **parameters}, to_batch, pad_id)


def plan(sources: Sequence[Source], batch_size: int, packing: bool) -> CalibrationData:
    """Plan the batches of all sources."""
    batches = plan_batches([source.lengths for source in sources], batch_size, packing)
    return CalibrationData(tuple(sources), tuple(batches))
