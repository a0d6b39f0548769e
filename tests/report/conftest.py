from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from neuralink_cli.report.report import WrittenReport, write_report
from tests.traces import write_clustered_trace

# What a data set may be called: markup, a formula, a character that turns text around, and no Latin.
NASTY = "<script>alert('1')</script> & \"x\" $\\frac{1}$ \u202e \u4e2d"


@dataclass(frozen=True)
class Reported:
    """A trace, a placement, and the report of the two."""

    trace: Path
    placement: Path
    page: Path
    figures: Path
    written: WrittenReport

    @property
    def text(self) -> str:
        return self.page.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    folder = tmp_path_factory.mktemp("report")
    trace, placement = folder / "trace", folder / "placement"
    write_clustered_trace(trace, source=NASTY)
    cluster(trace, placement, ClusterOptions(find_device("ufs4.0"), order="linked"))
    written = write_report(placement, trace, folder / "report.html", figures=folder / "figures")
    return Reported(trace, placement, folder / "report.html", folder / "figures", written)
