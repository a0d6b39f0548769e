"""Which tokens are held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralink_cli.placement.held_out import Range, TokenSplit, split_tokens


def split(lengths: list[list[int]], fraction: float) -> tuple[tuple[Range, ...], TokenSplit]:
    ends = np.cumsum([sum(source) for source in lengths]).tolist()
    ranges = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return ranges, split_tokens(ranges, tuple(np.array(source, dtype=np.uint32) for source in lengths), fraction)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]),
)
def test_every_token_is_on_one_side_and_about_as_many_as_asked_are_held_out(
    lengths: list[list[int]], fraction: float
) -> None:
    ranges, parts = split(lengths, fraction)
    for (start, stop), ordering, held_out in zip(ranges, parts.ordering, parts.held_out, strict=True):
        assert ordering[0] == start
        assert ordering[1] == held_out[0]
        assert held_out[1] == stop
        asked = round((stop - start) * fraction)
        assert asked / 2 <= held_out[1] - held_out[0] <= asked


def test_the_cut_is_between_sequences() -> None:
    _, parts = split([[10] * 10], 0.25)
    assert parts.held_out == ((80, 100),)


def test_a_single_sequence_is_cut_inside() -> None:
    _, parts = split([[100]], 0.2)
    assert parts.held_out == ((80, 100),)


@pytest.mark.parametrize("lengths", [[[10, 10]], [[7]]])
def test_nothing_is_held_out_on_request(lengths: list[list[int]]) -> None:
    ranges, parts = split(lengths, 0.0)
    assert parts.ordering == ranges
