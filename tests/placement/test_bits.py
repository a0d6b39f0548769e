import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuralink_cli.errors import InputError
from neuralink_cli.placement.bits import activation_counts, empty_bits, transpose_bits, transpose_into


def random_fired(tokens: int, n: int, seed: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random((tokens, n)) < 0.3


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 2**32))
@example(0, 5, 0)
@example(5, 0, 0)
@example(1025, 1030, 0)
@example(512, 512, 0)
@settings(deadline=None)
def test_transposes_every_bit(tokens: int, n: int, seed: int) -> None:
    fired = random_fired(tokens, n, seed)
    bits = transpose_bits(np.packbits(fired, axis=1, bitorder="little").reshape(tokens, -(-n // 8)), n)
    assert bits.dtype == np.uint64
    assert bits.shape == (n, -(-tokens // 64))
    back = np.unpackbits(bits.view(np.uint8).reshape(n, bits.shape[1] * 8), axis=1, bitorder="little")
    assert np.array_equal(back[:, :tokens], fired.T)
    assert not back[:, tokens:].any()
    assert np.array_equal(activation_counts(bits), fired.sum(axis=0))


def test_ignores_padding_bits_of_the_trace() -> None:
    bits = transpose_bits(np.full((70, 2), 255, dtype=np.uint8), 9)
    assert bits.shape == (9, 2)
    assert activation_counts(bits).tolist() == [70] * 9


def test_reads_arrays_that_are_strided_or_read_only() -> None:
    fired = np.random.default_rng(0).integers(0, 256, (100, 6), dtype=np.uint8)
    expected = transpose_bits(fired[::2, ::2].copy(), 24)
    assert np.array_equal(transpose_bits(fired[::2, ::2], 24), expected)
    fixed = fired[::2, ::2].copy()
    fixed.flags.writeable = False
    assert np.array_equal(transpose_bits(fixed, 24), expected)


@pytest.mark.parametrize(
    "fired", [np.zeros((3, 2), np.int8), np.zeros((3, 3), np.uint8), np.zeros(2, np.uint8), np.zeros((3, 1), np.uint8)]
)
def test_refuses_what_is_not_a_trace(fired: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="block of 10 neurons"):
        transpose_bits(fired, 10)


def test_a_stretch_that_does_not_fit_is_refused() -> None:
    bits = empty_bits(9, 100)
    with pytest.raises(InputError, match="2 words do not hold 165 tokens"):
        transpose_into(np.zeros((101, 2), np.uint8), bits, 1)
