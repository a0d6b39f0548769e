from __future__ import annotations

import io
import re
import signal
import sys

import pytest

from neuralink_cli.cli import output
from neuralink_cli.cli.output import print_command, print_pairs, print_table, progress_bar, remark, set_defaults
from neuralink_cli.signals import Terminated, stopping_signals
from neuralink_cli.sizes import human_bytes, human_number


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234, "1.2 kB"), (5_000_000_000, "5.0 GB"),
        (10**12, "1.0 TB"), (10**16, "10000.0 TB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2310.4, "2,310"), (0.434, "0.434"), (99.96, "100"), (1234567.0, "1,230,000"), (1.5e-7, "0.00000015"), (0.0, "0")],
)
def test_figures_have_no_exponent(value: float, text: str) -> None:
    assert human_number(value) == text


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["", "active"], [["layers.0", "1%"], ["x", "100%"]])
    assert capsys.readouterr().out.splitlines() == ["          active", "layers.0      1%", "x           100%"]
    print_table(["a", "b"], [])
    assert capsys.readouterr().out == "a  b\n"


@pytest.mark.parametrize("total", [10, None])
def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], total: int | None) -> None:
    set_defaults()
    with progress_bar("stage", total, "B") as advance:
        advance(4)
        advance(6)
    out, err = capsys.readouterr()
    assert out == ""
    assert "stage" in err
    assert err.endswith("\n")


def test_progress_in_a_log_is_a_line_at_the_start_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_defaults()
    with progress_bar("cluster", 3, "block") as advance:
        advance(1)
        advance(2)
    with progress_bar("fetch", None, "B") as advance:
        advance(2000)
    assert capsys.readouterr().err.splitlines() == [
        "cluster: 3 blocks", "cluster: done, 3 blocks in 1 s", "fetch: started", "fetch: done, 2.0 kB in 1 s",
    ]  # fmt: skip
    # A long run says now and then how far it is; one that fails does not say that it is done.
    monkeypatch.setattr(output, "_SECONDS_BETWEEN_LINES", 0.0)
    with pytest.raises(KeyError), progress_bar("cluster", 3, "block") as advance:
        advance(1)
        raise KeyError
    assert capsys.readouterr().err.splitlines() == ["cluster: 3 blocks", "cluster: 1 block of 3 blocks after 1 s"]


def test_values_are_wrapped_beside_their_labels(capsys: pytest.CaptureFixture[str]) -> None:
    print_pairs([("what", "one two three four five"), ("sizes", "6"), ("sizes", "7\n8")], columns=20)
    assert capsys.readouterr().out.splitlines() == [
        "what   one two three",
        "       four five",
        "sizes  6",
        "       7 8",
    ]


def test_commands_are_cut_between_options(capsys: pytest.CaptureFixture[str]) -> None:
    print_command("neuralink cluster 'a b' -o out.safetensors --effort fast", columns=40)
    assert capsys.readouterr().out.splitlines() == [
        "  neuralink cluster 'a b' \\", "      -o out.safetensors --effort fast",
    ]  # fmt: skip


def test_a_bar_on_a_terminal_goes_away_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("stage", 10, "B") as advance:
        advance(10)
    assert "stage" in terminal.getvalue()
    assert not terminal.getvalue().endswith("\n")


def test_a_bar_is_cleared_whenever_a_signal_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said then has a line of its own: also if the signal comes while the bar is drawn for the first time."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            first = "stage" in text and "stage" not in self.getvalue()
            written = super().write(text)
            if first:
                signal.raise_signal(signal.SIGTERM)
            return written

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    set_defaults()
    with pytest.raises(Terminated), stopping_signals(), progress_bar("stage", 10, "B"):
        pass
    shown = terminal.getvalue()
    assert "stage" in shown
    assert shown.rsplit("\r", 2)[1].isspace()
    assert shown.endswith("\r")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_remark_has_a_line_of_its_own_while_a_bar_is_shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    set_defaults()
    with progress_bar("stage", 10, "B") as advance:
        advance(4)
        remark("something else")
        advance(6)
    assert "neuralink: something else" in re.split(r"[\r\n]", stream.getvalue())
    assert "stage" in stream.getvalue()
