"""All sequences of a run: every dataset tokenised, planned into batches, and described as the trace describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.calibration.batches import ModelBatch, TextBatch
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
    """A dataset as sequences of tokens, `lengths[i]` in the i-th.

    `sha256` is of what goes into the model; `parameters` are those of the run that can change its bits.
    """

    def __init__(self, name: str, sha256: str, lengths: Sequence[int], parameters: Mapping[str, Any]) -> None:
        self.name = name
        self.sha256 = sha256
        self.lengths = tuple(lengths)
        self.parameters = parameters

    def batch(self, first: int, stop: int) -> ModelBatch:
        """The sequences from `first` to `stop`, together."""
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
        super().__init__(name, sequences_sha256(sequences), [ids.size for ids in sequences], parameters)
        self._sequences = sequences
        self._to_batch = to_batch
        self._pad_id = pad_id

    def batch(self, first: int, stop: int) -> ModelBatch:
        """The sequences from `first` to `stop`, padded to the longest."""
        return self._to_batch(*batch_arrays(self._sequences[first:stop], self._pad_id))


@dataclass(frozen=True)
class CalibrationData:
    """The sources and the batches of the whole run, whichever part of it is to be recorded."""

    sources: tuple[Source, ...]
    batches: tuple[Batch, ...]

    def part(self, part: tuple[int, int]) -> tuple[Batch, ...]:
        """The i-th of n contiguous parts of the batches, for (i, n) counted from 1.

        Raises:
            OptionError: It has no batches.
        """
        number, count = part
        batches = self.batches[(number - 1) * len(self.batches) // count : number * len(self.batches) // count]
        if not batches:
            raise OptionError(
                f"--part {number}/{count} has nothing in it: there are {len(self.batches)} batches",
                fix="make fewer parts or lower --batch-size",
            )
        return batches

    def first_batches(self, tokens: int) -> tuple[Batch, ...]:
        """The batches from the start that hold at least so many tokens, or all."""
        before = 0
        for number, batch in enumerate(self.batches):
            if before >= tokens:
                return self.batches[:number]
            before += batch.tokens
        return self.batches

    def inputs(self, batches: Iterable[Batch]) -> Iterator[ModelBatch]:
        """What goes into the model for each batch."""
        return (self.sources[batch.source].batch(batch.first, batch.stop) for batch in batches)

    def sequence_lengths(self, batches: Iterable[Batch]) -> npt.NDArray[np.uint32]:
        """Tokens of each sequence of the batches."""
        lengths = (self.sources[batch.source].lengths[batch.first : batch.stop] for batch in batches)
        return np.array([length for of_batch in lengths for length in of_batch], dtype=np.uint32)


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
    """Tokenise a dataset.

    Args:
        parameters: Those of the run that can change the bits of any dataset; the dataset's own are added.
        to_batch: Makes what goes into the model of token ids.
        vocabulary: How many token ids the model has embeddings for.
        pad_id: What shorter sequences of a batch are filled up with.
        advance: Called with the number of tokens since the last call.

    Raises:
        InputError: The tokenizer makes no tokens of it, or some that the model does not know.
    """
    sequences = []
    for sequence in tokenize(corpus, corpus.tokenizer, options):
        require_known_tokens([sequence.max()], vocabulary, corpus.rows.where)
        sequences.append(sequence)
        advance(sequence.size)
    if not sequences:
        raise InputError("the tokenizer makes no tokens of it", where=corpus.rows.where)
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
    """The batches over all sources."""
    batches = plan_batches([source.lengths for source in sources], batch_size, packing)
    return CalibrationData(tuple(sources), tuple(batches))
