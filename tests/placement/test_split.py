"""Which tokens are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.activations.trace import Trace
from neuralink_cli.placement.held_out import Range, TokenSplit, split_tokens
from tests.traces import numbered_digests


@dataclass(frozen=True)
class Sequences:
    """As much of a trace as is looked at: sequence lengths by source, and digests."""

    lengths: list[list[int]]
    digests: npt.NDArray[np.uint8]
    sequence_carried: npt.NDArray[np.uint32] | None = None

    @property
    def sequence_lengths(self) -> npt.NDArray[np.uint32]:
        return np.array([length for source in self.lengths for length in source], dtype=np.uint32)

    @property
    def sequence_digests(self) -> npt.NDArray[np.uint8]:
        return self.digests

    @property
    def sequence_starts(self) -> npt.NDArray[np.int64]:
        starts: npt.NDArray[np.int64] = np.cumsum(self.sequence_lengths, dtype=np.int64) - self.sequence_lengths
        return starts

    def source_ranges(self) -> tuple[Range, ...]:
        ends = np.cumsum([sum(source) for source in self.lengths]).tolist()
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def source_sequence_lengths(self) -> tuple[npt.NDArray[np.uint32], ...]:
        return tuple(np.array(source, dtype=np.uint32) for source in self.lengths)


def split(
    lengths: list[list[int]],
    fraction: float,
    digests: npt.NDArray[np.uint8] | None = None,
    carried: list[int] | None = None,
) -> tuple[tuple[Range, ...], TokenSplit]:
    if digests is None:
        digests = numbered_digests(sum(map(len, lengths)))
    trace = Sequences(lengths, digests, None if carried is None else np.array(carried, dtype=np.uint32))
    return trace.source_ranges(), split_tokens(cast(Trace, trace), fraction)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]),
)
def test_whole_sequences_are_on_one_side_and_about_as_many_tokens_as_asked_are_held_out(
    lengths: list[list[int]], fraction: float
) -> None:
    ranges, parts = split(lengths, fraction)
    for (start, stop), ordering, held_out, own in zip(ranges, parts.ordering, parts.held_out, lengths, strict=True):
        starts = start + np.cumsum(own) - own
        asked = round((stop - start) * fraction)
        assert ordering[0] == start
        if asked == 0 or len(own) == 1:
            assert (ordering[1], held_out) == (stop, ())
            continue
        assert held_out == ((ordering[1], stop),)
        assert ordering[1] in starts[1:]
        # Another cut between sequences would not be nearer by more than half of what is asked.
        nearest = min(abs(int(cut) - (stop - asked)) for cut in starts[1:])
        assert abs(ordering[1] - (stop - asked)) <= max(nearest, asked / 2)


def test_the_cut_is_between_sequences() -> None:
    _, parts = split([[10] * 10], 0.25)
    assert parts.held_out == (((80, 100),),)


def test_few_long_sequences_are_not_cut_inside() -> None:
    _, parts = split([[60, 40], [100]], 0.2)
    assert parts.held_out == (((60, 100),), ())
    assert parts.ordering == ((0, 60), (100, 200))


def test_sequences_that_made_the_order_are_not_held_out_wherever_they_are() -> None:
    digests = numbered_digests(10)
    digests[8] = digests[1]  # of another source
    _, parts = split([[10] * 4, [10] * 6], 0.5, digests)
    assert parts.ordering == ((0, 20), (40, 70))
    assert parts.held_out == (((20, 40),), ((70, 80), (90, 100)))
    digests[9] = digests[5]  # of the same one
    _, parts = split([[10] * 4, [10] * 6], 0.5, digests)
    assert parts.held_out == (((20, 40),), ((70, 80),))


def test_the_rest_of_a_document_that_the_order_saw_is_not_held_out() -> None:
    # The cut is at 50; a document begins at 67, the next at 81.
    _, parts = split([[10] * 10], 0.5, carried=[0, 10, 3, 10, 0, 10, 7, 10, 1, 10])
    assert parts.ordering == ((0, 50),)
    assert parts.held_out == (((67, 100),),)
    # Of a second source, whose first sequence carries nothing on.
    _, parts = split([[10] * 2, [10] * 4], 0.5, carried=[0, 10, 0, 4, 5, 10])
    assert parts.held_out == (((10, 20),), ((45, 60),))


def test_a_text_of_one_document_is_held_out_in_sequences() -> None:
    _, parts = split([[10] * 10], 0.5, carried=[0] + [10] * 9)
    assert parts.held_out == (((50, 100),),)
    # Less than half of the tokens that no order saw begin after it.
    _, parts = split([[10] * 10], 0.5, carried=[0, *[10] * 6, 6, 10, 10])
    assert parts.held_out == (((50, 100),),)
    _, parts = split([[10] * 10], 0.5, carried=[0, *[10] * 6, 5, 10, 10])
    assert parts.held_out == (((75, 100),),)


def test_sequences_seen_within_the_held_out_part_take_the_rest_of_their_documents_along() -> None:
    digests = numbered_digests(8)
    digests[5] = digests[0]
    _, parts = split([[10] * 8], 0.5, digests, carried=[0, 0, 0, 0, 0, 0, 8, 10])
    # The document that the seen sequence begins ends at 68; the next one fills the last sequence.
    assert parts.held_out == (((40, 50), (68, 80)),)


@pytest.mark.parametrize("lengths", [[[10, 10]], [[7]]])
def test_nothing_is_held_out_on_request(lengths: list[list[int]]) -> None:
    ranges, parts = split(lengths, 0.0)
    assert parts.ordering == ranges
