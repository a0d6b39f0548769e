"""`neuralink report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.cli.options import PATH, TRACE_PATH, WholeNumber, output_option, overwrite_option, reporting_options
from neuralink_cli.cli.output import print_json, print_text, progress_bar
from neuralink_cli.sizes import human_bytes
from neuralink_cli.storage.policies import DEFAULT_POLICY, POLICY_NAMES

if TYPE_CHECKING:
    from neuralink_cli.report.report import WrittenReport


@click.command(
    "report",
    epilog="""\b
Examples:
  neuralink report model-flash/ --trace model.trace.safetensors \\
      -o report.html
  neuralink report model.placement.safetensors \\
      --trace new.trace.safetensors -o report.html --figures figures/
  neuralink report model-flash/ --trace model.trace.safetensors \\
      --device ufs3.1 --dram 10% -o report.html
""",
)
@click.argument("layout", metavar="FLASH", type=PATH)
@click.option("--trace", required=True, type=TRACE_PATH, metavar="TRACE", help="Trace of the same model, to replay.")
@output_option("HTML", "Page to write.")
@click.option(
    "--figures", type=PATH, metavar="DIR", help="Also write every figure as SVG and as PNG, into this folder."
)
@click.option(
    "--device",
    metavar="NAME|FILE",
    help="Device to model, as for `cluster`.  [default: the device the layout was made for]",
)
@click.option(
    "--dram",
    default="5%",
    show_default=True,
    metavar="SHARE|BYTES",
    help="DRAM for bundles, as for `bench`.",
)
@click.option(
    "--cache",
    type=click.Choice(POLICY_NAMES),
    default=DEFAULT_POLICY,
    show_default=True,
    help="Cache policy, as for `bench`.",
)
@click.option(
    "--tokens",
    type=WholeNumber(min=1),
    metavar="N",
    help="Replay at most N tokens.  [default: all; of large models, as many as take about half a minute]",
)
@overwrite_option
@reporting_options
def command(
    layout: Path,
    trace: Path,
    output: Path,
    figures: Path | None,
    device: str | None,
    dram: str,
    cache: str,
    tokens: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write an HTML page that shows what a layout gains.

    Replays the held-out tokens of TRACE against the layout FLASH (or placement file), as `bench` does, and writes one
    HTML file that needs no network. It shows the gain, over what, on which device and in how much DRAM; which neurons
    fire, and which fire together, in original and in stored order; run lengths; gain by layer and dataset; I/O time
    over DRAM; and where all of it came from. The same input gives the same file. Needs the extra `plot`.
    """
    from neuralink_cli.devices.device import find_device
    from neuralink_cli.report.measurements import ReportOptions
    from neuralink_cli.report.report import write_report
    from neuralink_cli.storage.budget import parse_budget

    options = ReportOptions(
        device=None if device is None else find_device(device),
        dram=parse_budget(dram),
        policy=cache,
        tokens=tokens,
    )
    written = write_report(layout, trace, output, options, figures=figures, overwrite=overwrite, progress=progress_bar)
    if as_json:
        print_json(_document(written, output, figures))
        return
    row = written.measured.stored
    click.echo(f"{output}: {human_bytes(written.bytes)}")
    print_text(f"gain {row.gain}, over naive reading {row.gain_over_naive}; 95% intervals")
    if figures is not None:
        click.echo(f"{figures}: {len(written.figures)} figures")


def _document(written: WrittenReport, output: Path, figures: Path | None) -> dict[str, Any]:
    measured = written.measured
    return {
        "output": str(output),
        "bytes": written.bytes,
        "figures": None if figures is None else str(figures),
        "figure_names": list(written.figures),
        "tokens": [asdict(part) for part in measured.bench.tokens],
        "rows": [asdict(row) for row in measured.bench.rows],
        "layers": [asdict(layer) for layer in measured.layers],
        "dram": {"tokens": measured.curve.tokens, "lines": [asdict(line) for line in measured.curve.lines]},
        "run_lengths": {
            runs.order: {str(length): int(count) for length, count in enumerate(runs.counts) if count}
            for runs in measured.curve.runs
        },
    }
