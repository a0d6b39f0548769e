"""`neuralink build`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.cli.options import PATH, Number, WholeNumber, reporting_options, weights_option
from neuralink_cli.cli.output import print_json, print_table, print_text, progress_bar
from neuralink_cli.errors import OptionError
from neuralink_cli.layout.names import RESIDENT_CHOICES
from neuralink_cli.placement.placement import EFFORT_NAMES
from neuralink_cli.sizes import human_bytes, human_number, human_seconds

if TYPE_CHECKING:
    from neuralink_cli.pipeline.build import BuildSummary, PlannedStage
    from neuralink_cli.pipeline.build_file import BuildRequest
    from neuralink_cli.pipeline.inputs import ModelInput

# The table of a build file that an option stands for.
_TABLES = {
    "revision": "model",
    "dataset": "profile",
    "text_column": "profile",
    "active_ratio": "profile",
    "num_samples": "profile",
    "max_tokens": "profile",
    "max_seq_length": "profile",
    "seed": "profile",
    "effort": "cluster",
    "pin_hot": "cluster",
    "resident": "relayout",
    "weights": "relayout",
    "dram": "bench",
    "fail_below": "bench",
}


@click.command(
    "build",
    epilog="""\b
Examples:
  neuralink build MODEL --dataset calib.jsonl --device ufs4.0 \\
      --device ufs3.1 --device nvme -o fleet/
  neuralink build MODEL --dataset calib.jsonl -o fleet/ --dry-run
  neuralink build -f neuralink.toml
  neuralink build -f neuralink.toml --locked --json
""",
)
@click.argument("model", required=False)
@click.option(
    "-f",
    "--file",
    "build_file",
    type=PATH,
    metavar="FILE",
    help="Build what a TOML file says, which can set every option of every stage (see examples/neuralink.toml). "
    "Cannot be combined with MODEL or with options of stages.",
)
@click.option(
    "-o", "--output", type=PATH, metavar="DIR", help="Folder of the build: absent, empty, or an earlier build."
)
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a hub MODEL.  [default: main]")
@click.option("--dataset", multiple=True, metavar="DATA", help="Calibration data, as for `profile`; may be repeated.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME|FILE",
    help="Storage to make a layout for, as for `cluster`; may be repeated.  [default: ufs4.0]",
)
@click.option(
    "--text-column", multiple=True, metavar="NAME", help="Column with the text, as for `profile`; may be repeated."
)
@click.option(
    "--active-ratio",
    type=Number(0, 1, min_open=True, max_open=True),
    metavar="RATIO",
    help="Share of neurons that fires; needed unless the activation is a kind of ReLU.",
)
@click.option("--num-samples", type=WholeNumber(min=0), metavar="N", help="As for `profile`; 0 for all.")
@click.option("--max-tokens", type=WholeNumber(min=0), metavar="N", help="As for `profile`; 0 for all.")
@click.option("--max-seq-length", type=WholeNumber(min=1), metavar="N", help="As for `profile`.")
@click.option("--seed", type=int, metavar="N", help="Draw samples at random, as for `profile`.")
@click.option("--effort", type=click.Choice(EFFORT_NAMES), help="How long to refine orders, as for `cluster`.")
@click.option("--pin-hot", type=Number(0, 0.9), metavar="FRACTION", help="Share of neurons to keep in DRAM, hottest.")
@click.option("--resident", type=click.Choice(RESIDENT_CHOICES), help="Rows for DRAM, as for `relayout`.")
@weights_option("Format to store FFN weights in", default=None, show_default=False)
@click.option("--dram", metavar="SHARE|BYTES", help="DRAM when layouts are replayed, as for `bench`.")
@click.option(
    "--fail-below",
    type=Number(min=0),
    metavar="GAIN",
    help="Exit code 1 if a layout, on the device it was made for, gains less over the original order, both with "
    "collapse and cache. The lower end of the 95% interval counts.",
)
@click.option(
    "--locked",
    is_flag=True,
    help="Write no lock file. If anything would come out different from it, or does, say what and exit with code 5.",
)
@click.option("--dry-run", is_flag=True, help="Print which stages would run, why, and what they take; write nothing.")
@reporting_options
def command(
    model: str | None,
    build_file: Path | None,
    output: Path | None,
    devices: tuple[str, ...],
    locked: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the whole pipeline for a fleet of devices.

    Records one trace of MODEL, then makes, verifies and measures a layout for every device, and replays each layout on
    every device. A stage runs only if its inputs, its options or the version of neuralink have changed since
    neuralink.lock.json was written in DIR, or if its output is missing or damaged; so a stopped build resumes where it
    stopped. Overwrites nothing that the lock file does not list.
    """
    from neuralink_cli.pipeline.build import build, plan_build
    from neuralink_cli.pipeline.fleet import check_gains
    from neuralink_cli.pipeline.inputs import read_model

    request, folder = _request(model, build_file, output, devices, options)
    if dry_run:
        source = read_model(request.model, request.options)
        planned = plan_build(source, folder, request.options, locked=locked, progress=progress_bar)
        _print_plan(planned, source, folder, request, as_json)
        return
    with _saying_how_to_go_on():
        summary = build(request.model, folder, request.options, locked=locked, progress=progress_bar)
    if as_json:
        print_json(asdict(summary))
    else:
        _print_summary(summary)
    if request.fail_below is not None:
        check_gains(summary.cells, request.fail_below)


def _request(
    model: str | None, build_file: Path | None, output: Path | None, devices: Sequence[str], options: dict[str, Any]
) -> tuple[BuildRequest, Path]:
    """What to build and where, from a file or from the command line."""
    from neuralink_cli.pipeline.build_file import parse_build, read_build_file

    given = {name: value for name, value in options.items() if value not in (None, ())}
    if build_file is not None:
        stated = [*(["MODEL"] if model is not None else []), *(["--device"] if devices else []), *map(_option, given)]
        if stated:
            raise OptionError(
                f"-f takes the place of {', '.join(stated)}", fix=f"set it in {build_file}, or do without -f"
            )
        request = read_build_file(build_file)
        if output is not None and request.output is not None:
            raise OptionError(f"{build_file} has an `output`, so it takes the place of -o", fix="drop one of them")
    else:
        if model is None or "dataset" not in given:
            missing = "MODEL" if model is None else "--dataset"
            raise OptionError(f"{missing} is missing", fix="pass MODEL and --dataset, or a build file with -f")
        document: dict[str, Any] = {"model": {"path": model}, "device": [{"device": name} for name in _each(devices)]}
        for name, value in given.items():
            table = document.setdefault(_TABLES[name], {})
            table[name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
        request = parse_build(document, "the command line", Path())
    folder = output or request.output
    if folder is None:
        raise OptionError("no folder to build in", fix="pass one with -o")
    return request, folder


def _each(devices: Sequence[str]) -> list[str]:
    from neuralink_cli.devices.device import DEFAULT_DEVICE

    return list(dict.fromkeys(devices)) or [DEFAULT_DEVICE]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except BaseException as stop:
        if not isinstance(stop, Exception):
            stop.args = ("what was done is kept; run the same command again to continue",)
        raise


def _print_plan(
    planned: Sequence[PlannedStage], source: ModelInput, folder: Path, request: BuildRequest, as_json: bool
) -> None:
    from neuralink_cli.pipeline.build import NOT_MADE

    needs = _needs(planned, source, folder, request)
    if as_json:
        print_json(
            {
                "output": str(folder),
                "stages": [
                    {
                        "stage": each.stage.name,
                        "device": each.stage.device,
                        "output": each.stage.output,
                        "runs": each.why is not None,
                        "certain": each.certain,
                        "why": each.why,
                        **needs.get(each.stage.output, _UNKNOWN),
                    }
                    for each in planned
                ],
            }
        )
        return
    rows = []
    for each in planned:
        memory, disk, seconds = needs.get(each.stage.output, _UNKNOWN).values()
        verdict = "up to date" if each.why is None else ("would run" if each.certain else "may run")
        cells = ("" if memory is None else human_bytes(memory), "" if disk is None else human_bytes(disk))
        rows.append([each.stage.title, verdict, *cells, "" if seconds is None else human_seconds(seconds)])
    print_table(["stage", "", "memory", "disk", "time"], rows)
    for each in planned:
        if each.why not in (None, NOT_MADE):
            print_text(f"{each.stage.title}: {each.why}")
    running = sum(each.why is not None and each.certain for each in planned)
    maybe = sum(not each.certain for each in planned)
    # A layout that is run lies there as a checkpoint for that time only.
    passing = max((needs[each.stage.output]["disk_bytes"] for each in planned if _is_passing(each, needs)), default=0)
    lasting = [each.stage.output for each in planned if not _is_passing(each, needs)]
    disk = passing + sum(needs.get(output, _UNKNOWN)["disk_bytes"] or 0 for output in lasting)
    memory = max((each["memory_bytes"] or 0 for each in needs.values()), default=0)
    free = shutil.disk_usage(folder if folder.exists() else folder.absolute().parent).free
    click.echo(f"{folder}: {running} of {len(planned)} stages would run, {maybe} more may")
    print_text(
        f"as far as known they take up to {human_bytes(memory)} of memory and {human_bytes(disk)} of disk, of which "
        f"{human_bytes(free)} are free"
    )


def _is_passing(planned: PlannedStage, needs: Mapping[str, Any]) -> bool:
    return planned.stage.name == "forward" and planned.stage.output in needs


_UNKNOWN: dict[str, Any] = {"memory_bytes": None, "disk_bytes": None, "seconds": None}


def _needs(
    planned: Sequence[PlannedStage], source: ModelInput, folder: Path, request: BuildRequest
) -> dict[str, dict[str, Any]]:
    """What stages that run take, by output, as far as it is known."""
    from neuralink_cli.pipeline.needs import forward_needs, layout_needs, order_needs, trace_needs
    from neuralink_cli.pipeline.options import TRACE_FILE

    options, found = request.options, {}
    running = [each.stage for each in planned if each.why is not None]
    traced = any(stage.name == "profile" for stage in running)
    if traced:
        # First: what it loads stays in memory, and so is part of what later stages take.
        memory, disk = trace_needs(source, options)
        found[TRACE_FILE] = {**_UNKNOWN, "memory_bytes": memory, "disk_bytes": disk}
    compared = [stage for stage in running if stage.name == "forward"]
    if compared:
        expected_run = asdict(forward_needs(source, options))
        found |= {stage.output: {**_UNKNOWN, **expected_run} for stage in compared}
    layouts = [stage for stage in running if stage.name == "relayout"]
    if layouts:
        expected = layout_needs(source, options, folder)
        for stage in layouts:
            found[stage.output] = {
                "memory_bytes": expected.memory_bytes,
                "disk_bytes": expected.bytes_written,
                "seconds": expected.seconds,
            }
    orders = [stage for stage in running if stage.name == "cluster"]
    if orders and not traced:
        expected_order = order_needs(folder / TRACE_FILE, options)
        for stage in orders:
            found[stage.output] = {**_UNKNOWN, **asdict(expected_order)}
    return found


def _print_summary(summary: BuildSummary) -> None:
    from neuralink_cli.evaluation.forward_check import forward_text

    devices = list(dict.fromkeys(cell.device for cell in summary.cells))
    cells = {(cell.made_for, cell.device): cell for cell in summary.cells}
    run = sum(stage.why is not None for stage in summary.stages)
    layouts = "1 layout" if len(devices) == 1 else f"{len(devices)} layouts"
    click.echo(f"{summary.output}: {layouts} verified; {run} of {len(summary.stages)} stages were run")
    print_text(
        f"On {summary.tokens:,} held-out tokens: gain over the original order, both with collapse and cache; in "
        "brackets the modelled I/O time of the best layout for the device, divided by that of the row"
    )
    rows = []
    for made_for in devices:
        of_row = [cells[made_for, device] for device in devices]
        rows.append([made_for, *(f"{cell.gain.value:.2f} ({cell.ratio_to_best:.3f})" for cell in of_row)])
    print_table(["made for", *(f"on {device}" for device in devices)], rows)
    for device in devices:
        print_text(f"{device}: gain {cells[device, device].gain} with its own layout; 95% interval")
    for device, real in summary.real.items():
        print_text(
            f"{device}: really read from the storage of this machine, {real.tokens:,} tokens, "
            f"{human_number(1e3 * real.io_mean)} ms each: gain {real.gain}, over naive reading {real.gain_over_naive}"
            + ("" if real.direct else "; NO DIRECT I/O here: times are of the page cache")
        )
    for device, figures in summary.forward.items():
        for line in forward_text(dict(figures)):
            print_text(f"{device}: {line}")
    others = [cell for cell in summary.cells if cell.made_for != cell.device]
    if others:
        worst = min(others, key=lambda cell: cell.ratio_to_best)
        more = 1 / worst.ratio_to_best - 1
        print_text(
            f"a layout made for another device takes at most {more:.1%} longer to read than the best one: "
            f"{worst.made_for} on {worst.device}"
        )
