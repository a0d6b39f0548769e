"""`neuralink report` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_random_trace
from tests.cli.conftest import Neuralink
from tests.layouts import LayoutFactory


def test_writes_a_page_of_a_permuted_layout(neuralink: Neuralink, layouts: LayoutFactory, tmp_path: Path) -> None:
    made = layouts.permuted()
    trace = write_random_trace(made.model, tmp_path / "trace")
    common = ("report", made.layout, "--trace", trace, "-o", tmp_path / "page.html", "-q", "--dram", "20%")
    outcome = neuralink(*common, "--device", "ufs3.1")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith(f"{tmp_path}/page.html: ")
    assert outcome.stdout.endswith("; 95% intervals\n")
    text = (tmp_path / "page.html").read_text()
    assert "permuted layout" in text
    assert "on ufs3.1" in text
    assert "exists" in neuralink(*common).error


def test_prints_what_it_measured_as_json(neuralink: Neuralink, layouts: LayoutFactory, tmp_path: Path) -> None:
    made = layouts.bundled()
    trace = write_random_trace(made.model, tmp_path / "trace")
    page = tmp_path / "page.html"
    outcome = neuralink("report", made.layout, "--trace", trace, "-o", page, "--json", "-q", "--cache", "none")
    assert outcome.code == 0
    assert "bundled layout" in page.read_text()
    document = json.loads(outcome.stdout)
    assert document["bytes"] == page.stat().st_size
    assert document["figures"] is None
    assert [line["order"] for line in document["dram"]["lines"]][:3] == ["original", "original", "frequency"]
    assert {row["way"]["name"] for row in document["rows"]} >= {"original", "frequency"}
    assert [layer["name"] for layer in document["layers"]] == ["layers.0", "layers.1"]


def test_a_missing_extra_is_one_line_and_its_own_exit_code(
    neuralink: Neuralink, layouts: LayoutFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = layouts.bundled()
    outcome = neuralink("report", made.layout, "--trace", tmp_path / "none", "-o", tmp_path / "page.html")
    assert outcome.error.endswith("pip install 'neuralink-cli[plot]'")
