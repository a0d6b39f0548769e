"""`neuralink drift`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.cli.options import PATH, TRACE_PATH, Number, WholeNumber, reporting_options
from neuralink_cli.cli.output import print_json, print_table, print_text, progress_bar
from neuralink_cli.errors import OptionError
from neuralink_cli.placement.placement import EFFORT_NAMES

if TYPE_CHECKING:
    from neuralink_cli.devices.ratio import Ratio
    from neuralink_cli.inspection.drift import DriftReport

# Blocks in the table of those that moved most.
_SHOWN = 5


@click.command(
    "drift",
    epilog="""\b
Examples:
  neuralink drift model-flash/ --trace this-month.trace.safetensors
  neuralink drift model.placement.safetensors \\
      --trace this-month.trace.safetensors --reorder
  neuralink drift model-flash/ --trace this-month.trace.safetensors \\
      --fail-below 1.3 --json
""",
)
@click.argument("artefact", metavar="LAYOUT", type=PATH)
@click.option(
    "--trace", required=True, type=TRACE_PATH, metavar="TRACE", help="Trace of the same model on new traffic."
)
@click.option(
    "--reorder",
    is_flag=True,
    help="Also order the neurons again on TRACE, as LAYOUT was made, and measure both orders on its held-out tokens. "
    "Takes as long as `cluster`; nothing is written.",
)
@click.option(
    "--effort",
    type=click.Choice(EFFORT_NAMES),
    help="How long --reorder refines.  [default: as LAYOUT was made]",
)
@click.option("--jobs", type=WholeNumber(min=1), metavar="N", help="Blocks to reorder at a time.  [default: all CPUs]")
@click.option(
    "--fail-below",
    type=Number(min=0),
    metavar="GAIN",
    help="Exit code 1 if the gain has significantly fallen below this: the upper end of its 95% interval counts.",
)
@reporting_options
def command(
    artefact: Path,
    trace: Path,
    reorder: bool,
    effort: str | None,
    jobs: int | None,
    fail_below: float | None,
    as_json: bool,
) -> None:
    """Check whether a layout is still good on new traffic.

    LAYOUT is a layout or a placement. Measures its order on TRACE as `cluster` did when it made the order: the gain
    over the original order read the same way, and the gain over naive reading, both modelled on the device it was made
    for, with 95% bootstrap intervals over sequences. Tokens that made the order are left out. Also says how many
    neurons fire, and in which blocks firing has moved most to other neurons.
    """
    from neuralink_cli.inspection.drift import drift

    if not reorder and (effort is not None or jobs is not None):
        option = "--jobs" if effort is None else "--effort"
        raise OptionError(f"{option} is for --reorder", fix="pass --reorder too")
    report = drift(artefact, trace, reorder=reorder, effort=effort, jobs=jobs, progress=progress_bar)
    if as_json:
        print_json(_document(report))
    else:
        _print_report(report)
    report.check_gain(fail_below)


def _document(report: DriftReport) -> dict[str, Any]:
    return {**asdict(report), "moved_most": [block.id for block in report.moved_most[:_SHOWN]]}


def _print_report(report: DriftReport) -> None:
    tokens = sum(part.tokens for part in report.tokens)
    left_out = f" ({report.left_out:,} that made the order are left out)" if report.left_out else ""
    print_text(f"{tokens:,} new tokens{left_out}, modelled on {report.device}; 95% intervals")
    print_table(
        ["", "when made", "now"],
        [
            ["gain over the original order", _ratio(report.gain_then), str(report.gain)],
            ["gain over naive reading", _ratio(report.gain_over_naive_then), str(report.gain_over_naive)],
            ["neurons that fire", f"{report.active_ratio_then:.2%}", f"{report.active_ratio:.2%}"],
        ],
    )
    if report.calibrated_ratio is not None:
        click.echo(f"thresholds were calibrated so that {report.calibrated_ratio:.2%} fire")
    if report.made_for_other_bundles:
        print_text("its bundles have another size than its order was measured for: gains differ by that too")
    if len(report.sources) > 1:
        click.echo()
        print_table(
            ["now, by dataset", "tokens", "gain", "over naive reading"],
            [[part.source, f"{part.tokens:,}", str(part.gain), str(part.gain_over_naive)] for part in report.sources],
        )
    click.echo()
    print_table(
        ["moved most", "firings elsewhere", "fire: then", "now", "gain: then", "now"],
        [
            [
                block.id,
                f"{block.moved:.1%}",
                f"{block.active_ratio_then:.2%}",
                f"{block.active_ratio:.2%}",
                "-" if block.gain_then is None else f"{block.gain_then:.2f}",
                f"{block.gain:.2f}",
            ]
            for block in report.moved_most[:_SHOWN]
        ],
    )
    click.echo()
    print_text(_verdict(report))
    made = report.reordered
    if made is not None:
        print_text(
            f"Ordered again on this trace ({made.order}, effort {made.effort}), measured on {made.tokens:,} held-out "
            f"tokens: gain {made.gain_before} before, {made.gain} after. Reading in the old order takes "
            f"{made.saving} times as long as in the new one."
        )


def _ratio(ratio: Ratio | None) -> str:
    return "not known" if ratio is None else str(ratio)


def _verdict(report: DriftReport) -> str:
    now, then = report.gain.value, report.gain_then
    if then is None:
        return f"The order gains {now:.2f} now; no tokens were held out to say what it gained when it was made."
    change = now / then.value - 1
    if report.change == "holds":
        return f"The order is as good as when it was made, as far as these tokens tell ({change:+.0%})."
    verb = "less" if report.change == "fell" else "more"
    kept = "" if report.gain.low <= 1 else ", and is still better than the original order"
    return f"The order gains {verb} than when it was made ({change:+.0%}){kept}."
