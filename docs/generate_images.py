"""Writes docs/images: the picture that the README opens with, from a placement and a trace of the example model."""

from __future__ import annotations

import sys
from pathlib import Path

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.contenders import read_contender
from neuralink_cli.report.drawing import drawing_style, render
from neuralink_cli.report.figures import fires_in_both
from neuralink_cli.report.measurements import ReportOptions, measure

FOLDER = Path(__file__).parent / "images"


def main(placement: Path, trace: Path) -> None:
    """Draw what fires in the block whose gain is the median, in both orders."""
    with Trace(trace) as opened:
        measured = measure(opened, read_contender(placement, opened), ReportOptions())
    with drawing_style():
        drawn = render("fires", fires_in_both(measured.pictures), png=True)
    FOLDER.mkdir(exist_ok=True)
    assert drawn.png is not None
    (FOLDER / "fires.png").write_bytes(drawn.png)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
