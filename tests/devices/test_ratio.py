"""Bootstrap intervals of ratios."""

from __future__ import annotations

import numpy as np
import pytest

from neuralink_cli.devices.ratio import Ratio, bootstrap_ratios


def test_the_value_is_the_ratio_of_the_totals_and_lies_in_its_interval() -> None:
    random = np.random.default_rng(0)
    top, bottom = random.gamma(3, 1, 200), random.gamma(3, 2, 200)
    (found,) = bootstrap_ratios([(top, bottom)])
    assert found.value == pytest.approx(top.sum() / bottom.sum())
    assert found.low < found.value < found.high


def test_the_interval_is_that_of_the_normal_approximation_for_many_sequences() -> None:
    random = np.random.default_rng(1)
    bottom = random.gamma(20, 1, 4000)
    top = 1.5 * bottom + random.normal(0, 3, 4000)
    (found,) = bootstrap_ratios([(top, bottom)])
    deviation = np.std(top - found.value * bottom) / bottom.mean() / np.sqrt(4000)
    assert found.low == pytest.approx(found.value - 1.96 * deviation, abs=0.15 * deviation)
    assert found.high == pytest.approx(found.value + 1.96 * deviation, abs=0.15 * deviation)


def test_ratios_that_never_vary_have_no_width() -> None:
    bottom = np.arange(1.0, 50.0)
    assert bootstrap_ratios([(2 * bottom, bottom)])[0] == Ratio(2.0, 2.0, 2.0)


def test_the_same_arguments_give_the_same_interval_whatever_else_is_asked() -> None:
    random = np.random.default_rng(2)
    pairs = [(random.random(30), random.random(30)) for _ in range(3)]
    assert bootstrap_ratios(pairs)[1:] == bootstrap_ratios(pairs[1:])


def test_one_sequence_and_nothing_read() -> None:
    assert bootstrap_ratios([(np.array([3.0]), np.array([2.0]))]) == [Ratio(1.5, 1.5, 1.5)]
    assert bootstrap_ratios([(np.zeros(4), np.zeros(4))]) == [Ratio(1.0, 1.0, 1.0)]
    assert bootstrap_ratios([]) == []


def test_drawing_fewer_resamples_at_a_time_for_many_sequences_changes_no_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(3)
    pair = (random.random(70), random.random(70))
    (at_once,) = bootstrap_ratios([pair])
    monkeypatch.setattr("neuralink_cli.devices.ratio._CHUNK_COUNTS", 70 * 3)
    (in_parts,) = bootstrap_ratios([pair])
    assert in_parts.low == pytest.approx(at_once.low, rel=1e-12)
    assert in_parts.high == pytest.approx(at_once.high, rel=1e-12)
