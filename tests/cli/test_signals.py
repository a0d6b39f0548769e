"""Signals at any moment: one line, the documented exit code, and what is said of the leftovers is true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.faults import hold_flushes
from tests.layouts import LayoutFactory, Made
from tests.processes import Command, run_command

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return LayoutFactory(tmp_path_factory.mktemp("large")).bundled("opt", neurons=6144, hidden=512)


def start_writing(made: Made, folder: Path, prepare: Callable[[], object]) -> Command:
    arguments = ("relayout", made.model, "--placement", made.placement, "-o", folder / "out", "-q")
    process = Command(*arguments, prepare=prepare)
    while not any((folder / ".out.partial").glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_does_not_stop_the_clearing_up(tmp_path: Path, large: Made, number: signal.Signals) -> None:
    for delay in (0.0, 0.01, 0.04):
        process = start_writing(large, tmp_path, hold_flushes)
        process.send_signal(number)
        time.sleep(delay)
        process.send_signal(number)
        stdout, stderr = process.communicate()
        assert (process.returncode, stdout) == (CODES[number], "")
        assert stderr.endswith("; nothing unfinished was left behind\n")
        assert stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def as_from_a_terminal() -> None:
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "neuralink_cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_from_a_terminal,
    )


def test_ctrl_c_while_modules_are_imported_is_no_traceback() -> None:
    began = time.monotonic()
    assert start("architectures").wait() == 0
    whole = time.monotonic() - began
    codes = set()
    for delay in np.random.default_rng(0).uniform(0.1 * whole, whole, 8):
        process = start("architectures")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        codes.add(process.returncode)
        if process.returncode == 130:
            assert stderr.count("\n") <= 1
            assert "Traceback" not in stderr
    # Before Python has come to our code it is Python's own.
    assert codes <= {0, 1, 130, -signal.SIGINT}


def test_a_hangup_is_ignored_where_nohup_said_so(large: Made, tmp_path: Path) -> None:
    process = start_writing(large, tmp_path, partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    assert (process.wait(), process.communicate()[1]) == (0, "")


@pytest.mark.parametrize("good", [True, False])
def test_a_stderr_that_cannot_be_written_changes_no_exit_code(layouts: LayoutFactory, good: bool) -> None:
    made = layouts.bundled()
    reader, gone = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("w") as full:
        for descriptor in (full.fileno(), gone):
            process = run_command(
                "verify", made.model, made.layout if good else made.model, prepare=partial(os.dup2, descriptor, 2)
            )
            assert process.returncode == (0 if good else 3)
            assert process.stdout.startswith("verified") == good
    os.close(gone)
