import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuralink_cli.errors import OptionError, UnsupportedError
from neuralink_cli.ordering import counting
from neuralink_cli.ordering.counting import coactivation_counts
from neuralink_cli.ordering.partners import strongest_links
from neuralink_cli.placement.bits import transpose_bits


def pack(fired: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    tokens, n = fired.shape
    return transpose_bits(np.packbits(fired, axis=1, bitorder="little").reshape(tokens, -(-n // 8)), n)


def random_fired(tokens: int, n: int, seed: int) -> npt.NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    return rng.random((tokens, n)) < rng.random(n)


def product(fired: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return fired.T.astype(np.int64) @ fired.astype(np.int64)


@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 2**32))
@example(0, 3, 0)
@example(3, 0, 0)
@example(64 * counting.DEPTH + 130, 9, 0)
@example(100, 3 * counting.STRIPE + 5, 0)
@settings(deadline=None)
def test_counts_are_the_matrix_product(tokens: int, n: int, seed: int) -> None:
    fired = random_fired(tokens, n, seed)
    counts = coactivation_counts(pack(fired))
    assert counts.dtype == np.uint16
    assert np.array_equal(counts, np.triu(product(fired)))


def test_counts_do_not_depend_on_the_number_of_workers() -> None:
    bits = pack(random_fired(300, 500, 1))
    assert np.array_equal(coactivation_counts(bits, workers=1), coactivation_counts(bits, workers=5))


@pytest.mark.parametrize(("tokens", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_counts_have_the_narrowest_type_that_holds_them(tokens: int, dtype: type) -> None:
    counts = coactivation_counts(pack(np.ones((tokens, 5), dtype=bool)))
    assert counts.dtype == dtype
    assert np.array_equal(counts, np.triu(np.full((5, 5), tokens)))


@given(st.integers(0, 60), st.integers(0, 40), st.integers(1, 45), st.integers(0, 2**32))
@example(50, 2 * counting.STRIPE + 3, 4, 0)
@settings(deadline=None)
def test_strongest_links_are_the_strongest_of_either_end(tokens: int, n: int, per_neuron: int, seed: int) -> None:
    fired = random_fired(tokens, n, seed)
    counts = product(fired)
    expected: dict[tuple[int, int], int] = {}
    for i in range(n):
        partners = sorted((j for j in range(n) if j != i and counts[i, j] > 0), key=lambda j: (-counts[i, j], j))
        expected |= {(min(i, j), max(i, j)): counts[i, j] for j in partners[:per_neuron]}
    first, second, count = strongest_links(pack(fired), per_neuron)
    assert first.dtype == second.dtype == np.int32
    assert count.dtype == np.uint32
    assert list(zip(zip(first, second, strict=True), count, strict=True)) == sorted(expected.items())


def test_strongest_links_want_at_least_one() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        strongest_links(np.zeros((3, 1), dtype=np.uint64), 0)


def test_counts_have_as_many_bits_as_they_need_and_never_too_few() -> None:
    largest = {2**16 - 1: np.uint16, 2**16: np.uint32, 2**32 - 1: np.uint32}
    for count, dtype in largest.items():
        assert counting.count_dtype(np.array([3, count])) == dtype
    assert counting.count_dtype(np.zeros(0, np.int64)) == np.uint16
    with pytest.raises(UnsupportedError, match="fired 4,294,967,296 times, more than 32 bits count"):
        counting.count_dtype(np.array([2**32, 3]))
