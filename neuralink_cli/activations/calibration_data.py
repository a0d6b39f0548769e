"""All sequences of a run: every dataset tokenised, planned into batches, and described as the trace describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.activations.corpus import Corpus
from neuralink_cli.activations.sequences import (
    Batch,
    SequenceOptions,
    TokenIds,
    batch_arrays,
    plan_batches,
    sequences_sha256,
    tokenize,
)
from neuralink_cli.activations.trace import TraceSource
from neuralink_cli.errors import InputError, OptionError


@dataclass(frozen=True)
class Source:
    """A dataset as sequences; `parameters` are those of the run that can change its bits."""

    name: str
    sha256: str
    sequences: tuple[TokenIds, ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class CalibrationData:
    """The sources and the batches of the whole run, whichever part of it is to be recorded."""

    sources: tuple[Source, ...]
    batches: tuple[Batch, ...]
    pad_id: int

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

    def arrays(self, batches: Iterable[Batch]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        """Token ids and mask of each batch, as `batch_arrays`."""
        return (batch_arrays(self._sequences(batch), self.pad_id) for batch in batches)

    def sequence_lengths(self, batches: Iterable[Batch]) -> npt.NDArray[np.uint32]:
        """Tokens of each sequence of the batches."""
        return np.array([ids.size for batch in batches for ids in self._sequences(batch)], dtype=np.uint32)

    def trace_sources(self, batches: Iterable[Batch]) -> tuple[TraceSource, ...]:
        """What consecutive batches hold of each source."""
        found = []
        for index, group in groupby(batches, lambda batch: batch.source):
            of_source = list(group)
            source = self.sources[index]
            found.append(
                TraceSource(
                    name=source.name,
                    sha256=source.sha256,
                    first_sequence=of_source[0].first,
                    sequences=of_source[-1].stop - of_source[0].first,
                    total_sequences=len(source.sequences),
                    tokens=sum(batch.tokens for batch in of_source),
                    parameters=source.parameters,
                )
            )
        return tuple(found)

    def _sequences(self, batch: Batch) -> Sequence[TokenIds]:
        return self.sources[batch.source].sequences[batch.first : batch.stop]


def tokenize_source(
    corpus: Corpus,
    options: SequenceOptions,
    parameters: Mapping[str, Any],
    *,
    vocabulary: int,
    advance: Callable[[int], object],
) -> Source:
    """Tokenise a dataset.

    Args:
        parameters: Those of the run that can change the bits of any dataset; the dataset's own are added.
        vocabulary: How many token ids the model has embeddings for.
        advance: Called with the number of tokens since the last call.

    Raises:
        InputError: The tokenizer makes no tokens of it, or some that the model does not know.
    """
    sequences = []
    for sequence in tokenize(corpus, corpus.tokenizer, options):
        if int(sequence.max()) >= vocabulary:
            raise InputError(
                f"the tokenizer makes token {int(sequence.max())} of it, the model has only {vocabulary}",
                where=corpus.rows.where,
                fix="use the tokenizer that belongs to the model",
            )
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
    return Source(corpus.name, sequences_sha256(sequences), tuple(sequences), {**own, **parameters})


def plan(sources: Sequence[Source], batch_size: int, packing: bool, pad_id: int) -> CalibrationData:
    """The batches over all sources."""
    batches = plan_batches([source.sequences for source in sources], batch_size, packing)
    return CalibrationData(tuple(sources), tuple(batches), pad_id)
