"""A run with the runtime in C that is stopped: one line, the documented exit code, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from neuralink_cli.models.tokenizer import load_tokenizer
from neuralink_cli.runtime import c_engine, c_session
from tests.examples.conftest import CRuntime
from tests.examples.test_c_runtime_models import TINY_RELU, lay_out
from tests.processes import Command, run_command

ENGINE = """#!/bin/sh
echo $$ > {pid}
echo 'memory {{"cache_bytes": 0}}'
echo 'model {{"direct": true}}'
read request
echo 'token 5'
{then}
"""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = lay_out(tmp_path_factory.mktemp("tiny_relu"), TINY_RELU, threshold=0.0)
    load_tokenizer(made)  # so that forked commands have it loaded
    return made


def write_engine(folder: Path, then: str) -> Path:
    """A program that begins to answer, and then does something else; it leaves its process id in `pid`."""
    program = folder / "flash_run"
    program.write_text(ENGINE.format(pid=folder / "pid", then=then))
    program.chmod(0o755)
    return program


def command_line(layout: Path, program: Path) -> tuple[object, ...]:
    return ("run", layout, "--prompt", "The river", "--engine", "c", "--engine-path", program)


def wait_for_number(path: Path) -> int:
    while not path.exists() or not path.read_text().endswith("\n"):
        time.sleep(0.01)
    return int(path.read_text())


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_both(layout: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = Command(*command_line(layout, write_engine(tmp_path, "exec sleep 60")))
    engine = wait_for_number(tmp_path / "pid")
    command.send_signal(number)
    _, stderr = command.communicate()
    assert command.returncode == CODES[number]
    assert stderr.endswith("; nothing unfinished was left behind\n")
    assert stderr.count("\n") == 1
    assert not is_there(engine)


def test_a_signal_while_it_starts_ends_both(layout: Path, tmp_path: Path) -> None:
    start = c_engine._start

    def interrupted(command: list[str]) -> subprocess.Popen[str]:
        process = start(command)
        (tmp_path / "started").write_text(str(process.pid))
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    def prepare() -> None:
        c_engine._start = interrupted

    result = run_command(*command_line(layout, write_engine(tmp_path, "exec sleep 60")), prepare=prepare)
    assert result.returncode == 143
    assert not is_there(int((tmp_path / "started").read_text()))


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        ("kill -9 $$", 9, "was killed by signal 9 before it answered; if the system had no memory left"),
        ("kill -INT $$", 130, "interrupted; nothing unfinished was left behind"),  # Ctrl-C, and it was quicker.
        ("exit 1", 9, "stopped before it answered; run it by hand"),
    ],
)
def test_a_program_that_ends_is_told(layout: Path, tmp_path: Path, then: str, code: int, said: str) -> None:
    # In a process of its own, where no signal is ignored.
    outcome = run_command(*command_line(layout, write_engine(tmp_path, then)))
    assert outcome.returncode == code
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not is_there(wait_for_number(tmp_path / "pid"))


def test_a_stdout_that_cannot_be_written_ends_both(layout: Path, tmp_path: Path) -> None:
    program = write_engine(tmp_path, "exec sleep 60")
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("w") as full:
        results = [
            run_command(*command_line(layout, program), prepare=partial(os.dup2, descriptor, 1))
            for descriptor in (writer, full.fileno())
        ]
    os.close(writer)
    full_disk = "neuralink: error: the disk is full; free some space or write elsewhere\n"
    assert [(result.returncode, result.stderr) for result in results] == [(141, ""), (6, full_disk)]
    assert not is_there(wait_for_number(tmp_path / "pid"))


def test_the_program_ends_when_nobody_reads_it(c_runtime: CRuntime, layout: Path) -> None:
    """As when the command is killed, which then can end nothing itself."""
    process = subprocess.Popen(
        [c_runtime.checked / "flash_run", layout],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("generate 250 1 2 3\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("token ")
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGPIPE
    process.communicate()


def test_the_program_ends_with_its_stdin_if_told_so(c_runtime: CRuntime, layout: Path) -> None:
    process = subprocess.Popen(
        [c_runtime.checked / "flash_run", "--end-with-stdin", layout],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    # More answers than the pipe takes, which nobody reads.
    process.stdin.write("generate 250 1 2 3\n" * 200)
    process.stdin.flush()
    assert process.stdout.readline().startswith("token ")
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="opens a pipe by its name in /proc")
def test_the_program_ends_with_a_command_that_is_killed(c_runtime: CRuntime, layout: Path, tmp_path: Path) -> None:
    """Also if what it writes could still be read, so that writing tells it nothing."""
    program = tmp_path / "flash_run"
    run = f'"{c_runtime.checked}/flash_run" "$@" 3</proc/self/fd/1'
    program.write_text(f'#!/bin/sh\n{run}\necho $? > "{tmp_path}/status"\n')
    program.chmod(0o755)

    def kill_at_the_first_token() -> None:
        c_session._Stream.add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    command = (*command_line(layout, program), "--max-new-tokens", 200)
    assert run_command(*command, prepare=kill_at_the_first_token).returncode == -signal.SIGKILL
    assert wait_for_number(tmp_path / "status") == 1


@pytest.mark.parametrize("request_line", ["generate 3 1 2 3", "logits 1 2 3", "perplexity 1 2 3", "shout"])
def test_answers_that_cannot_be_written_are_an_error(c_runtime: CRuntime, layout: Path, request_line: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [c_runtime.checked / "flash_run", "--json", layout],
            input=f"{request_line}\n" * 2,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, "flash_run: answers cannot be written to stdout\n")
