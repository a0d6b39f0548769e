"""Options that several commands share, as decorators."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.output import set_verbosity
from neuralink_cli.errors import InputError
from neuralink_cli.layout.names import BUNDLED, LAYOUT_KINDS, RESIDENT_CHOICES
from neuralink_cli.weight_formats.formats import (
    DENSE_BESIDE_ROUNDED,
    DENSE_FORMAT_NAMES,
    FORMAT_NAMES,
    NEAREST,
    ROUNDINGS,
    SOURCE,
)

Function = TypeVar("Function", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


class WholeNumber(click.IntRange):
    """A whole number within limits."""

    name = "whole number"


class Number(click.FloatRange):
    """A number within limits."""

    name = "number"


class _Percent(click.ParamType):  # type: ignore[type-arg]
    """A share as people write it: `2%`, or a number such as 0.02."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf"):
            self.fail(f"{text!r} is neither a percentage like 2% nor a number like 0.02", param, ctx)
        return share


PERCENT = _Percent()


class _StageFilePath(click.Path):  # type: ignore[type-arg,unused-ignore]
    """The path of a trace or placement. A directory is told for what it is; files are told when they are opened."""

    def __init__(self, kind: str, made_by: str) -> None:
        super().__init__(path_type=Path)
        self._kind, self._made_by = kind, made_by

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Any = super().convert(value, param, ctx)
        if isinstance(path, Path) and os.path.isdir(path):  # noqa: PTH112 - Path.is_dir refuses odd characters
            from neuralink_cli.inspection.kinds import recognise

            try:
                what = recognise(path).kind
            except InputError:
                what = "directory"
            raise InputError(
                f"is a {what}, but a {self._kind} is needed",
                where=path,
                fix=f"pass the file that `neuralink {self._made_by}` wrote",
            )
        return path


TRACE_PATH = _StageFilePath("trace", "profile")
PLACEMENT_PATH = _StageFilePath("placement", "cluster")

# A string, not a path: it may be a hub id, and a path would change how it was written.
model_argument = click.argument("model")

revision_option = click.option(
    "--revision", metavar="REVISION", help="Branch, tag or commit of a hub MODEL.  [default: main]"
)

tokens_per_second_option = click.option(
    "--tokens-per-second",
    type=Number(min=0, min_open=True),
    metavar="N",
    help="Also say how fast storage must be to read for N tokens a second.",
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


ignore_remote_code_option = click.option(
    "--ignore-remote-code",
    is_flag=True,
    help="Run what transformers has for the model's type instead of the Python code that comes with the model. The "
    "two may compute different things.",
)


allow_uncovered_option = click.option(
    "--allow-uncovered",
    is_flag=True,
    help="Continue even if FFN matrices of the model are in no block; they stay as they are.",
)


def output_option(metavar: str, text: str) -> Callable[[Function], Function]:
    """`-o/--output`, required."""
    return click.option("-o", "--output", required=True, type=PATH, metavar=metavar, help=text)


def layout_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide what a layout holds; they become the one parameter `options`, a `RelayoutOptions`."""

    @click.option(
        "--layout",
        type=click.Choice(LAYOUT_KINDS),
        default=BUNDLED,
        show_default=True,
        help="Bundles with an index for a sparse runtime, or an ordinary checkpoint (safetensors) with neurons "
        "reordered.",
    )
    @click.option(
        "--resident",
        type=click.Choice(RESIDENT_CHOICES),
        default="none",
        show_default=True,
        help="Keep the rows that decide firing out of the bundles, for DRAM; `run` needs gate.",
    )
    @weights_option("Format to store FFN weights in")
    @click.option(
        "--dense-weights",
        type=click.Choice(DENSE_FORMAT_NAMES),
        help="Format of the matrices outside the FFN blocks (attention, embeddings, output head).  [default: "
        f"{DENSE_BESIDE_ROUNDED} if --weights rounds any, else {SOURCE}]",
    )
    @click.option(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        default=NEAREST,
        show_default=True,
        help="How rounding finds the scale of 32 weights: as ggml does, or by searching for the least squared error.",
    )
    @click.option(
        "--alignment",
        type=int,
        default=4096,
        show_default=True,
        metavar="BYTES",
        help="Start every tensor of bundles on a multiple of this, a power of two.",
    )
    @click.option(
        "--all-files",
        is_flag=True,
        help="Also copy what is left out otherwise: other copies of the weights (ONNX, GGUF, pickles, ...), states of "
        "training, hidden files.",
    )
    @functools.wraps(function)
    def with_options(
        *arguments: Any,
        layout: str,
        resident: str,
        weights: str,
        dense_weights: str | None,
        rounding: str,
        alignment: int,
        all_files: bool,
        **others: Any,
    ) -> Any:
        from neuralink_cli.layout.plan import RelayoutOptions

        options = RelayoutOptions(
            layout=layout,
            resident=resident,
            alignment=alignment,
            all_files=all_files,
            weights=weights,
            dense_weights=dense_weights,
            rounding=rounding,
        )
        return function(*arguments, options=options, **others)

    return with_options


def weights_option(text: str, **options: Any) -> Callable[[Function], Function]:
    """`--weights`, the same for every command."""
    return click.option(
        "--weights",
        metavar="FORMAT",
        help=f"{text}: {', '.join(FORMAT_NAMES)}, or by role as gate=q8_0,up=q4_0,down=q4_0.",
        **{"default": SOURCE, "show_default": True, **options},
    )


def reporting_options(function: Function) -> Function:
    """`--json`, `-q`, `-v`: how results and progress are shown. Adds the parameter `as_json`."""
    function = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=lambda _c, _p, value: set_verbosity(verbose=value),
        help="Log more on stderr.",
    )(function)
    function = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=lambda _c, _p, value: set_verbosity(quiet=value),
        help="Only errors on stderr: no progress, no remarks.",
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def read_text(path: Path) -> str:
    """The whole of a text file, see `text_files.read_text`.

    Raises:
        InputError: The file cannot be read, or is not text.
    """
    from neuralink_cli.files import text_files

    return text_files.read_text(path)


def text_argument(value: str) -> str:
    """A text of the command line, which is UTF-8 whatever the locale says, as long as its bytes can be."""
    try:
        return os.fsencode(value).decode()
    except UnicodeError:
        return value
