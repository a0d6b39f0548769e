from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralink_cli.activations.threshold import HISTOGRAM_BYTES, MagnitudeHistogram
from neuralink_cli.errors import InputError, UnsupportedError
from neuralink_cli.profiling.firing import firing_rule, magnitude_counts, require_numbers


def threshold_of(values: npt.ArrayLike, ratio: float) -> float:
    histogram = MagnitudeHistogram()
    for part in np.array_split(np.asarray(values, dtype=np.float32), 3):
        histogram.add(magnitude_counts(torch.from_numpy(np.abs(part))))
    return histogram.threshold(ratio)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.sampled_from(["normal", "laplace", "uniform"]))
def test_the_ratio_is_met(seed: int, ratio: float, shape: str) -> None:
    values = getattr(np.random.default_rng(seed), shape)(size=20_000).astype(np.float32)
    threshold = threshold_of(values, ratio)
    assert threshold == np.float32(threshold)
    assert (np.abs(values) > threshold).mean() == pytest.approx(ratio, abs=2e-3)


def bin_of(value: Any) -> tuple[Any, Any]:
    """The edges of the bin of a value, as neighbours among the floats with 8 bits of fraction."""
    fraction, exponent = np.frexp(np.float64(value))
    return np.ldexp(np.floor(fraction * 512), exponent - 9), np.ldexp(np.floor(fraction * 512) + 1, exponent - 9)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.floats(0.01, 0.99), st.sampled_from([1e-3, 0.1, 3.0]))
def test_inside_a_bin_the_threshold_is_where_evenly_spread_values_meet_the_ratio(
    seed: int, size: int, ratio: float, spread: float
) -> None:
    values = np.abs(np.random.default_rng(seed).normal(1, spread, size)).astype(np.float32)
    threshold = threshold_of(values, ratio)
    # A threshold on an edge may be of the bin on either side.
    lower, upper = bin_of(np.nextafter(np.float32(threshold), np.float32(0)))
    inside = np.count_nonzero((values >= lower) & (values < upper))
    greater = np.count_nonzero(values >= upper) + inside * (upper - threshold) / (upper - lower)
    # As exactly as a float32 can say.
    assert greater == pytest.approx(ratio * size, abs=inside * 2**-14 + 1e-6)


def test_values_that_share_a_bin_are_divided_by_the_ratio() -> None:
    values = 1 + np.arange(1000) / 256_000
    for ratio in (0.1, 0.25, 0.5, 0.9):
        assert np.count_nonzero(values > threshold_of(values, ratio)) == pytest.approx(1000 * ratio, abs=1)


def test_an_edge_with_as_many_values_above_as_wanted_is_the_threshold() -> None:
    values = [0.0] * 4 + [1.0] * 3 + [4.0] * 3
    # Exactly three are at least 4, and exactly six beyond the smallest bin.
    assert threshold_of(values, 0.3) == 4
    assert threshold_of(values, 0.6) == 1
    assert threshold_of(values, 0.7) == 0


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
def test_any_scale(scale: float) -> None:
    values = np.random.default_rng(1).normal(size=10_000) * scale
    assert (np.abs(values.astype(np.float32)) > threshold_of(values, 0.2)).mean() == pytest.approx(0.2, abs=2e-3)


def test_zero_where_fewer_are_beyond_zero() -> None:
    values = np.zeros(1000)
    values[:100] = 1
    assert threshold_of(values, 0.5) == 0
    assert 0 < threshold_of(values, 0.05) < 1.01
    assert threshold_of(np.zeros(10), 0.3) == 0


def test_infinite_values_leave_the_threshold_finite() -> None:
    assert np.isfinite(threshold_of(np.full(10, np.inf), 0.3))


def test_signals_by_definition() -> None:
    values = torch.tensor([[-3.0, -0.0, 0.0, 1e-30, 0.5, 7.0, float("inf")]])
    fires = {
        name: firing_rule("layers.0", name, "gate").fires(values, 0.0)[0].tolist()
        for name in ("relu", "relu6", "relu2", "silu")
    }
    assert fires["relu"] == fires["relu6"] == [False, False, False, True, True, True, True]
    # The square of 1e-30 is no float32 other than 0: what the down projection gets is what counts.
    assert fires["relu2"] == [False, False, False, False, True, True, True]
    assert fires["silu"] == [True, False, False, True, True, True, True]
    assert firing_rule("layers.0", "relu", "gate").fires(values, 0.5)[0].tolist() == [False] * 5 + [True] * 2
    assert firing_rule("layers.0", "relu", "intermediate").fires(values, 0.0)[0].tolist() == [
        True, False, False, True, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "relu2", "silu"])
def test_a_signal_at_the_threshold_does_not_fire(activation: str, dtype: torch.dtype) -> None:
    rule = firing_rule("layers.0", activation, "gate")
    values = torch.tensor([[0.5, 2.0, 3.0]], dtype=dtype)
    at = float(rule.signal(values)[0, 1])
    assert rule.fires(values, at)[0].tolist() == [False, False, True]


def test_a_threshold_is_not_rounded_to_the_dtype_of_the_model() -> None:
    values = torch.tensor([[1.0]], dtype=torch.bfloat16)
    rule = firing_rule("layers.0", "relu", "intermediate")
    assert not rule.fires(values, float(np.float32(1.001))).item()
    assert rule.fires(values, float(np.float32(0.999))).item()


@pytest.mark.parametrize("activation", ["relu", "silu", "relu2"])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_nan_stops_the_run(activation: str, threshold: float) -> None:
    values = torch.ones(4, 9)
    values[2, 5] = float("nan")
    with pytest.raises(InputError, match=r"block 'layers\.3' is not a number"):
        firing_rule("layers.3", activation, "gate").fires(values, threshold)
    with pytest.raises(InputError, match=r"block 'layers\.3' is not a number"):
        require_numbers("layers.3", firing_rule("layers.3", activation, "gate").signal(values))


@pytest.mark.parametrize("activation", ["made_up", "prelu", "xielu"])
def test_activations_without_a_function(activation: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{activation}.*--signal intermediate"):
        firing_rule("layers.0", activation, "gate")
    assert firing_rule("layers.0", activation, "intermediate").function is None


@pytest.mark.parametrize("spread", [1e-12, 1.0, 1e9])
def test_a_histogram_takes_what_is_announced(spread: float) -> None:
    """Not 65,536 counts: there is one for each of thousands of experts."""
    values = np.random.default_rng(3).normal(0, spread, 10_000).astype(np.float32)
    counts = magnitude_counts(torch.from_numpy(np.abs(values)))
    tracemalloc.start()
    histograms = [MagnitudeHistogram() for _ in range(20)]
    for histogram in histograms:
        histogram.add(counts)
        histogram.add(counts)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < taken / len(histograms) < HISTOGRAM_BYTES


def test_counts_of_other_processes_are_added() -> None:
    first, second = (
        torch.rand(500, generator=torch.Generator().manual_seed(seed)) * scale for seed, scale in ((1, 1.0), (2, 1e-6))
    )
    ours, both = MagnitudeHistogram(), MagnitudeHistogram()
    ours.add(magnitude_counts(first))
    both.add(magnitude_counts(torch.cat([first, second])))

    def add_up(counts: npt.NDArray[np.int64]) -> None:
        counts += magnitude_counts(second)

    ours.add_up(add_up)
    assert ours.total == both.total == 1000
    assert [ours.threshold(ratio) for ratio in (0.2, 0.5, 0.8)] == [both.threshold(ratio) for ratio in (0.2, 0.5, 0.8)]
