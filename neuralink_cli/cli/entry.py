"""Runs the command line: every failure becomes one line on stderr and a documented exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import click

from neuralink_cli.cli import exit_codes
from neuralink_cli.cli.commands import cli
from neuralink_cli.cli.output import set_defaults
from neuralink_cli.errors import NeuralinkError

DEBUG_VARIABLE = "NEURALINK_DEBUG"
COMPLETION_VARIABLE = "_NEURALINK_COMPLETE"


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt so that outputs are cleaned up on the way out."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. The traceback of a failure is shown only if NEURALINK_DEBUG is set."""
    try:
        with _sigterm_raises():
            set_defaults()
            _invoke(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        return _fail(f"interrupted; {_left_behind(stop)}", exit_codes.INTERRUPTED)
    except Terminated as stop:
        return _fail(f"terminated; {_left_behind(stop)}", exit_codes.TERMINATED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): say nothing. Python would still complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    except NeuralinkError as error:
        return _fail(str(error), exit_codes.exit_code(error))
    except MemoryError:
        return _fail("out of memory; try smaller batches or fewer jobs", exit_codes.OUT_OF_MEMORY)
    except OSError as error:
        return _fail(_describe(error), exit_codes.OUTPUT)
    except Exception as error:
        kind = f"{type(error).__name__}: {' '.join(str(error).split())}"
        advice = f"this is a bug, please report it with the output of {DEBUG_VARIABLE}=1"
        return _fail(f"internal error ({kind}); {advice}", exit_codes.INTERNAL)


def _invoke(arguments: Sequence[str]) -> None:
    """As `cli.main`, which would turn a broken pipe into exit code 1."""
    if COMPLETION_VARIABLE in os.environ:
        cli.main(prog_name="neuralink")
    with cli.make_context("neuralink", list(arguments)) as context:
        cli.invoke(context)


def _left_behind(stop: BaseException) -> str:
    """What happened to unfinished output: the command's message if it keeps any."""
    return str(stop) or "nothing unfinished was left behind"


def _describe(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        what = "the disk is full; free some space or write elsewhere"
    return f"{error.filename}: {what}" if error.filename else what


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    click.echo(f"neuralink: error: {message}", err=True)
    return code


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
