"""`neuralink cluster`."""

from __future__ import annotations

from pathlib import Path

import click

from neuralink_cli.cli.options import PATH, output_option, overwrite_option, reporting_options
from neuralink_cli.cli.output import print_json, print_table, progress_bar
from neuralink_cli.placement.gain import BlockGain, block_gains, source_gains, total_gain

ORDERS = ("original", "frequency", "linked")


@click.command(
    "cluster",
    epilog="""\b
Examples:
  neuralink cluster model.trace.safetensors -o model.placement.safetensors
  neuralink cluster model.trace.safetensors -o by-frequency.placement.safetensors --order frequency --json
""",
)
@click.argument("trace", type=PATH)
@output_option("PLACEMENT", "Placement to write.")
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    default="linked",
    show_default=True,
    help="Order to store: as in the checkpoint, hottest first, or linked by co-activation.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9),
    default=0.2,
    show_default=True,
    metavar="FRACTION",
    help="Share of each dataset's tokens, its last ones, kept from the ordering to measure it on.",
)
@overwrite_option
@reporting_options
def command(trace: Path, output: Path, order: str, held_out: float, overwrite: bool, as_json: bool) -> None:
    """Order the neurons of every FFN block of TRACE so that those which fire together lie side by side.

    Prints what each order would read on held-out tokens: neurons per read and reads per token, without access collapse
    and cache.
    """
    from neuralink_cli.placement.cluster import ClusterOptions, cluster

    header, digest = cluster(
        trace, output, ClusterOptions(order=order, held_out=held_out), overwrite=overwrite, progress=progress_bar
    )
    total = total_gain(header)
    if as_json:
        print_json(
            {
                "output": str(output),
                "content_sha256": digest,
                "blocks": [gain.as_document() for gain in block_gains(header)],
                "by_source": [gain.as_document() for gain in source_gains(header)],
                "total": total.as_document(),
            }
        )
    else:
        sources = source_gains(header)
        print_gains([*block_gains(header), *(sources if len(sources) > 1 else []), total])


def print_gains(gains: list[BlockGain]) -> None:
    """Print the gain table."""
    orders = list(gains[-1].orders)
    if not orders:
        click.echo("no held-out tokens: the gain of the order is not known")
        return
    rows = []
    for gain in gains:
        figures = [gain.orders[order] for order in orders]
        cells = [f"{each.mean_read_length:.2f} {each.reads_per_token:7.1f}" for each in figures]
        rows.append([gain.name, f"{gain.active_ratio:.1%}", *cells])
    click.echo("neurons per read and reads per token, on held-out tokens")
    print_table(["", "active", *orders], rows)
