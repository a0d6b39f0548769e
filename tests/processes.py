"""Commands in processes of their own that have nothing left to load: they are forked from this one.

Starting up is most of what a command costs on a tiny model: two seconds, and as much again for torch. A forked process
is a process all the same: it has its own signals, descriptors and exit code, and may be killed. What a test says about
starting up, or of what is read from the environment then, needs `python -m neuralink_cli`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

from neuralink_cli.__main__ import main


class Command:
    """A command line that runs, with the attributes and methods of `subprocess.Popen` that tests use.

    Args:
        arguments: As after `neuralink`.
        prepare: Called in the process before stdout and stderr are opened and the command runs.
        program: What is run there, with the arguments in `sys.argv`.
    """

    def __init__(
        self,
        *arguments: object,
        prepare: Callable[[], object] = lambda: None,
        program: Callable[[], object] = main,
    ) -> None:
        # Files, since nobody reads while the command runs.
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.returncode: int | None = None
        # What is buffered would be written twice.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be([*map(str, arguments)], prepare, program)

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that killed it, or None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """The same, when it has ended."""
        code = self._wait(0)
        assert code is not None
        return code

    def communicate(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr, when it has ended."""
        self.wait()
        written = []
        for file in (self._stdout, self._stderr):
            file.seek(0)
            # As Python reads the names of files.
            written.append(os.fsdecode(file.read()))
        return written[0], written[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it at once."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def _be(self, arguments: list[str], prepare: Callable[[], object], program: Callable[[], object]) -> None:
        """The life of the forked process. It must not come back into the test."""
        code = 1
        try:
            with Path(os.devnull).open() as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(self._stdout.fileno(), 1)
            os.dup2(self._stderr.fileno(), 2)
            # As from a terminal, whatever the runner of the tests ignores.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            # Threads of the tokenizers are gone, and they would say so.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            prepare()
            # Those of pytest are elsewhere.
            sys.stdout = sys.__stdout__ = _stream(1, errors="strict")  # type: ignore[misc]
            sys.stderr = sys.__stderr__ = _stream(2, errors="backslashreplace")  # type: ignore[misc]
            sys.argv = ["neuralink", *arguments]
            program()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            try:
                for stream in (sys.stdout, sys.stderr):
                    if stream is not None:
                        stream.flush()
            finally:
                os._exit(code)


def _stream(descriptor: int, errors: str) -> TextIOWrapper | None:
    """What Python makes of a descriptor as it starts: nothing if it is closed."""
    try:
        return os.fdopen(descriptor, "w", encoding="utf-8", errors=errors)
    except OSError:
        return None


def run_command(*arguments: object, prepare: Callable[[], object] = lambda: None) -> subprocess.CompletedProcess[str]:
    """Run a command line, and wait for it."""
    command = Command(*arguments, prepare=prepare)
    stdout, stderr = command.communicate()
    return subprocess.CompletedProcess([*map(str, arguments)], command.wait(), stdout, stderr)
