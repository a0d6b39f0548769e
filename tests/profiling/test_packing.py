from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.profiling.packing import FiredBits, pack_fired, pack_on_device

DTYPES: dict[str, type[np.unsignedinteger[Any]]] = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
PACKERS = [pack_fired, pack_on_device]

Packer = Callable[[torch.Tensor, float], FiredBits]


def from_words(words: npt.NDArray[np.unsignedinteger[Any]], dtype: str) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """Floating-point numbers of any bits, as a tensor and, exactly, in float32."""
    signed = words.view(np.int32 if dtype == "float32" else np.int16)
    values = torch.from_numpy(signed.copy()).view(getattr(torch, dtype))
    return values, values.float().numpy()


def check(fired: FiredBits, expected: npt.NDArray[np.bool_]) -> None:
    """Against bool `[tokens, neurons]`."""
    np.testing.assert_array_equal(fired.rows(), np.packbits(expected, axis=1, bitorder="little"))
    assert int(fired.active) == expected.sum()


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_bits_against_numpy(pack: Packer, dtype: str, data: st.DataObject) -> None:
    neurons, tokens = data.draw(st.integers(1, 200)), data.draw(st.integers(0, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kind = DTYPES[dtype]
    words = rng.integers(0, np.iinfo(kind).max, (tokens, neurons), dtype=kind, endpoint=True)
    if data.draw(st.booleans()):
        # Not a number is what has all bits of the exponent and any of the fraction.
        exponent = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}[dtype]
        words[words & exponent == exponent] &= ~kind(np.iinfo(kind).max // 2 - exponent)
    values, exact = from_words(words, dtype)
    magnitudes = np.abs(exact[np.isfinite(exact)])
    threshold = np.float32(
        data.draw(
            st.one_of(
                st.sampled_from(magnitudes.tolist() or [0.0]),
                st.floats(0, np.inf, width=32),
                st.sampled_from([0.0, 1e-45, 65504.0, 65519.0, 65520.0, 3.4028234663852886e38]),
            )
        )
    )
    fired = pack(values, float(threshold))
    assert bool(fired.is_number) == (not np.isnan(exact).any())
    if fired.is_number:
        check(fired, np.abs(exact) > threshold)


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_and_beside_the_threshold(pack: Packer, dtype: str) -> None:
    values = torch.tensor([[1.0, -1.0, 0.0, -0.0, float("inf"), -float("inf")]], dtype=getattr(torch, dtype))
    bits = {t: pack(values, float(np.float32(t))).rows().item() for t in (0.0, 0.999, 1.0, 1.001, np.inf)}
    # A threshold is not rounded to the dtype of the model.
    assert bits == {0.0: 0b110011, 0.999: 0b110011, 1.0: 0b110000, 1.001: 0b110000, np.inf: 0}


@pytest.mark.parametrize("pack", PACKERS)
def test_other_dtypes_count_as_float32(pack: Packer) -> None:
    values = torch.tensor([[1.0, 1.0 + 1e-12, 1.1]], dtype=torch.float64)
    assert pack(values, 1.0).rows().item() == 0b100


@pytest.mark.parametrize("pack", PACKERS)
def test_values_that_are_not_contiguous(pack: Packer) -> None:
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).T[::2]
    check(pack(values, 0.5), values.abs().numpy() > 0.5)


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("neurons", [8, 37])
def test_nan_anywhere_is_noticed(pack: Packer, neurons: int) -> None:
    for column in range(neurons):
        values = torch.ones(3, neurons)
        assert pack(values, 0.5).is_number
        values[1, column] = float("nan") if column % 2 else -float("nan")
        assert not pack(values, 0.5).is_number
