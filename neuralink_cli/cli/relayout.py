"""`neuralink relayout`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from neuralink_cli.cli.options import (
    PATH,
    architecture_options,
    model_argument,
    output_option,
    overwrite_option,
    reporting_options,
    revision_option,
)
from neuralink_cli.cli.output import in_words, print_json, print_table, progress_bar, remark
from neuralink_cli.sizes import human_bytes


@click.command(
    "relayout",
    epilog="""\b
Examples:
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o model-flash/ --resident gate
  neuralink relayout MODEL --placement model.placement.safetensors \\
      -o permuted/ --layout permuted
""",
)
@model_argument
@revision_option
@click.option("--placement", "placement_path", required=True, type=PATH, metavar="PLACEMENT", help="From `cluster`.")
@output_option("DIR", "Directory to write.")
@click.option(
    "--layout",
    type=click.Choice(["bundled", "permuted"]),
    default="bundled",
    show_default=True,
    help="Bundles with an index for a sparse runtime, or an ordinary checkpoint with its neurons reordered.",
)
@click.option(
    "--resident",
    type=click.Choice(["none", "gate"]),
    default="none",
    show_default=True,
    help="Keep the rows that decide firing out of the bundles, for DRAM.",
)
@click.option(
    "--alignment",
    type=int,
    default=4096,
    show_default=True,
    metavar="BYTES",
    help="Every tensor of bundles starts on a multiple of this, a power of two.",
)
@architecture_options
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where a run with the same inputs and options died; if interrupted, keep what is written.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@overwrite_option
@reporting_options
def command(
    model: str,
    revision: str | None,
    placement_path: Path,
    output: Path,
    layout: str,
    resident: str,
    alignment: int,
    architecture_file: Path | None,
    infer_architecture: bool,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint in the order of a placement.

    The bytes of MODEL, a directory or hub id as for `profile`, are moved, never decoded. The output is complete or not
    there.
    """
    from neuralink_cli.architectures.choice import choose_architecture
    from neuralink_cli.architectures.model_description import describe
    from neuralink_cli.checkpoint.checkpoint import Checkpoint
    from neuralink_cli.checkpoint.hub import find_model
    from neuralink_cli.layout.relayout import (
        RelayoutOptions,
        check_output,
        estimate_relayout,
        plan_relayout,
        write_layout,
    )
    from neuralink_cli.placement.placement import Placement

    options = RelayoutOptions(layout=layout, resident=resident, alignment=alignment)
    with Placement(placement_path) as placement:
        # Only now: a model may take long to fetch.
        source = find_model(model, revision)
        with Checkpoint(source.directory, source.origin) as checkpoint:
            infer_from = describe(checkpoint) if infer_architecture else None
            architecture = choose_architecture(checkpoint.model_type, source.directory, architecture_file, infer_from)
            plan = plan_relayout(checkpoint, architecture, placement, options)
            check_output(plan, output, overwrite)
            expected = estimate_relayout(plan, checkpoint, output)
            remark(in_words(expected))
            if not dry_run:
                with progress_bar("relayout", plan.weight_bytes, "B") as advance, _saying_how_to_go_on(resume):
                    write_layout(
                        plan, checkpoint, placement, output, overwrite=overwrite, resume=resume, progress=advance
                    )
    summary = {
        "output": str(output),
        "written": not dry_run,
        "origin": None if source.origin is None else asdict(source.origin),
        "layout": layout,
        "resident": resident,
        "alignment": alignment,
        "blocks": len(plan.blocks),
        "neurons": sum(block.neurons for block in plan.blocks),
        "weight_bytes": plan.weight_bytes,
        "total_bytes": plan.total_bytes,
        "peak_block_bytes": plan.peak_block_bytes,
    }
    if dry_run:
        summary["estimate"] = asdict(expected)
    if as_json:
        print_json(summary)
        return
    verb = "would take" if dry_run else "takes"
    click.echo(f"{output}: {layout} layout of {len(plan.blocks)} blocks {verb} {human_bytes(plan.total_bytes)}")
    if dry_run:
        plain = {**summary, **asdict(expected)}.items()
        print_table(["plan", ""], [[name, str(value)] for name, value in plain if isinstance(value, (str, int, float))])


@contextlib.contextmanager
def _saying_how_to_go_on(resume: bool) -> Iterator[None]:
    try:
        yield
    except BaseException as stop:
        if resume and not isinstance(stop, Exception):
            stop.args = ("what is written is kept, and the same command goes on with it",)
        raise
