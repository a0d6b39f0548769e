"""Options that several commands share, as decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.output import set_verbosity
from neuralink_cli.errors import InputError
from neuralink_cli.files.input_file import read_input

Function = TypeVar("Function", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

# A string: a directory and a hub id are told apart by looking, and a path would lose how it was written.
model_argument = click.argument("model")

revision_option = click.option(
    "--revision", metavar="REVISION", help="Branch, tag or commit of a hub MODEL.  [default: main]"
)

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")


def architecture_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--architecture FILE` or `--infer-architecture`; they become the one parameter `architecture`."""

    @click.option(
        "--architecture",
        "architecture_file",
        type=PATH,
        metavar="FILE",
        help="JSON description of an architecture that is not built in.",
    )
    @click.option(
        "--infer-architecture",
        is_flag=True,
        help="Find the FFN tensors of an architecture that is not built in by their names and shapes, and print it as "
        "JSON for review.",
    )
    @functools.wraps(function)
    def with_choice(*arguments: Any, architecture_file: Path | None, infer_architecture: bool, **options: Any) -> Any:
        choice = ArchitectureChoice(architecture_file, infer_architecture)
        return function(*arguments, architecture=choice, **options)

    return with_choice


def output_option(metavar: str, text: str) -> Callable[[Function], Function]:
    """`-o/--output`, required."""
    return click.option("-o", "--output", required=True, type=PATH, metavar=metavar, help=text)


def reporting_options(function: Function) -> Function:
    """`--json`, `-q`, `-v`: how results and progress are shown. Adds the parameter `as_json`."""
    function = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=lambda _c, _p, value: set_verbosity(verbose=value),
        help="Say more on stderr.",
    )(function)
    function = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=lambda _c, _p, value: set_verbosity(quiet=value),
        help="No progress and no remarks on stderr, only errors.",
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file.

    Raises:
        InputError: It cannot be read, or is not text.
    """
    try:
        return read_input(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"cannot be read as text ({error.reason} at byte {error.start})", where=path) from None
