"""Runs the command line: every failure becomes one line on stderr and a documented exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import click

from neuralink_cli.cli import exit_codes
from neuralink_cli.cli.commands import cli, commands_with
from neuralink_cli.cli.output import lenient_stderr, set_defaults
from neuralink_cli.errors import ABOVE_LIMIT, NeuralinkError, printable, shorten
from neuralink_cli.profiling.launch import Launch, find_launch
from neuralink_cli.signals import HungUp, Terminated, ignore_signals, stopping_signals, was_stopped_again

# Of these it does not matter which rank of several tells.
_OF_ALL = (
    exit_codes.USAGE,
    exit_codes.WORKER,
    exit_codes.HUNG_UP,
    exit_codes.INTERRUPTED,
    exit_codes.TERMINATED,
)
_OUT_OF_MEMORY = "out of memory; try smaller batches or fewer jobs"
DEBUG_VARIABLE = "NEURALINK_DEBUG"
COMPLETION_VARIABLE = "_NEURALINK_COMPLETE"


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. The traceback of a failure is shown only if NEURALINK_DEBUG is set."""
    with lenient_stderr():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    launch = _launch(arguments)
    fail = partial(_fail, launch)
    try:
        with stopping_signals():
            set_defaults()
            _invoke(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        _once(launch, partial(_show, error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        return fail(f"interrupted; {_left_behind(stop)}", exit_codes.INTERRUPTED)
    except Terminated as stop:
        return fail(f"terminated; {_left_behind(stop)}", exit_codes.TERMINATED)
    except HungUp as stop:
        return fail(f"the terminal went away; {_left_behind(stop)}", exit_codes.HUNG_UP)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): say nothing. Python would still complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    except NeuralinkError as error:
        return fail(str(error), exit_codes.exit_code(error))
    except MemoryError:
        return fail(_OUT_OF_MEMORY, exit_codes.OUT_OF_MEMORY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return fail(_OUT_OF_MEMORY, exit_codes.OUT_OF_MEMORY)
        return fail(_describe(error), exit_codes.OUTPUT)
    except Exception as error:
        kind = f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}"
        advice = f"this is a bug, please report it with the output of {DEBUG_VARIABLE}=1"
        return fail(f"internal error ({kind}); {advice}", exit_codes.INTERNAL)


def _invoke(arguments: Sequence[str]) -> None:
    """As `cli.main`, which would turn a broken pipe into exit code 1."""
    if COMPLETION_VARIABLE in os.environ:
        cli.main(prog_name="neuralink")
    with cli.make_context("neuralink", list(arguments)) as context:
        cli.invoke(context)


def _show(error: click.ClickException) -> None:
    """As click shows a wrong usage, but in few words whatever was typed."""
    if isinstance(error, click.NoSuchOption):
        error = click.NoSuchOption(error.option_name, error.format_message() + _whose(error), ctx=error.ctx)
    shown = io.StringIO()
    error.show(file=shown)
    click.echo("\n".join(shorten(line) for line in shown.getvalue().splitlines()), err=True)


def _whose(error: click.NoSuchOption) -> str:
    """Of an option that is not there, the commands that have it."""
    others = commands_with(error.option_name)
    if not others:
        return ""
    where = "; options come after the command's name" if error.ctx is not None and error.ctx.command is cli else ""
    return f" It is an option of {', '.join(others)}{where}."


def _left_behind(stop: BaseException) -> str:
    """What a command that keeps its unfinished output says of it."""
    if str(stop):
        return str(stop)
    if was_stopped_again():
        return "stopped again while clearing up, so a hidden .partial may be left: the next run takes it over"
    return "nothing unfinished was left behind"


def _describe(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        what = "the disk is full; free some space or write elsewhere"
    elif error.errno == errno.EFBIG:
        what = f"a file would become larger than allowed ({what}); {ABOVE_LIMIT}"
    elif not error.filename:
        what = f"reading or writing failed ({what}); check the storage, and where stdout goes"
    return f"{error.filename}: {what}" if error.filename else what


def _fail(launch: Launch | None, message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    rank = "" if launch is None or code in _OF_ALL else f"rank {launch.rank}: "
    _once(launch, lambda: click.echo(shorten(f"neuralink: error: {rank}{printable(message)}"), err=True))
    return code


def _launch(arguments: Sequence[str]) -> Launch | None:
    """The place of this process among several that run one command, if there are. Only `profile` has several."""
    if [*arguments[:1]] != ["profile"]:
        return None
    try:
        return find_launch(os.environ)
    except NeuralinkError:
        # Of what is wrong the command tells.
        return None


def _once(launch: Launch | None, tell: Callable[[], object]) -> None:
    """Tell of a failure. Of several processes that run one command one tells for all."""
    if launch is None:
        tell()
        return
    try:
        from neuralink_cli.profiling.meeting import tell_once
    except ImportError:
        tell()
        return
    # torchrun stops the others as soon as one has failed, and whoever tells why must not be cut short.
    ignore_signals()
    tell_once(launch, tell)
