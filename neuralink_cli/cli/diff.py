"""`neuralink diff`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.cli.options import PATH, TRACE_PATH, reporting_options
from neuralink_cli.cli.output import print_json, print_pairs, print_table, print_text, progress_bar
from neuralink_cli.errors import OptionError
from neuralink_cli.sizes import human_number

_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")

if TYPE_CHECKING:
    from neuralink_cli.inspection.diff import Difference, DiffReport


@click.command(
    "diff",
    epilog="""\b
Examples:
  neuralink diff old.placement.safetensors new.placement.safetensors
  neuralink diff march-flash/ april-flash/ --trace april.trace.safetensors
  neuralink diff wiki.trace.safetensors chat.trace.safetensors --json
""",
)
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@click.option(
    "--trace",
    type=TRACE_PATH,
    metavar="TRACE",
    help="Also say what each order costs on this trace of the same model. Tokens that made one of the orders are "
    "left out.",
)
@click.option(
    "--device",
    metavar="NAME|FILE",
    help="Device to model with --trace, as for `cluster`.  [default: the device A was made for]",
)
@reporting_options
def command(first: Path, second: Path, trace: Path | None, device: str | None, as_json: bool) -> None:
    """Compare two traces, placements or layouts.

    Says whether A and B are of the same model, what differs in data, options, device, formats and thresholds, and for
    placements and layouts of any kind how much of the order is shared in each block: the share of neurons next to each
    other in A that are next to each other in B. With --trace also the modelled read time of a token in each, and their
    ratio with a 95% bootstrap interval over sequences. Exit code 0 means that they were compared, whatever differs.
    """
    from neuralink_cli.devices.device import find_device
    from neuralink_cli.inspection.diff import diff

    if device is not None and trace is None:
        raise OptionError("--device needs --trace", fix="pass --trace too")
    model = None if device is None else find_device(device)
    report = diff(first, second, trace=trace, device=model, progress=progress_bar)
    if as_json:
        print_json(asdict(report))
        return
    _print_report(report)


def _print_report(report: DiffReport) -> None:
    click.echo(f"A: {report.first_kind} {report.first}")
    click.echo(f"B: {report.second_kind} {report.second}")
    click.echo("the same model" if report.same_model else "DIFFERENT MODELS")
    if report.same_content:
        click.echo("the same content, as far as digests say")
    elif not report.differences:
        click.echo("no difference in what they say of themselves")
    lines = [line for difference in report.differences for line in _lines(difference)]
    if lines:
        print_pairs(lines)
    shared = report.sequences
    of_what = "sequences" if report.neighbours_kept is None else "sequences that made the orders"
    print_text(f"{of_what}: A has {shared.first:,}, B {shared.second:,}, {shared.both:,} are the same")
    _print_blocks(report)
    cost = report.cost
    if cost is not None:
        tokens = sum(part.tokens for part in cost.tokens)
        print_text(
            f"on {tokens:,} tokens, {cost.device}: A takes {human_number(1e3 * cost.first_seconds)} ms a token, "
            f"B {human_number(1e3 * cost.second_seconds)} ms"
        )
        click.echo(f"A over B: {cost.ratio}, 95% interval over sequences")


def _print_blocks(report: DiffReport) -> None:
    if not report.blocks:
        return
    costs = {} if report.cost is None else report.cost.blocks
    header = ["", "neurons", "neighbours kept", *(["A over B"] if costs else [])]
    rows = [
        [block.id, f"{block.neurons:,}", f"{block.neighbours_kept:.1%}", *([str(costs[block.id])] if costs else [])]
        for block in report.blocks
    ]
    neurons = sum(block.neurons for block in report.blocks)
    total = [] if report.cost is None else [str(report.cost.ratio)]
    print_table(header, [*rows, ["total", f"{neurons:,}", f"{report.neighbours_kept or 0:.1%}", *total]])


def _lines(difference: Difference) -> Iterator[tuple[str, str]]:
    """What A says, and what B says."""
    what, first, second = difference.what, difference.first, difference.second
    if what.startswith("blocks.") and isinstance(first, Mapping):
        name, count = next(iter(first)), len(first)
        what = f"{what.removeprefix('blocks.')} of {name}" + (f" (and {count - 1:,} more)" if count > 1 else "")
        first, second = first[name], second[name]
    if first is None or second is None:
        yield what, f"only {'B' if first is None else 'A'}: {_plain(second if first is None else first)}"
        return
    yield what, f"A: {_plain(first)}"
    yield what, f"B: {_plain(second)}"


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"{value[:12]}..."
    if isinstance(value, list):
        return (
            f"{len(value)} values" if any(isinstance(each, dict) for each in value) else ", ".join(map(_plain, value))
        )
    return str(value)
