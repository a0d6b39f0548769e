"""Layouts are compared with the same DRAM, whatever each uses it for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from neuralink_cli.bench.bench import BenchOptions, BenchReport, bench_layouts
from neuralink_cli.errors import OptionError
from neuralink_cli.storage.budget import DramBudget
from tests.checkpoints import write_random_trace
from tests.layouts import LayoutFactory

A_FIFTH = BenchOptions(dram=DramBudget(fraction=0.2))


@pytest.fixture(scope="module")
def pair(layouts: LayoutFactory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A layout with all parts in its bundles, one of the same model with resident rows, and a trace."""
    plain, resident = layouts.bundled("llama"), layouts.bundled("llama", resident="gate")
    trace = write_random_trace(plain.model, tmp_path_factory.mktemp("pair") / "trace", seed=3)
    return plain.layout, resident.layout, trace


def taken(report: BenchReport, layout: Path) -> int:
    """DRAM that a layout takes with a cache."""
    (row,) = {row.dram_bytes for row in report.rows if row.way.layout == str(layout) and row.way.cache != "none"}
    return row


def test_a_share_gives_both_the_bytes_that_one_of_them_needs(pair: tuple[Path, Path, Path]) -> None:
    plain, resident, trace = pair
    report = bench_layouts([plain, resident], trace, A_FIFTH)
    alone = bench_layouts([resident], trace, A_FIFTH)
    assert taken(report, resident) == taken(alone, resident)
    # The same but for what is lost by rounding to bundles, at most one of each of the two blocks.
    assert abs(taken(report, plain) - taken(report, resident)) < 2 * 1024
    assert taken(report, plain) > taken(bench_layouts([plain], trace, A_FIFTH), plain)
    ways = [row.way for row in report.rows if row.way.layout is not None]
    assert len({way.baseline for way in ways if way.collapse and way.cache != "none"}) == 1


def test_resident_rows_count_as_bytes(pair: tuple[Path, Path, Path]) -> None:
    _, resident, trace = pair
    with pytest.raises(OptionError, match="keeps resident"):
        bench_layouts([resident], trace, BenchOptions(dram=DramBudget(bytes=100)))


def test_what_else_differs_is_told(pair: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    plain, resident, trace = pair
    caplog.set_level(logging.INFO, "neuralink_cli")
    bench_layouts([plain, resident], trace, A_FIFTH)
    assert f"bundles of {plain} have " in caplog.text
    caplog.clear()
    bench_layouts([plain], trace, A_FIFTH)
    assert "bundles of" not in caplog.text
