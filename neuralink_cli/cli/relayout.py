"""`neuralink relayout`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.options import (
    PATH,
    PLACEMENT_PATH,
    WholeNumber,
    allow_uncovered_option,
    architecture_options,
    layout_options,
    model_argument,
    output_option,
    overwrite_option,
    reporting_options,
    revision_option,
)
from neuralink_cli.cli.output import print_json, print_pairs, print_text, progress_bar
from neuralink_cli.sizes import human_bytes

if TYPE_CHECKING:
    from neuralink_cli.layout.plan import RelayoutOptions
    from neuralink_cli.layout.recall import MeasureRecall


@click.command(
    "relayout",
    epilog="""\b
Examples:
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/ --resident gate
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/ --weights gate=q8_0,up=q4_0,down=q4_0
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/ --weights q4_0 --recall-text held-out.txt
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o permuted/ --layout permuted
""",
)
@model_argument
@revision_option
@click.option(
    "--placement",
    "placement_path",
    required=True,
    type=PLACEMENT_PATH,
    metavar="PLACEMENT",
    help="Placement from `cluster`.",
)
@output_option("DIR", "Directory to write.")
@layout_options
@click.option(
    "--recall-text",
    type=PATH,
    metavar="FILE",
    help="Run MODEL on this text first, and record in the index how rounding the rows that decide firing changes "
    "what fires.",
)
@click.option(
    "--recall-tokens",
    type=WholeNumber(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of the text for --recall-text, in sequences of 128.",
)
@allow_uncovered_option
@architecture_options
@click.option(
    "--resume",
    is_flag=True,
    help="Continue a killed run with the same inputs and options; if interrupted again, keep what was written.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, print the plan and estimated time, memory, disk; write nothing."
)
@overwrite_option
@reporting_options
def command(
    model: str,
    revision: str | None,
    placement_path: Path,
    output: Path,
    options: RelayoutOptions,
    recall_text: Path | None,
    recall_tokens: int,
    architecture: ArchitectureChoice,
    allow_uncovered: bool,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint in the order of a placement.

    Moves the bytes of MODEL, a directory or hub id as for `profile`, and never decodes them, unless --weights or
    --dense-weights asks for another format. All other files in its folder are copied too; a remark lists any that are
    left out.
    The output appears only when it is complete.
    """
    from neuralink_cli.rewriting.relayout import relayout

    with _saying_how_to_go_on(resume):
        summary = relayout(
            model,
            placement_path,
            output,
            options,
            revision=revision,
            architecture=architecture,
            allow_uncovered=allow_uncovered,
            measure_recall=None if recall_text is None else _recall_on(recall_text, recall_tokens),
            dry_run=dry_run,
            resume=resume,
            overwrite=overwrite,
            progress=progress_bar,
        )
    document = asdict(summary)
    expected = document.pop("estimate")
    if dry_run:
        document["estimate"] = expected
    if as_json:
        print_json(document)
        return
    verb = "would take" if dry_run else "takes"
    size = human_bytes(summary.total_bytes)
    click.echo(f"{output}: {options.layout} layout of {summary.blocks} blocks {verb} {size}")
    click.echo(str(summary.coverage))
    if summary.gate_recall is not None:
        print_text(f"rounded rows decide firing: {summary.gate_recall}")
    if dry_run:
        plain = {**document, **expected}.items()
        print_pairs((name, str(value)) for name, value in plain if isinstance(value, (str, int, float)))


def _recall_on(text: Path, tokens: int) -> MeasureRecall:
    from neuralink_cli.evaluation.recall_text import recall_on_text

    return recall_on_text(text, tokens, progress_bar)


@contextlib.contextmanager
def _saying_how_to_go_on(resume: bool) -> Iterator[None]:
    try:
        yield
    except BaseException as stop:
        if resume and not isinstance(stop, Exception):
            stop.args = ("what was written is kept; run the same command again to continue",)
        raise
