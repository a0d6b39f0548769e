"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from neuralink_cli.cli.output import set_verbosity
from neuralink_cli.errors import InputError, OptionError

Function = TypeVar("Function", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

# A string: a directory and a hub id are told apart by looking, and a path would lose how it was written.
model_argument = click.argument("model")

revision_option = click.option(
    "--revision", metavar="REVISION", help="Branch, tag or commit of a hub MODEL.  [default: main]"
)

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")


def architecture_options(function: Function) -> Function:
    """`--architecture FILE` or `--infer-architecture`; adds parameters `architecture_file` and `infer_architecture`."""
    function = click.option(
        "--infer-architecture",
        is_flag=True,
        callback=_exclude("architecture_file"),
        help="Find the FFN tensors of an architecture that is not built in by their names and shapes, and print it as "
        "JSON for review.",
    )(function)
    return click.option(
        "--architecture",
        "architecture_file",
        type=PATH,
        metavar="FILE",
        callback=_exclude("infer_architecture"),
        help="JSON description of an architecture that is not built in.",
    )(function)


def _exclude(other: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Lets an option be given only if the other, of the two that say what the architecture is, is not."""

    def check(context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        if value and context.params.get(other):
            raise OptionError("--architecture and --infer-architecture both say what it is", fix="drop one of them")
        return value

    return check


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
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as text ({error})", where=path) from None
