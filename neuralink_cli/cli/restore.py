"""`neuralink restore`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from neuralink_cli.cli.options import PATH, output_option, overwrite_option, reporting_options
from neuralink_cli.cli.output import in_words, print_json, progress_bar, remark
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

    Every file that LAYOUT was made from, byte for byte. With --overwrite, DIR is replaced only if it holds the same
    model.
    """
    from neuralink_cli.layout.open_layout import open_layout
    from neuralink_cli.layout.restore import check_output, estimate_restore, restore, restore_bytes

    with open_layout(layout_directory) as layout:
        check_output(layout, output, overwrite)
        remark(in_words(estimate_restore(layout, output)))
        with progress_bar("restore", restore_bytes(layout), "B") as advance:
            summary = restore(layout, output, overwrite=overwrite, progress=advance)
    if as_json:
        print_json({"output": str(output), **asdict(summary)})
    else:
        click.echo(f"{output}: {summary.tensors:,} tensors, {human_bytes(summary.bytes)}")
