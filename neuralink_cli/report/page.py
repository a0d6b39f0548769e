"""Makes the page of a report: one HTML file that loads nothing. Every text in it that comes from a file is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import groupby
from string import Template

from neuralink_cli.bench.bench import BenchRow
from neuralink_cli.errors import printable
from neuralink_cli.placement.placement import FREQUENCY, ORIGINAL
from neuralink_cli.report.drawing import DARK, LIGHT, Drawn, inline_svg
from neuralink_cli.report.measurements import Measurements
from neuralink_cli.report.provenance import Provenance
from neuralink_cli.report.words import dram_text, duration, figure_texts, summary
from neuralink_cli.sizes import human_bytes
from neuralink_cli.storage.policies import NO_CACHE

_TEMPLATE = "page.html"
_HEADER = ("order", "hits", "reads", "neurons a read", "kB read", "mean I/O", "p95", "gain (95 %)", "over naive (95 %)")


def render_page(measured: Measurements, provenance: Provenance, figures: Mapping[str, Drawn]) -> bytes:
    """The page as UTF-8, from what was measured and drawn; the same arguments give the same bytes."""
    texts = figure_texts(measured)
    template = Template(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    page = template.substitute(
        title=_text(f"What the stored order gains: {provenance.model}"),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        summary="\n".join(f"<p>{_text(paragraph)}</p>" for paragraph in summary(measured, provenance.model)),
        facts="\n".join(_facts(measured)),
        figures="\n".join(_figure(drawn, *texts[name]) for name, drawn in figures.items()),
        table_text=_text(
            "Means over held-out tokens, all blocks together. The gain is over bundles in original order, read the "
            "same way with the same cache; the last column is over naive reading."
        ),
        tables="\n".join(_tables(measured)),
        provenance="\n".join(_section(title, lines) for title, lines in provenance.sections),
    )
    return page.encode()


def _text(text: str) -> str:
    """A text for the page: markup escaped, on one line, and nothing that UTF-8 does not hold."""
    return html.escape(printable(text).encode("utf-8", "backslashreplace").decode())


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())


def _facts(measured: Measurements) -> Iterator[str]:
    stored = measured.stored
    cached = stored.way.cache != NO_CACHE
    hits = f"of DRAM, where {stored.figures.hit_rate:.0%} of what fires is found"
    for value, name in (
        (f"{stored.gain.value:.2f}\u00d7", "gain over the original order"),
        (f"{stored.gain_over_naive.value:.2f}\u00d7", "gain over naive reading"),
        (duration(stored.figures.io_mean), f"I/O time a token, on {measured.device.name}"),
        (human_bytes(stored.dram_bytes) if cached else "none", hits if cached else "DRAM for a cache"),
    ):
        yield f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>"


def _figure(drawn: Drawn, title: str, caption: str) -> str:
    return (
        f'<figure id="{drawn.name}"><h3>{_text(title)}</h3>{inline_svg(drawn, _text(title))}'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _tables(measured: Measurements) -> Iterator[str]:
    """A table for every cache there is."""
    for _, rows in groupby(measured.bench.rows, lambda row: row.way.cache):
        group = list(rows)
        head = "".join(f"<th>{_text(name)}</th>" for name in _HEADER)
        body = "\n".join(_row(row) for row in group)
        caption = _text(f"{measured.device.name}, {dram_text(group[0])}")
        yield f"<table><caption>{caption}</caption>\n<tr>{head}</tr>\n{body}\n</table>"


def _row(row: BenchRow) -> str:
    figures, way = row.figures, row.way
    name = {ORIGINAL: "original", FREQUENCY: "by frequency"}.get(way.name, way.name) if way.layout is None else way.name
    cells = (
        f"{name}, gaps read across" if way.collapse else name,
        f"{figures.hit_rate:.0%}",
        f"{figures.reads:,.1f}",
        f"{figures.mean_read_length:,.2f}",
        f"{figures.bytes_read / 1000:,.0f}",
        duration(figures.io_mean),
        duration(figures.io_p95),
        str(row.gain),
        str(row.gain_over_naive),
    )
    kind = ' class="stored"' if way.layout is not None else ""
    return f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _section(title: str, lines: tuple[tuple[str, str], ...]) -> str:
    items = "\n".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in lines)
    return f"<h3>{_text(title)}</h3>\n<dl>\n{items}\n</dl>"
