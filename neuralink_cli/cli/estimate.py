"""`neuralink estimate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuralink_cli.architectures.choice import ArchitectureChoice
from neuralink_cli.cli.options import (
    PLACEMENT_PATH,
    TRACE_PATH,
    WholeNumber,
    allow_uncovered_option,
    architecture_options,
    layout_options,
    model_argument,
    reporting_options,
    revision_option,
    tokens_per_second_option,
)
from neuralink_cli.cli.output import print_json, print_pairs, print_table, print_text, progress_bar
from neuralink_cli.errors import OptionError
from neuralink_cli.placement.placement import EFFORT_NAMES
from neuralink_cli.sizes import human_bytes, human_number, human_seconds, parse_size
from neuralink_cli.storage.policies import DEFAULT_POLICY, POLICY_NAMES
from neuralink_cli.weight_formats.formats import SOURCE

if TYPE_CHECKING:
    from neuralink_cli.inspection.estimate_report import BudgetNeeds, EstimateReport
    from neuralink_cli.layout.plan import RelayoutOptions

# The budget that `bench` has if it is not told another.
_USUAL_SHARE = 0.05


@click.command(
    "estimate",
    epilog="""\b
Examples:
  neuralink estimate MODEL --placement model.placement.safetensors \\
      --trace model.trace.safetensors
  neuralink estimate MODEL --trace model.trace.safetensors \\
      --weights q4_0 --resident gate --tokens-per-second 10
  neuralink estimate MODEL --placement model.placement.safetensors --json
""",
)
@model_argument
@revision_option
@click.option("--placement", type=PLACEMENT_PATH, metavar="PLACEMENT", help="Order of the layout, from `cluster`.")
@click.option(
    "--trace",
    type=TRACE_PATH,
    metavar="TRACE",
    help="Trace of MODEL, to replay its held-out tokens. Without --placement, an order is made from its other tokens.",
)
@layout_options
@click.option(
    "--device",
    metavar="NAME|FILE",
    help="Storage to model, as for `cluster`.  [default: the placement's, or ufs4.0]",
)
@click.option(
    "--dram",
    multiple=True,
    metavar="SHARE|BYTES",
    help="DRAM for bundles, as for `bench`; may be repeated.  [default: 0%, 5%, 10%, 20%, 30%, 40%, 50%]",
)
@click.option(
    "--cache", type=click.Choice(POLICY_NAMES), default=DEFAULT_POLICY, show_default=True, help="As for `bench`."
)
@tokens_per_second_option
@click.option(
    "--disk-speed",
    metavar="BYTES",
    help="Bytes a second that the disk of the layout reads or writes, like 1GB: how long `relayout` takes at least.",
)
@click.option(
    "--tokens",
    type=WholeNumber(min=1),
    metavar="N",
    help="Replay at most N held-out tokens.  [default: as many as take about a minute]",
)
@click.option(
    "--effort",
    type=click.Choice(EFFORT_NAMES),
    help="How long to refine the order that is made without --placement.  [default: fast]",
)
@click.option("--jobs", type=WholeNumber(min=1), metavar="N", help="Blocks to order at a time.  [default: all CPUs]")
@allow_uncovered_option
@architecture_options
@reporting_options
def command(
    model: str,
    revision: str | None,
    placement: Path | None,
    trace: Path | None,
    options: RelayoutOptions,
    device: str | None,
    dram: tuple[str, ...],
    cache: str,
    tokens_per_second: float | None,
    disk_speed: str | None,
    tokens: int | None,
    effort: str | None,
    jobs: int | None,
    architecture: ArchitectureChoice,
    allow_uncovered: bool,
    as_json: bool,
) -> None:
    """Estimate what a layout will gain and need.

    Before a byte of MODEL is rewritten, prints the size of bundles and files and the least memory; for several budgets
    of DRAM, the reads and I/O time of a token and the gain; and how fast storage must be for N tokens a second. Takes
    the options of `relayout`. Reads the headers of MODEL, never its weights. With --trace, replays held-out tokens as
    `bench` does. With --placement alone, repeats the gain that `cluster` measured.
    """
    from neuralink_cli.devices.device import find_device
    from neuralink_cli.inspection.estimate import estimate
    from neuralink_cli.inspection.estimate_report import DEFAULT_EFFORT, SHARES, EstimateOptions
    from neuralink_cli.storage.budget import DramBudget, parse_budget

    if placement is not None and (effort is not None or jobs is not None):
        option = "--jobs" if effort is None else "--effort"
        raise OptionError(f"{option} is for the order that is made without --placement", fix=f"leave {option} out")
    if trace is None and (dram or tokens is not None):
        option = "--dram" if dram else "--tokens"
        raise OptionError(f"{option} is for replaying a trace", fix="pass --trace too")
    budgets = tuple(map(parse_budget, dict.fromkeys(dram)))
    report = estimate(
        model,
        placement=placement,
        trace=trace,
        options=EstimateOptions(
            layout=options,
            device=None if device is None else find_device(device),
            budgets=budgets or tuple(DramBudget(fraction=share) for share in SHARES),
            policy=cache,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            disk_speed=None if disk_speed is None else _speed_of(disk_speed),
            effort=effort or DEFAULT_EFFORT,
            jobs=jobs,
        ),
        revision=revision,
        architecture=architecture,
        allow_uncovered=allow_uncovered,
        progress=progress_bar,
    )
    if as_json:
        print_json(report.as_document())
        return
    print_pairs(_pairs(report))
    _print_figures(report)


def _speed_of(text: str) -> int:
    speed = parse_size(text)
    if not speed:
        raise OptionError("--disk-speed is 0", fix="pass bytes a second, like 1GB")
    return speed


def _pairs(report: EstimateReport) -> Iterator[tuple[str, str]]:
    formats = [] if report.weights == SOURCE else [f"weights {report.weights}"]
    formats += [] if report.dense_weights == SOURCE else [f"dense weights {report.dense_weights}"]
    formats += [] if report.resident == "none" else ["rows that decide firing in DRAM"]
    yield "layout", f"{report.layout} of {report.model}" + "".join(f", {each}" for each in formats)
    if report.placement is None:
        yield "order", f"{report.order}, made for this estimate with effort {report.effort}"
    else:
        yield "order", f"{report.order}, of {report.placement}"
    size = report.size
    yield (
        "disk",
        f"{human_bytes(size.total)} ({size.total:,} bytes): {human_bytes(size.weights)} of weights, "
        f"{human_bytes(size.companions)} of files beside them, {human_bytes(size.own)} of index and card; the weights "
        f"of the source have {human_bytes(report.source_bytes)}",
    )
    for group in report.blocks:
        blocks = group.first if group.count == 1 else f"{group.count:,} blocks from {group.first} on"
        before = "" if group.bundle_bytes == group.source_bytes else f", {group.source_bytes:,} in the source"
        yield "bundles", f"{blocks}: {group.neurons:,} neurons of {group.bundle_bytes:,} bytes{before}"
    writing = report.relayout
    seconds = writing.least_seconds
    yield (
        "relayout",
        f"reads {human_bytes(writing.bytes_read)}, writes {human_bytes(writing.bytes_written)}, needs up to "
        f"{human_bytes(writing.memory_bytes)} of memory"
        + ("" if seconds is None else f", takes at least {human_seconds(seconds)} at the speed of the disk"),
    )
    memory = report.memory
    if report.layout == "permuted":
        yield "memory", f"{human_bytes(memory.least_bytes)}: an ordinary checkpoint, which is loaded whole"
        return
    pinned = f" ({human_bytes(memory.pinned_bytes)} of them pinned)" if memory.pinned_bytes else ""
    yield (
        "memory",
        f"at least {human_bytes(memory.least_bytes)} for weights: {human_bytes(memory.dense_bytes)} outside the "
        f"blocks, {human_bytes(memory.resident_bytes)} of resident rows, {human_bytes(memory.token_bytes)} of bundles "
        f"that fire at a token{pinned}; a runtime's program and attention cache come on top",
    )


def _print_figures(report: EstimateReport) -> None:
    click.echo()
    if report.figures is None:
        print_text(
            "The gain is not known: the placement was measured for another device or other bundles, or nothing was "
            "held out to measure it. Pass --trace to replay tokens."
        )
        return
    if report.figures == "stated":
        (only,) = report.budgets
        print_text(
            f"As `cluster` measured on held-out tokens for {report.device}, without a cache (pass --trace for reads, "
            f"and for what DRAM changes): {_milliseconds(only)} of reading a token, gain {only.gain} over the original "
            f"order read the same way, {only.gain_over_naive} over naive reading; 95% intervals."
        )
    else:
        _print_budgets(report)
    if report.tokens_per_second is not None:
        print_text(_speed(report))


def _print_budgets(report: EstimateReport) -> None:
    assert report.tokens is not None
    assert report.held_out is not None
    some = "" if report.tokens == report.held_out else f" of {report.held_out:,}"
    print_text(
        f"Per token on {report.device}, modelled on {report.tokens:,}{some} held-out tokens: hits are active neurons "
        "found in DRAM; tok/s is what reading alone allows. gain: the time of the original order, read the same way, "
        "over that of this one; naive: the same without reading across gaps."
    )
    wanted = report.tokens_per_second
    if wanted is not None:
        print_text(f"needed: the speed of storage for {wanted:g} tokens/s, in that of {report.device}")
    header = ["DRAM", "", "hits", "reads", "kB read", "ms", "tok/s", "gain", "naive"]
    header += [] if wanted is None else ["needed"]
    print_table(header, [_cells(each) for each in report.budgets])
    usual = _usual(report)
    room = f"With {_budget(usual)}" if usual.dram_bytes else "Without a cache"
    print_text(
        f"{room}, reading a token takes {_milliseconds(usual)}: gain {usual.gain}, over naive reading "
        f"{usual.gain_over_naive}; 95% intervals over sequences."
    )


def _cells(needs: BudgetNeeds) -> list[str]:
    most = f"{1 / needs.io_seconds:,.0f}" if needs.io_seconds else "-"
    cells = [
        "-" if needs.share is None else f"{100 * needs.share:g}%",
        human_bytes(needs.dram_bytes),
        f"{needs.hit_rate or 0:.0%}",
        f"{needs.reads or 0:,.1f}",
        f"{(needs.read_bytes or 0) / 1000:,.0f}",
        f"{1e3 * needs.io_seconds:.2f}",
        most,
        f"{needs.gain.value:.2f}",
        f"{needs.gain_over_naive.value:.2f}",
    ]
    return cells if needs.speed_needed is None else [*cells, f"{human_number(needs.speed_needed, 2)} x"]


def _usual(report: EstimateReport) -> BudgetNeeds:
    """The budget that the closing sentences are about: that of `bench`, or the first that was asked for."""
    return next((each for each in report.budgets if each.share == _USUAL_SHARE), report.budgets[0])


def _budget(needs: BudgetNeeds) -> str:
    amount = human_bytes(needs.dram_bytes) if needs.share is None else f"{100 * needs.share:g}% of the bundles"
    return f"{amount} in DRAM"


def _milliseconds(needs: BudgetNeeds) -> str:
    return f"{1e3 * needs.io_seconds:.2f} ms" if needs.io_seconds >= 1e-3 else f"{1e6 * needs.io_seconds:.1f} us"


def _speed(report: EstimateReport) -> str:
    """Which storage is fast enough for what is wanted."""
    wanted, usual = report.tokens_per_second, _usual(report)
    assert wanted is not None
    factor = usual.speed_needed or 0.0
    rate = ""
    if usual.reads is not None and usual.read_bytes is not None:
        rate = f" ({wanted * usual.reads:,.0f} reads/s, {wanted * usual.read_bytes / 1e6:,.1f} MB/s)"
    times = human_number(factor, 2)
    verdict = (
        f"{report.device} is fast enough" if factor <= 1 else f"{report.device} is too slow by a factor of {times}"
    )
    enough = next((each for each in report.budgets if each.speed_needed is not None and each.speed_needed <= 1), None)
    if factor > 1 and enough is not None:
        verdict += f", but fast enough with {_budget(enough)}"
    return (
        f"At {wanted:g} tokens/s, storage needs {times} times the speed of {report.device}{rate} "
        f"if the runtime computes while it reads: {verdict}."
    )
