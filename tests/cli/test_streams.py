"""Where output goes, and what happens when it cannot go there. Each run is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import LayoutFactory
from tests.processes import run_command

Result = subprocess.CompletedProcess[str]


def start(*arguments: object, env: Mapping[str, str] | None = None, **options: Any) -> Result:
    """Run the command line and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "neuralink_cli", *map(str, arguments)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
        **options,
    )


def closed(descriptor: int) -> Any:
    return lambda: os.close(descriptor)


@pytest.fixture(scope="module")
def gone() -> int:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_results_go_to_stdout_and_progress_to_stderr(tmp_path: Path, layouts: LayoutFactory) -> None:
    model, placement = layouts.checkpoint()
    result = run_command("relayout", model, "--placement", placement, "-o", tmp_path / "out")
    assert result.returncode == 0
    assert result.stdout.startswith(f"{tmp_path / 'out'}: bundled layout of 2 blocks takes ")
    assert result.stdout.count("\n") == 2
    assert "relayout: done, " in result.stderr
    assert "relayout" not in result.stdout.removeprefix(str(tmp_path))


def test_quiet_is_quiet(tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    result = run_command("verify", made.model, made.layout, "--quiet", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["verified"] is True


@pytest.mark.parametrize("command", [("architectures",), ("--help",), ("verify", "--help"), ("--version",)])
def test_a_reader_that_goes_away_is_no_failure_of_anything(gone: int, command: tuple[str, ...]) -> None:
    """Above all it is not exit code 1, which says that a layout is wrong."""
    result = start(*command, stdout=gone)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_reader_that_goes_away_does_not_undo_what_was_done(tmp_path: Path, gone: int, layouts: LayoutFactory) -> None:
    model, placement = layouts.checkpoint()
    unread = partial(os.dup2, gone, 1)
    result = run_command("relayout", model, "--placement", placement, "-o", tmp_path / "out", "-q", prepare=unread)
    assert (result.returncode, result.stderr) == (141, "")
    assert run_command("verify", model, tmp_path / "out", "-q").returncode == 0


@pytest.mark.parametrize("command", ["architectures", "--help"])
def test_a_full_device_is_said(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = start(command, stdout=full)
    assert result.returncode == 6
    assert result.stderr == "neuralink: error: the disk is full; free some space or write elsewhere\n"


def test_works_without_stdout(layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    result = run_command("verify", made.model, made.layout, "-q", prepare=closed(1))
    assert (result.returncode, result.stderr) == (0, "")
    result = run_command("verify", made.model, made.model, prepare=closed(1))
    assert result.returncode == 3
    assert result.stderr.startswith("neuralink: error: ")


def test_a_library_finds_a_stderr_even_if_there_is_none() -> None:
    """Versions of numpy look for its `write` when they are imported."""
    code = "import sys; from neuralink_cli.cli import output\nwith output.lenient_stderr(): sys.stderr.write('lost')"
    result = subprocess.run(
        [sys.executable, "-c", code + "\nprint(sys.stderr)"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=closed(2),
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "None\n")


def test_works_without_stderr(tmp_path: Path, layouts: LayoutFactory) -> None:
    made = layouts.bundled()
    output = tmp_path / "out"
    result = run_command("relayout", made.model, "--placement", made.placement, "-o", output, prepare=closed(2))
    assert result.returncode == 0
    assert "bundled layout" in result.stdout
    assert run_command("verify", made.model, made.model, prepare=closed(2)).returncode == 3


def test_a_name_that_is_no_text_is_no_trouble(tmp_path: Path, layouts: LayoutFactory) -> None:
    """A path of bytes that are not UTF-8, where stdout is strict about that."""
    model, placement = layouts.checkpoint()
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    arguments = ("relayout", model, "--placement", placement, "-o", output)
    result = run_command(*arguments, "-q")
    assert (result.returncode, result.stderr) == (0, "")
    assert os.fsencode(result.stdout).startswith(os.fsencode(output) + b": bundled layout")
    assert run_command("verify", model, output, "-q", "--json").returncode == 0
    again = run_command(*arguments)
    assert again.returncode == 6
    assert again.stderr.startswith("neuralink: error: ")
    assert again.stderr.count("\n") == 1


def test_a_traceback_is_shown_only_if_asked_for(tmp_path: Path) -> None:
    plain = run_command("verify", tmp_path / "absent", tmp_path)
    assert plain.stderr.count("\n") == 1
    asked = partial(os.environ.update, NEURALINK_DEBUG="1")
    debug = run_command("verify", tmp_path / "absent", tmp_path, prepare=asked)
    assert debug.stderr.startswith("Traceback (most recent call last):\n")
    assert debug.stderr.endswith(plain.stderr)
    assert plain.returncode == debug.returncode == 3


def test_completion_for_the_shell_is_there() -> None:
    script = start(env={"_NEURALINK_COMPLETE": "bash_source"})
    assert script.returncode == 0
    assert "_neuralink_completion" in script.stdout
    words = {"_NEURALINK_COMPLETE": "bash_complete", "COMP_WORDS": "neuralink re", "COMP_CWORD": "1"}
    assert start(env=words).stdout.split() == ["plain,relayout", "plain,restore", "plain,report"]


def test_an_internal_error_is_one_line_that_asks_for_a_report() -> None:
    script = (
        "import sys; from neuralink_cli.cli import entry, architectures;"
        "architectures.command.callback = lambda **_: 1 / 0;"
        "sys.exit(entry.run(['architectures']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (70, "")
    assert result.stderr == (
        "neuralink: error: internal error (ZeroDivisionError: division by zero); this is a bug, please report it with "
        "the output of NEURALINK_DEBUG=1\n"
    )
