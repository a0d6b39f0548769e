"""`neuralink bench`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuralink_cli.architectures.coverage import coverage_text
from neuralink_cli.cli.options import PATH, TRACE_PATH, Number, WholeNumber, reporting_options, weights_option
from neuralink_cli.cli.output import print_json, print_table, print_text, progress_bar
from neuralink_cli.errors import OptionError
from neuralink_cli.sizes import human_bytes
from neuralink_cli.storage.policies import DEFAULT_POLICY, POLICY_NAMES

if TYPE_CHECKING:
    from neuralink_cli.bench.bench import BenchReport, BenchRow


# What stands above the tables.
_CAPTION = (
    "Per token. hits: active neurons found in DRAM. read, max: neurons in the mean and in the longest read. kB: what "
    "is read. p50 (median), p99, mean: the time of all reads. MB/s: bytes of active neurons per second. gain: the time "
    "of the original order over that of the row, both read the same way; naive: the same, but with no gap read across "
    "in the original order. The rows of a layout come last."
)


@click.command(
    "bench",
    epilog="""\b
Examples:
  neuralink bench model-flash/ --trace model.trace.safetensors
  neuralink bench old-flash/ new-flash/ --trace model.trace.safetensors \\
      --device ufs4.0 --device ufs3.1 --csv bench.csv
  neuralink bench model-flash/ --trace model.trace.safetensors --real
  neuralink bench model-flash/ --trace model.trace.safetensors \\
      --dram 20% --fail-below 1.2
""",
)
@click.argument("layouts", metavar="FLASH...", nargs=-1, required=True, type=PATH)
@click.option("--trace", required=True, type=TRACE_PATH, metavar="TRACE", help="Trace of the same model, to replay.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME|FILE",
    help="Device to model, as for `cluster`; may be repeated.  [default: the first layout's]",
)
@click.option(
    "--dram",
    default="5%",
    show_default=True,
    metavar="SHARE|BYTES",
    help="DRAM for bundles: a share of all bundles (5%), or an amount (64MB), which must also hold the resident rows.",
)
@click.option(
    "--cache",
    type=click.Choice(POLICY_NAMES),
    default=DEFAULT_POLICY,
    show_default=True,
    help="Cache policy. linked-s3fifo is S3-FIFO that rarely admits runs of neurons, which are cheap to read again; "
    "window keeps the neurons of the last tokens.",
)
@click.option(
    "--held-out",
    type=Number(0, 1, min_open=True),
    metavar="FRACTION",
    help="Replay this share of each dataset's tokens, the last ones.  [default: the tokens held out by `cluster`]",
)
@click.option("--all-tokens", is_flag=True, help="Replay all tokens, including those that made the order.")
@click.option("--tokens", type=WholeNumber(min=1), metavar="N", help="Replay at most N tokens.")
@click.option(
    "--real/--modelled",
    "real",
    default=False,
    help="Time real reads from the storage of the layout, past the page cache (256 tokens unless --tokens is given), "
    "or compute times from the device model.  [default: modelled]",
)
@click.option(
    "--bundle-bytes",
    multiple=True,
    type=WholeNumber(min=1),
    metavar="N",
    help="Model bundles of this size instead; may be repeated.",
)
@weights_option("Model bundles of weights in this format instead; may be repeated", multiple=True, default=())
@click.option("--csv", "csv_path", type=PATH, metavar="FILE", help="Also write all figures as CSV, one line per row.")
@click.option(
    "--fail-below",
    type=Number(min=0),
    metavar="GAIN",
    help="Exit code 1 if the order of a layout, read with collapse and cache, gains less over the original order read "
    "the same way. The lower end of the 95% interval counts.",
)
@click.option(
    "--fail-below-total",
    type=Number(min=0),
    metavar="GAIN",
    help="The same for the gain over naive reading: the original order, without collapse, with the same cache.",
)
@click.option("--overwrite", is_flag=True, help="Replace the CSV file if it exists.")
@reporting_options
def command(
    layouts: tuple[Path, ...],
    trace: Path,
    devices: tuple[str, ...],
    dram: str,
    cache: str,
    held_out: float | None,
    all_tokens: bool,
    tokens: int | None,
    real: bool,
    bundle_bytes: tuple[int, ...],
    weights: tuple[str, ...],
    csv_path: Path | None,
    fail_below: float | None,
    fail_below_total: float | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure the read times of layouts and their gain.

    Replays held-out tokens of TRACE against each layout FLASH (or placement file) and against the baselines: each
    matrix on its own (unbundled), bundles in original order, bundles by frequency. Each row is read without and with
    access collapse, without and with a cache. Gain is the mean I/O time of bundles in original order, read the same
    way with the same cache, over that of the row: what the order is worth. The last column compares with naive reading:
    original order, no collapse, the same cache. Both come with a 95% bootstrap interval over sequences.
    """
    from neuralink_cli.bench.bench import BenchOptions, bench_layouts
    from neuralink_cli.devices.device import find_device
    from neuralink_cli.files.replacing import require_text_output
    from neuralink_cli.storage.budget import parse_budget

    if all_tokens and held_out is not None:
        raise OptionError("--all-tokens and --held-out cannot be combined")
    if csv_path is not None:
        require_text_output(csv_path, overwrite, inputs=(*layouts, trace))
    options = BenchOptions(
        devices=tuple(find_device(name) for name in dict.fromkeys(devices)),
        dram=parse_budget(dram),
        policy=cache,
        held_out=1.0 if all_tokens else held_out,
        tokens=tokens,
        real=real,
        bundle_bytes=tuple(dict.fromkeys(bundle_bytes)),
        weights=tuple(dict.fromkeys(weights)),
    )
    report = bench_layouts(layouts, trace, options, progress=progress_bar)
    if csv_path is not None:
        _write_csv(csv_path, report, overwrite)
    if as_json:
        print_json(report.as_document())
    else:
        _print_report(report)
    report.check_gain(fail_below, fail_below_total)


def _write_csv(path: Path, report: BenchReport, overwrite: bool) -> None:
    from neuralink_cli.files.durable import new_file, write_all

    lines = [_csv_line(row) for row in report.rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with new_file(path, overwrite=overwrite) as handle:
        write_all(handle, text.getvalue().encode("utf-8", "surrogateescape"))


def _csv_line(row: BenchRow) -> dict[str, Any]:
    figures = asdict(row.figures)
    del figures["name"]
    way = {key: "" if value is None else value for key, value in asdict(row.way).items()}
    gains = {
        f"{name}{suffix}": getattr(gain, end)
        for name, gain in (("gain", row.gain), ("gain_over_naive", row.gain_over_naive))
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return {**way, "capacity": row.capacity, "dram_bytes": row.dram_bytes, **figures, **gains}


def _print_report(report: BenchReport) -> None:
    tokens = sum(part.tokens for part in report.tokens)
    letters = {layout: chr(ord("A") + k) for k, layout in enumerate(_layouts(report))}
    for layout, letter in letters.items() if len(letters) > 1 else ():
        click.echo(f"{letter}: {layout}")
    first = report.rows[0].figures
    print_text(
        f"{tokens:,} tokens, {first.active:,.1f} neurons active per token"
        + ("" if report.direct is not False else "; NO DIRECT I/O here: times are of the page cache")
    )
    if report.coverage is not None:
        click.echo(coverage_text(**report.coverage))
    print_text(_CAPTION)
    groups: dict[tuple[str, int | None, str], list[BenchRow]] = {}
    for row in report.rows:
        groups.setdefault((row.way.device, row.way.bundle_bytes, row.way.cache), []).append(row)
    slowest = max(row.figures.io_p99 for row in report.rows)
    unit, scale = ("ms", 1e3) if slowest >= 1e-3 else ("us", 1e6)
    header = ("", "hits", "reads", "read", "max", "kB", "p50", "p99", "mean", "MB/s", "gain", "naive")
    for (device, size, cache), rows in groups.items():
        scaled = "" if size is None else f", bundles of {size:,} bytes"
        room = f"cache {cache} of {rows[0].capacity:,} neurons, {human_bytes(rows[0].dram_bytes)}"
        click.echo()
        print_text(f"{device}{scaled}, {room if rows[0].capacity else 'no cache'}; times in {unit}")
        print_table(header, [(_label(row, letters), *_cells(row, scale)) for row in rows])
        for row in rows:
            if row.way.layout is not None and row.way.collapse:
                name = row.way.name if len(letters) == 1 else f"{letters[row.way.layout]} {row.way.name}"
                own = row.figures.io_mean * scale
                same, naive = (_number(own * gain.value) for gain in (row.gain, row.gain_over_naive))
                print_text(
                    f"{name}: gain {row.gain}, over naive reading {row.gain_over_naive}; 95% intervals. {_number(own)} "
                    f"{unit} a token; the original order, read the same way, {same}; naively {naive}"
                )


def _layouts(report: BenchReport) -> list[str]:
    return list(dict.fromkeys(row.way.layout for row in report.rows if row.way.layout is not None))


def _label(row: BenchRow, letters: dict[str, str]) -> str:
    way = row.way
    if way.collapse:
        return "  + collapse"
    return way.name if way.layout is None or len(letters) == 1 else f"{letters[way.layout]} {way.name}"


def _number(value: float) -> str:
    """Three digits that say something, so that a column of a table stays narrow."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _cells(row: BenchRow, scale: float) -> tuple[str, ...]:
    figures = row.figures
    return (
        f"{figures.hit_rate:.0%}",
        _number(figures.reads),
        _number(figures.mean_read_length),
        str(figures.longest_read),
        f"{figures.bytes_read / 1000:.0f}",
        *(_number(scale * t) for t in (figures.io_p50, figures.io_p99, figures.io_mean)),
        f"{figures.useful_bytes_per_second / 1e6:.0f}",
        f"{row.gain.value:.2f}",
        f"{row.gain_over_naive.value:.2f}",
    )
