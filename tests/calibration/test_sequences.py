from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import pytest

from neuralink_cli.calibration.sequences import (
    Batch,
    SequenceOptions,
    batch_arrays,
    plan_batches,
    sequences_sha256,
    tokenize,
)
from neuralink_cli.calibration.texts import Sample
from neuralink_cli.models.tokenizer import load_tokenizer
from tests.conftest import ModelFactory
from tests.tiny_models import TEXT

LINES = [Sample(line, continues=i > 0) for i, line in enumerate(TEXT.splitlines(keepends=True))]


def ids_of(
    samples: Iterable[Sample], tokenizer: Any, length: int = 64, *, packing: bool, max_tokens: int | None = None
) -> list[list[int]]:
    return [s.ids.tolist() for s in tokenize(samples, tokenizer, SequenceOptions(length, packing, max_tokens))]


def joined(sequences: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(sequences))


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert", "roberta"])
def test_packed_lines_are_one_document(model: ModelFactory, family: str) -> None:
    tokenizer = load_tokenizer(model(family))
    packed = ids_of(LINES, tokenizer, 50, packing=True)
    assert {len(ids) for ids in packed[:-1]} == {50}
    assert joined(packed) == tokenizer(TEXT)["input_ids"]
    sequences = tokenize(LINES, tokenizer, SequenceOptions(9, True))
    assert all(type(found.ids) is np.ndarray and found.ids.dtype == np.int32 for found in sequences)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert"])
def test_packed_rows_are_documents_of_their_own(model: ModelFactory, family: str) -> None:
    tokenizer = load_tokenizer(model(family))
    samples = [Sample("The river"), Sample("the bridge"), Sample("<x>", templated=True)]
    expected = [*tokenizer("The river")["input_ids"], *tokenizer("the bridge")["input_ids"]]
    expected += tokenizer("<x>", add_special_tokens=False)["input_ids"]
    assert joined(ids_of(samples, tokenizer, 4, packing=True)) == expected


def test_every_sequence_says_what_it_carries_on(model: ModelFactory) -> None:
    tokenizer = load_tokenizer(model("gpt2"))
    texts = ["The river", "the bridge over the river and the town", "a", "the town"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    begins = np.cumsum([0, *lengths[:-1]]).tolist()
    for length in (1, 2, 3, 5, 100):
        found = list(tokenize(map(Sample, texts), tokenizer, SequenceOptions(length, True)))
        start = 0
        for sequence in found:
            stop = start + sequence.ids.size
            assert sequence.carried == min(
                [begin - start for begin in begins if start <= begin < stop] or [stop - start]
            )
            start = stop
        assert start == sum(lengths)
    cut = list(tokenize(map(Sample, texts), tokenizer, SequenceOptions(5, True, 7)))
    assert [(sequence.ids.size, sequence.carried <= sequence.ids.size) for sequence in cut] == [(5, True), (2, True)]
    alone = tokenize(map(Sample, texts), tokenizer, SequenceOptions(3, False))
    assert {sequence.carried for sequence in alone} == {0}


@pytest.mark.parametrize("family", ["opt", "bert", "roberta"])
def test_without_packing_every_sample_is_a_sequence(model: ModelFactory, family: str) -> None:
    tokenizer = load_tokenizer(model(family))
    expected = [tokenizer(line)["input_ids"] for line in TEXT.split("\n") if line]
    assert ids_of(LINES, tokenizer, 1000, packing=False) == expected
    closing = 0 if family == "opt" else 1
    cut = [ids if len(ids) <= 12 else ids[: 12 - closing] + ids[len(ids) - closing :] for ids in expected]
    assert ids_of(LINES, tokenizer, 12, packing=False) == cut
    assert [len(ids) for ids in ids_of(LINES, tokenizer, 1, packing=False)] == [1] * len(expected)


@pytest.mark.parametrize("packing", [True, False])
def test_max_tokens_is_exact(model: ModelFactory, packing: bool) -> None:
    tokenizer = load_tokenizer(model("opt"))
    whole = ids_of(LINES, tokenizer, 20, packing=packing)
    for limit in (1, 20, 21, 77):
        found = ids_of(LINES, tokenizer, 20, packing=packing, max_tokens=limit)
        assert joined(found) == joined(whole)[:limit]
        assert [len(ids) for ids in found[:-1]] == [len(ids) for ids in whole[: len(found) - 1]]
    assert ids_of(LINES, tokenizer, 20, packing=packing, max_tokens=10**9) == whole


def test_state_saved_with_a_tokenizer_has_no_effect(model: ModelFactory) -> None:
    tokenizer = load_tokenizer(model("bert"))
    expected = ids_of(LINES, tokenizer, 64, packing=False)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    assert ids_of(LINES, tokenizer, 64, packing=False) == expected


def test_digest_is_of_lengths_and_ids() -> None:
    sequences = [np.array([1, 2, 300], dtype=np.int32), np.array([70000], dtype=np.int32)]
    expected = hashlib.sha256(struct.pack("<I3iIi", 3, 1, 2, 300, 1, 70000)).hexdigest()
    assert sequences_sha256(sequences) == expected


def test_packed_batches_hold_equal_lengths_of_one_source() -> None:
    sources = [(8, 8, 8, 3), (8, 8)]
    assert plan_batches(sources, 2, packing=True) == [
        Batch(0, 0, 2, 16),
        Batch(0, 2, 3, 8),
        Batch(0, 3, 4, 3),
        Batch(1, 0, 2, 16),
    ]
    assert plan_batches(sources, 100, packing=False) == [Batch(0, 0, 4, 27), Batch(1, 0, 2, 16)]


def test_batches_are_padded_on_the_right() -> None:
    ids, mask = batch_arrays([np.array([5, 6], dtype=np.int32), np.array([7, 8, 9], dtype=np.int32)], pad_id=1)
    assert ids.dtype == np.int64
    assert ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]
