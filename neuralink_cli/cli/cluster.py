"""`neuralink cluster`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuralink_cli.architectures.blocks import experts_of
from neuralink_cli.architectures.coverage import coverage_text
from neuralink_cli.cli.options import (
    PATH,
    TRACE_PATH,
    Number,
    WholeNumber,
    output_option,
    overwrite_option,
    reporting_options,
    weights_option,
)
from neuralink_cli.cli.output import print_json, print_table, print_text, progress_bar, remark
from neuralink_cli.devices.device import DEFAULT_DEVICE
from neuralink_cli.errors import OptionError
from neuralink_cli.layout.names import RESIDENT_CHOICES
from neuralink_cli.placement.gain import (
    OrderFigures,
    block_gains,
    source_gains,
    stored_by_layer,
    stored_by_source,
    stored_in_total,
    total_gain,
)
from neuralink_cli.placement.placement import (
    DEFAULT_ORDER,
    EFFORT_NAMES,
    MIXED,
    ORDER_NAMES,
    ORIGINAL,
    STORED,
    MeasuredGain,
    PlacementBlock,
    PlacementHeader,
)

if TYPE_CHECKING:
    from neuralink_cli.clustering.dask_cluster import DaskOptions
    from neuralink_cli.devices.ratio import Ratio

# How many experts a remark lists.
_SHOWN_EXPERTS = 5
# Of the name of a block or dataset in the table, and of an order there.
_LONGEST_NAME, _LONGEST_ORDER = 24, 16


def _order_names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of orders that start so, for shells."""
    from neuralink_cli.ordering.own_orders import IMPORTED, installed_orders

    return [name for name in (*ORDER_NAMES, IMPORTED, *installed_orders()) if name.startswith(incomplete)]


@click.command(
    "cluster",
    epilog="""\b
Examples:
  neuralink cluster model.trace.safetensors -o model.placement.safetensors
  neuralink cluster model.trace.safetensors -o p.safetensors \\
      --device ufs3.1 --pin-hot 0.05
  neuralink cluster model.trace.safetensors -o p.safetensors \\
      --device my-phone-fio.json --resident gate
  neuralink cluster model.trace.safetensors -o p.safetensors \\
      --order frequency --json
  neuralink cluster model.trace.safetensors -o p.safetensors \\
      --scheduler tcp://10.0.0.1:8786
""",
)
@click.argument("trace", type=TRACE_PATH)
@output_option("PLACEMENT", "Placement to write.")
@click.option(
    "--order",
    default=DEFAULT_ORDER,
    show_default=True,
    metavar="NAME",
    shell_complete=_order_names,
    help="Order to store: original (as in the checkpoint), frequency (hottest first), reverse-cuthill-mckee or "
    "spectral (from graph theory), linked (by co-activation, the published method), refined (linked, then refined to "
    "cost less on the device), imported (see --order-from), or an order that an installed package adds. A block "
    "keeps its original order if that costs less on held-out tokens.",
)
@click.option(
    "--order-from",
    type=PATH,
    metavar="FILE",
    help="Compare an order made elsewhere, called imported: a .safetensors or .npz file with a permutation of every "
    "block's neurons by block id. Stored with --order imported.",
)
@click.option(
    "--effort",
    type=click.Choice(EFFORT_NAMES),
    default="normal",
    show_default=True,
    help="How long to refine: a number of sweeps, so that results do not depend on the machine.",
)
@click.option(
    "--device",
    default=DEFAULT_DEVICE,
    show_default=True,
    metavar="NAME|FILE",
    help="Storage to model: ufs4.0, ufs3.1, oneplus-15r, nvme, a device profile, or the JSON output of fio.",
)
@click.option(
    "--bundle-bytes",
    type=WholeNumber(1, 1 << 32),
    metavar="N",
    help="Bytes of a bundle, if neither the checkpoint nor --weights decides them.",
)
@weights_option("Format that `relayout` will store FFN weights in, which decides the bytes of a bundle")
@click.option(
    "--resident",
    type=click.Choice(RESIDENT_CHOICES),
    default="none",
    show_default=True,
    help="As for `relayout`: bundles are smaller without the rows that decide firing.",
)
@click.option(
    "--pin-hot",
    type=Number(0, 0.9),
    default=0.0,
    show_default=True,
    metavar="FRACTION",
    help="Share of neurons, the hottest, to keep in DRAM: stored first and left out of the ordering.",
)
@click.option(
    "--held-out",
    type=Number(0, 0.9),
    default=0.2,
    show_default=True,
    metavar="FRACTION",
    help="Share of each dataset's tokens, its last ones, held out from the ordering to measure it.",
)
@click.option(
    "--min-tokens",
    type=WholeNumber(min=0),
    default=128,
    show_default=True,
    metavar="N",
    help="MoE experts with fewer than N routed tokens in the ordering keep their original order.",
)
@click.option(
    "--export-graph",
    "graphs",
    type=PATH,
    metavar="DIR",
    help="Also write each block's strongest links as GraphML files into this new directory.",
)
@click.option(
    "--jobs",
    type=WholeNumber(min=1),
    metavar="N",
    help="Blocks to order at a time; on Dask, threads for each block.  [default: all CPUs, on Dask 1]",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS|FILE",
    help="Order blocks on the workers of a Dask cluster: its address, such as tcp://HOST:8786, or its scheduler file.",
)
@click.option(
    "--workers",
    type=WholeNumber(min=1),
    metavar="N",
    help="Order blocks on N Dask workers on this machine, each a process.",
)
@click.option(
    "--send-trace",
    is_flag=True,
    help="Send each block of TRACE to the worker that orders it, if workers do not see it under the same path.",
)
@overwrite_option
@reporting_options
def command(
    trace: Path,
    output: Path,
    order: str,
    order_from: Path | None,
    effort: str,
    device: str,
    bundle_bytes: int | None,
    weights: str,
    resident: str,
    pin_hot: float,
    held_out: float,
    min_tokens: int,
    graphs: Path | None,
    jobs: int | None,
    scheduler: str | None,
    workers: int | None,
    send_trace: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Order the neurons of every block by co-activation.

    Neurons that fire together in TRACE are stored next to each other. Prints figures for each order, measured on
    held-out tokens: neurons per read and reads per token, without access collapse or cache; the gain, which is the
    modelled cost of the original order over that of this one, both with access collapse; and the gain over naive
    reading, which reads the original order without collapse.
    """
    from neuralink_cli.clustering.cluster import ClusterOptions, cluster
    from neuralink_cli.clustering.graph_export import check_export, export_graphs
    from neuralink_cli.devices.device import find_device

    options = ClusterOptions(
        device=find_device(device),
        order=order,
        order_from=order_from,
        effort=effort,
        held_out=held_out,
        bundle_bytes=bundle_bytes,
        weights=weights,
        resident=resident,
        pin_hot=pin_hot,
        fewest_tokens=min_tokens,
        jobs=jobs,
        dask=_dask(scheduler, workers, send_trace),
    )
    if graphs is not None:
        check_export(graphs, overwrite)
    summary = cluster(trace, output, options, overwrite=overwrite, progress=progress_bar)
    header, digest = summary.header, summary.content_sha256
    if graphs is not None:
        export_graphs(trace, output, graphs, overwrite=overwrite)
    if as_json:
        print_json(
            {
                "output": str(output),
                "content_sha256": digest,
                "device": options.device.name,
                "blocks": [
                    {
                        **gain.as_document(),
                        "tokens": block.tokens,
                        "collapse_gap": block.collapse_gap,
                        "pinned": block.pinned,
                    }
                    for gain, block in zip(block_gains(header), header.blocks, strict=True)
                ],
                "by_source": [gain.as_document() for gain in source_gains(header)],
                "total": total_gain(header).as_document(),
                "gains": [asdict(gain) for gain in header.gains],
                "coverage": header.coverage,
            }
        )
        return
    _warn_of_rare_experts(header, min_tokens)
    _print_result(header, options.device.name)
    kept = sum(block.order == ORIGINAL and not _is_rare(block, min_tokens) for block in header.blocks)
    if kept and order != ORIGINAL:
        click.echo(f"{kept} of {len(header.blocks)} blocks stay in original order, which costs less there")
    gaps = sorted({block.collapse_gap for block in header.blocks})
    if header.coverage is not None:
        click.echo(coverage_text(header.coverage["covered_bytes"], header.coverage["ffn_bytes"]))
    print_text(f"{options.device.name}: worth reading across gaps of up to {_span(gaps)} neurons")
    _say_result(header, output, options.device.name)


def _span(gaps: list[int]) -> str:
    return str(gaps[0]) if len(gaps) == 1 else f"{gaps[0]} to {gaps[-1]}"


def _dask(scheduler: str | None, workers: int | None, send_trace: bool) -> DaskOptions | None:
    from neuralink_cli.clustering.dask_cluster import DaskOptions

    if scheduler is None and workers is None:
        if send_trace:
            raise OptionError("--send-trace needs --scheduler or --workers")
        return None
    return DaskOptions(scheduler, workers, send_trace)


def _print_result(header: PlacementHeader, device: str) -> None:
    """What was measured: by order, by block and dataset, and the result in words."""
    total = total_gain(header)
    if not total.orders:
        click.echo("no held-out tokens: the gain of the order is not known")
        return
    held_out = sum(part.tokens for part in header.blocks[0].held_out)
    print_text(
        f"Measured on {held_out:,} held-out tokens. read: neurons per read; reads: reads per token; both without "
        f"reading across gaps. gain: the modelled cost on {device} of the original order over that of the row, both "
        "read across gaps; naive: the same, but with no gap read across in the original order."
    )
    click.echo()
    intervals = {gain.order: gain for gain in header.gains if gain.source is None}
    print_table(
        ["order", "read", "reads", "gain", "naive"],
        [[name, *_read(figures), *_gains(figures, intervals.get(name))] for name, figures in total.orders.items()],
    )
    click.echo()
    sources = stored_by_source(header)
    rows = [*stored_by_layer(header), *(sources if len(sources) > 1 else []), stored_in_total(header)]
    print_table(
        ["stored", "order", "active", "read", "reads", "gain", "naive"],
        [
            # A source too small to hold anything out has no figures.
            [_short(row.name, _LONGEST_NAME), _short(row.order, _LONGEST_ORDER), f"{row.active_ratio:.1%}"]
            + (4 * ["-"] if row.figures is None else [*_read(row.figures), *_gains(row.figures)])
            for row in rows
        ],
    )
    click.echo()


def _short(name: str, longest: int) -> str:
    """A name that leaves room for the figures: its beginning and its end."""
    end = longest // 2
    return name if len(name) <= longest else f"{name[: longest - end - 3]}...{name[-end:]}"


def _read(figures: OrderFigures) -> tuple[str, str]:
    return f"{figures.mean_read_length:.2f}", f"{figures.reads_per_token:,.1f}"


def _gains(figures: OrderFigures, measured: MeasuredGain | None = None) -> tuple[str, str]:
    if measured is None:
        return f"{figures.gain:.2f}", f"{figures.gain_over_naive:.2f}"
    return _interval(measured.gain), _interval(measured.gain_over_naive)


def _interval(ratio: Ratio) -> str:
    """Shorter than in sentences, for a terminal of 80 columns."""
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _say_result(header: PlacementHeader, output: Path, device: str) -> None:
    """The result in words: what is stored gains, with intervals."""
    gain = next((gain for gain in header.gains if gain.source is None and gain.order == STORED), None)
    name = stored_in_total(header).order
    order = "orders of several kinds, a block its best," if name == MIXED else f"the {name} order"
    if gain is None:
        print_text(f"{output} stores {order} of {len(header.blocks)} blocks.")
        return
    worth = "gains nothing" if gain.gain.high <= 1 else f"gains {gain.gain}"
    print_text(
        f"{output} stores {order} of {len(header.blocks)} blocks: on {device} it {worth} over the original order read "
        f"the same way, and {gain.gain_over_naive} over naive reading; 95% intervals over sequences."
    )


def _warn_of_rare_experts(header: PlacementHeader, min_tokens: int) -> None:
    rare = [block for block in header.blocks if _is_rare(block, min_tokens)]
    if rare:
        shown = ", ".join(f"{block.id} ({block.tokens:,})" for block in rare[:_SHOWN_EXPERTS])
        more = f" and {len(rare) - _SHOWN_EXPERTS} more" if len(rare) > _SHOWN_EXPERTS else ""
        remark(
            f"{len(rare)} experts saw fewer than {min_tokens:,} tokens and keep their original order: {shown}{more}; "
            "profile more text, or lower --min-tokens"
        )


def _is_rare(block: PlacementBlock, min_tokens: int) -> bool:
    return experts_of(block.id) is not None and block.tokens < min_tokens
