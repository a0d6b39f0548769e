import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuralink_cli.errors import InputError
from neuralink_cli.placement.bits import transpose_bits
from neuralink_cli.placement.held_out import ReadStatistics, read_statistics


@given(st.integers(0, 150), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**32))
@example(0, 3, 0.5, 0)
@example(3, 0, 0.5, 0)
@example(3, 1, 1.0, 0)
@settings(deadline=None)
def test_counts_runs_of_active_slots(tokens: int, n: int, rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fired = rng.random((tokens, n)) < rate
    order = rng.permutation(n).astype(np.int32)[: rng.integers(n + 1)]
    active = reads = 0
    for token in fired:
        reading = False
        for slot in order:
            active += int(token[slot])
            reads += int(token[slot] and not reading)
            reading = bool(token[slot])
    bits = transpose_bits(np.packbits(fired, axis=1, bitorder="little").reshape(tokens, -(-n // 8)), n)
    assert read_statistics(bits, order, tokens) == ReadStatistics(tokens, active, reads)


def test_means() -> None:
    statistics = ReadStatistics(tokens=4, active=12, reads=6)
    assert (statistics.reads_per_token, statistics.mean_read_length) == (1.5, 2.0)
    nothing = ReadStatistics(tokens=0, active=0, reads=0)
    assert (nothing.reads_per_token, nothing.mean_read_length) == (0.0, 0.0)


@pytest.mark.parametrize("order", [[0, 1, 3], [-1, 0, 1]])
def test_refuses_neurons_outside_the_block(order: list[int]) -> None:
    with pytest.raises(InputError, match="outside the block of 3"):
        read_statistics(np.zeros((3, 1), dtype=np.uint64), np.array(order, dtype=np.int32), 5)


def test_refuses_a_wrong_number_of_tokens() -> None:
    with pytest.raises(InputError, match="do not hold 65 tokens"):
        read_statistics(np.zeros((3, 1), dtype=np.uint64), np.arange(3, dtype=np.int32), 65)
