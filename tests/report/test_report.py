"""The page of a report: complete, safe to open, the same every time."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from neuralink_cli.activations.trace import Trace
from neuralink_cli.bench.bench import bench_layouts
from neuralink_cli.bench.contenders import read_contender
from neuralink_cli.clustering.cluster import ClusterOptions, cluster
from neuralink_cli.devices.device import find_device
from neuralink_cli.errors import MissingDependencyError, OptionError, OutputError
from neuralink_cli.report import measurements
from neuralink_cli.report.figures import FIGURE_NAMES
from neuralink_cli.report.measurements import ReportOptions, measure
from neuralink_cli.report.report import write_report
from neuralink_cli.report.words import summary
from tests.report.conftest import NASTY, Reported
from tests.traces import write_clustered_trace, write_routed_trace

# Attributes with which a page loads or runs something.
LOADS = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}


class Page(HTMLParser):
    """Tags and their attributes, and all text outside of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_figure_is_there_with_its_caption(reported: Reported) -> None:
    tags = Page(reported.text).tags
    assert [attributes["id"] for tag, attributes in tags if tag == "figure"] == list(FIGURE_NAMES)
    assert sum(tag == "figcaption" for tag, _ in tags) == len(FIGURE_NAMES)
    drawn = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawn) == len(FIGURE_NAMES)
    assert all(attributes["aria-label"] and attributes["viewbox"] for attributes in drawn)


def test_it_loads_and_runs_nothing(reported: Reported) -> None:
    for tag, attributes in Page(reported.text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}, tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in LOADS & attributes.keys():
            assert attributes[name].startswith(("#", "data:")), attributes[name][:80]
    assert "@import" not in reported.text
    assert set(re.findall(r"url\((.)", reported.text)) <= {"#"}


def test_names_of_files_are_escaped(reported: Reported) -> None:
    assert "<script>" not in reported.text
    assert "\u202e" not in reported.text
    assert NASTY.replace("\u202e", "\\u202e") + "-0" in Page(reported.text).words


def test_every_id_is_of_one_element_and_every_reference_leads_to_one(reported: Reported) -> None:
    tags = Page(reported.text).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    values = " ".join(value for _, attributes in tags for value in attributes.values() if not value.startswith("data"))
    used = {value[1:] for _, each in tags if (value := each.get("xlink:href", "")).startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", values))
    assert used
    assert used <= set(ids)


def test_it_is_small_and_has_its_colours_from_the_page(reported: Reported) -> None:
    assert reported.page.stat().st_size == reported.written.bytes < 5_000_000
    drawn = "".join(re.findall(r"<svg .*?</svg>", reported.text, re.DOTALL))
    assert "var(--ink)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'"data:[^"]*"', "", drawn))
    assert "prefers-color-scheme: dark" in reported.text


def test_the_gain_is_that_of_the_bench(reported: Reported) -> None:
    row = bench_layouts([reported.placement], reported.trace).rows[-1]
    assert row.way.layout is not None
    assert row.way.collapse
    words = Page(reported.text).words
    assert f"Reading is {row.gain} times as fast." in words
    assert f"Over naive reading, the gain is {row.gain_over_naive}." in words
    assert len(row.gains_by_source) == 2
    assert reported.written.measured.stored == row


def test_gains_of_layers_add_up_to_that_of_all(reported: Reported) -> None:
    measured = reported.written.measured
    assert [layer.name for layer in measured.layers] == ["layers.0", "layers.1", "layers.2"]
    gains = [layer.gain for layer in measured.layers]
    assert min(gains) < measured.stored.gain.value < max(gains)
    active = sum(60 * layer.active_ratio for layer in measured.layers)
    assert active == pytest.approx(measured.stored.figures.active)


def test_the_picture_is_of_the_block_whose_gain_is_the_median(reported: Reported) -> None:
    layers = sorted(reported.written.measured.layers, key=lambda layer: layer.gain)
    assert reported.written.measured.pictures.block == layers[1].name


def test_only_tokens_that_made_no_order_are_measured(reported: Reported) -> None:
    parts = reported.written.measured.bench.tokens
    assert [(part.start, part.stop) for part in parts] == [(350, 400), (650, 700)]


def test_it_names_no_path_and_no_time(reported: Reported) -> None:
    assert str(reported.placement.parent) not in reported.text
    assert not re.search(r"20\d\d-\d\d-\d\d", reported.text)


def test_every_figure_is_written_as_svg_and_png(reported: Reported) -> None:
    wanted = {f"{name}.{ending}" for name in FIGURE_NAMES for ending in ("svg", "png")}
    assert {path.name for path in reported.figures.iterdir()} == wanted
    for name in FIGURE_NAMES:
        assert ET.parse(reported.figures / f"{name}.svg").getroot().tag.endswith("}svg")
        assert (reported.figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_outputs_are_replaced_only_if_asked(reported: Reported, tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    page.write_text("mine")
    figures.mkdir()
    (figures / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_report(reported.placement, reported.trace, page)
    with pytest.raises(OutputError, match="not an earlier output"):
        write_report(reported.placement, reported.trace, page, figures=figures, overwrite=True)
    assert page.read_text() == (figures / "notes.txt").read_text() == "mine"


def test_the_same_input_gives_the_same_bytes_whatever_the_user_has_set(reported: Reported, tmp_path: Path) -> None:
    import matplotlib

    page, figures = tmp_path / "again.html", tmp_path / "figures"
    page.write_text("an earlier one")
    figures.mkdir()
    (figures / "dram.svg").write_text("an earlier one")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        write_report(reported.placement, reported.trace, page, figures=figures, overwrite=True)
        assert matplotlib.rcParams["font.size"] == 30
    assert page.read_bytes() == reported.page.read_bytes()
    for path in sorted(reported.figures.iterdir()):
        assert (figures / path.name).read_bytes() == path.read_bytes(), path.name


def test_without_matplotlib_it_says_what_to_install(
    reported: Reported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'neuralink-cli\[plot\]'"):
        write_report(reported.placement, reported.trace, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_nothing_is_shown_of_tokens_that_made_the_order(tmp_path: Path) -> None:
    write_clustered_trace(tmp_path / "trace")
    cluster(tmp_path / "trace", tmp_path / "placement", ClusterOptions(find_device("ufs4.0"), "linked", held_out=0))
    with pytest.raises(OptionError, match="none can measure it"):
        write_report(tmp_path / "placement", tmp_path / "trace", tmp_path / "page.html")


def test_experts_of_a_layer_are_one_layer(tmp_path: Path) -> None:
    write_routed_trace(tmp_path / "trace")
    cluster(tmp_path / "trace", tmp_path / "placement", ClusterOptions(find_device("ufs4.0"), "linked"))
    with Trace(tmp_path / "trace") as trace:
        measured = measure(trace, read_contender(tmp_path / "placement", trace), ReportOptions())
    assert [(layer.name, layer.blocks) for layer in measured.layers] == [("layers.0.experts", 2)]
    # Of the tokens that were routed to an expert, which are half of all.
    assert 120 / 2 * measured.layers[0].active_ratio == pytest.approx(measured.stored.figures.active)


def test_of_a_large_model_fewer_tokens_are_replayed_and_the_page_says_so(
    reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The 180 neurons fire about 25 times at a token.
    monkeypatch.setattr(measurements, "_MOST_FIRING", 1000)
    monkeypatch.setattr(measurements, "_CURVE_FIRING", 300)
    with Trace(reported.trace) as trace:
        measured = measure(trace, read_contender(reported.placement, trace), ReportOptions())
    assert 0 < measured.curve.tokens < measured.tokens < measured.held_out == 100
    assert f"Measured on {measured.tokens} of the 100 tokens of " in " ".join(summary(measured, "m"))
    with Trace(reported.trace) as trace:
        asked = measure(trace, read_contender(reported.placement, trace), ReportOptions(tokens=90))
    assert asked.tokens == 90
