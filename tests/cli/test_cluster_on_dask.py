"""`cluster --workers` as people run it: the same bytes, a quiet stderr, and nothing left after Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neuralink_cli.cli.entry import run
from tests.cli.conftest import Neuralink
from tests.traces import write_clustered_trace

COMMAND = [sys.executable, "-m", "neuralink_cli", "cluster"]


def workers_of(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write_clustered_trace(tmp_path / "t", blocks=2, tokens=(300,))
    return tmp_path / "t"


def test_local_workers_write_the_same_bytes_and_say_nothing_of_their_own(trace: Path, tmp_path: Path) -> None:
    """One of them is killed as soon as it is there, and replaced."""
    assert run(["cluster", str(trace), "-o", str(tmp_path / "alone"), "--order", "linked", "-q"]) == 0
    process = subprocess.Popen(
        [*COMMAND, trace, "-o", tmp_path / "p", "--order", "linked", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(workers := workers_of(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.1)
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (tmp_path / "p").read_bytes() == (tmp_path / "alone").read_bytes()
    lines = said.splitlines()
    assert lines[0].startswith("neuralink: each of 2 workers takes about ")
    assert all(line.startswith("cluster: ") for line in lines[1:]), said


def test_ctrl_c_ends_the_workers_and_leaves_nothing(trace: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        # In a session of its own all of whose processes are told, as a terminal does.
        [*COMMAND, trace, "-o", tmp_path / "p", "--effort", "max", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(workers := workers_of(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "neuralink: error: interrupted; nothing unfinished was left behind"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "temporary"]
    assert not list(temporary.iterdir())
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_trace_is_sent_to_workers_only(neuralink: Neuralink, trace: Path, tmp_path: Path) -> None:
    refused = neuralink("cluster", trace, "-o", tmp_path / "p", "--send-trace")
    assert (refused.code, refused.error) == (2, "--send-trace needs --scheduler or --workers")
