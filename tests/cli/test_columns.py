"""What does not fit 80 columns by itself: long names, many columns, and the figures of large models.

That ordinary output fits is seen of every command line that a test runs in this process: the fixture `neuralink` looks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralink_cli.cli.output import print_table, print_text
from tests.cli.conftest import Neuralink, too_wide
from tests.traces import write_clustered_trace

LONG = "a data set with a long name and many words, of a revision " + "0123456789" * 10


def test_wide_tables_are_set_closer_and_then_go_on_below(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["", "aa", "bb", "cc"], [["x", "1", "2", "3"], ["long name", "4", "5", "6"]], columns=18)
    assert capsys.readouterr().out.splitlines() == [
        "          aa bb cc", "x          1  2  3", "long name  4  5  6",
    ]  # fmt: skip
    print_table(["", "aa", "bb", "cc"], [["x", "1", "2", "3"], ["name", "4", "5", "6"]], columns=12)
    assert capsys.readouterr().out.splitlines() == [
        "      aa  bb", "x      1   2", "name   4   5", "",
        "      cc", "x      3", "name   6",
    ]  # fmt: skip


def test_names_that_leave_no_room_are_cut_in_the_middle_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "tokens"], [["  + a\x1b[31m", "1"], [LONG, "2"]])
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split() == ["+", "a\\x1b[31m", "1"]
    assert second.startswith("a data set with a") and second.endswith("6789       2")
    assert len(second) <= 80


def test_sentences_below_a_heading_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("one two three four five six", indent=2, columns=20)
    assert capsys.readouterr().out.splitlines() == ["  one two three", "    four five six"]


def test_long_names_of_data_sets_leave_room_for_their_figures(neuralink: Neuralink, tmp_path: Path) -> None:
    trace, placement = tmp_path / "trace", tmp_path / "placement"
    write_clustered_trace(trace, source=LONG)
    for command in (
        ("cluster", trace, "-o", placement, "--effort", "fast"),
        ("inspect", trace),
        ("inspect", placement),
        ("bench", placement, "--trace", trace),
        ("drift", placement, "--trace", trace),
        ("diff", placement, placement, "--trace", trace),
    ):
        outcome = neuralink(*command, "-q")
        assert (outcome.code, outcome.stderr) == (0, "")
        assert outcome.stdout


def test_a_table_of_many_devices_fits(capsys: pytest.CaptureFixture[str]) -> None:
    devices = [f"phone-{k}-with-ufs4.0:hot" for k in range(7)]
    print_table(["made for", *(f"on {name}" for name in devices)], [[name, *7 * ["1.63 (0.987)"]] for name in devices])
    out = capsys.readouterr().out
    assert too_wide(out) == []
    assert out.count("1.63 (0.987)") == 49
