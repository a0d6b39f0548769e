"""Partners of a neuron against a plain oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from neuralink_cli.errors import OptionError
from neuralink_cli.ordering.partners import likely_partners, strongest_links
from neuralink_cli.placement.bits import transpose_bits

matrices = st.tuples(st.integers(0, 70), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape))


def bits_of(fired: np.ndarray) -> np.ndarray:
    return transpose_bits(np.packbits(fired, axis=1, bitorder="little"), fired.shape[1])


@given(matrices, st.integers(1, 5))
def test_likely_partners_have_the_largest_cosine(fired: np.ndarray, per_neuron: int) -> None:
    counts = fired.T.astype(int) @ fired
    found = likely_partners(bits_of(fired), per_neuron)
    for i, row in enumerate(found):
        others = [j for j in range(counts.shape[0]) if j != i and counts[i, j]]
        # Multiplied as the kernel does, so that equal scores are equal here too.
        best = sorted(others, key=lambda j: (-(float(counts[i, j]) ** 2 * (1 / counts[j, j])), j))[:per_neuron]
        assert row[row >= 0].tolist() == best


@given(matrices, st.integers(1, 5))
def test_strongest_links_are_the_strongest_of_either_end(fired: np.ndarray, per_neuron: int) -> None:
    counts = fired.T.astype(int) @ fired
    n = counts.shape[0]
    expected = set()
    for i in range(n):
        others = sorted((j for j in range(n) if j != i and counts[i, j]), key=lambda j: (-counts[i, j], j))
        expected |= {(min(i, j), max(i, j)) for j in others[:per_neuron]}
    first, second, count = strongest_links(bits_of(fired), per_neuron)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == sorted(expected)
    assert count.tolist() == [counts[a, b] for a, b in sorted(expected)]


def test_the_number_of_threads_does_not_matter() -> None:
    fired = np.random.default_rng(0).random((300, 500)) < 0.1
    bits = bits_of(fired)
    assert np.array_equal(likely_partners(bits, 7, workers=1), likely_partners(bits, 7, workers=3))


def test_no_partners_cannot_be_asked_for() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        likely_partners(np.zeros((3, 1), dtype=np.uint64), 0)
