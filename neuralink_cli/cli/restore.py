"""`neuralink restore`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from neuralink_cli.cli.options import PATH, output_option, overwrite_option, reporting_options
from neuralink_cli.cli.output import print_json, progress_bar
from neuralink_cli.sizes import human_bytes


@click.command(
    "restore",
    epilog="""\b
Examples:
  neuralink restore model-flash/ -o model/
""",
)
@click.argument("layout_directory", metavar="LAYOUT", type=PATH)
@output_option("DIR", "Directory to write the checkpoint to.")
@overwrite_option
@reporting_options
def command(layout_directory: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Get the original checkpoint back from a layout.

    Writes every file that LAYOUT was made from, byte for byte, except what `relayout` said it leaves out. With
    --overwrite, DIR is replaced only if it holds the same model.
    """
    from neuralink_cli.rewriting.restore import restore

    summary = restore(layout_directory, output, overwrite=overwrite, progress=progress_bar)
    if as_json:
        print_json({"output": str(output), **asdict(summary)})
    else:
        click.echo(f"{output}: {summary.tensors:,} tensors, {human_bytes(summary.bytes)}")
        click.echo(str(summary.coverage))
