"""Writes a report: measures a layout, draws the figures, and puts them on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import read_contender
from neuralink_cli.files.durable import (
    new_directory,
    new_file,
    require_replaceable,
    write_all,
    write_file,
)
from neuralink_cli.files.replacing import require_text_output
from neuralink_cli.progress import Progress, no_progress
from neuralink_cli.report.drawing import Drawn, require_matplotlib
from neuralink_cli.report.figures import FIGURE_NAMES, draw_all
from neuralink_cli.report.measurements import Measurements, ReportOptions, measure
from neuralink_cli.report.page import render_page
from neuralink_cli.report.provenance import read_provenance

_ENDINGS = ("svg", "png")


@dataclass(frozen=True)
class WrittenReport:
    """What was written, and what it shows."""

    bytes: int
    figures: tuple[str, ...]
    measured: Measurements


def write_report(
    layout: Path,
    trace: Path,
    output: Path,
    options: ReportOptions = ReportOptions(),
    *,
    figures: Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> WrittenReport:
    """Measure a layout, or a placement file, on the held-out tokens of a trace, and write what it gains as a page.

    Args:
        output: HTML file to write.
        figures: Folder to write every figure to, as SVG and as PNG; None for none.

    Raises:
        MissingDependencyError: matplotlib, of the extra `plot`, is not installed.
        InputError: The layout, or the trace, is missing or malformed.
        MismatchError: They are of different models.
        OptionError: Every token made the order, or the DRAM does not hold what the layout keeps in it.
        OutputError: An output exists, or cannot be written.
    """
    require_matplotlib()
    require_text_output(output, overwrite, inputs=(layout, trace))
    if figures is not None:
        require_replaceable(figures, overwrite, _holds_figures)
    with Trace(trace) as opened:
        opened.check_content()
        contender = read_contender(layout, opened)
        provenance = read_provenance(layout, opened)
        measured = measure(opened, contender, options, progress=progress)
    drawn = draw_all(measured, png=figures is not None)
    page = render_page(measured, provenance, drawn)
    with new_file(output, overwrite=overwrite) as handle:
        write_all(handle, page)
        # Both are there, or neither.
        if figures is not None:
            _write_figures(figures, drawn, overwrite)
    return WrittenReport(len(page), tuple(drawn), measured)


def _write_figures(folder: Path, drawn: dict[str, Drawn], overwrite: bool) -> None:
    with new_directory(folder, overwrite=overwrite, replaceable=_holds_figures) as partial:
        for name, figure in drawn.items():
            write_file(partial / f"{name}.svg", figure.svg.encode())
            if figure.png is not None:
                write_file(partial / f"{name}.png", figure.png)


def _holds_figures(folder: Path) -> bool:
    """Whether a folder holds the figures of a report and nothing else."""
    known = {f"{name}.{ending}" for name in FIGURE_NAMES for ending in _ENDINGS}
    return {path.name for path in folder.iterdir()} <= known
