"""The figures of a report. Every function draws one, within `drawing_style`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuralink_cli.devices.ratio import Ratio
from neuralink_cli.errors import printable, shorten
from neuralink_cli.placement.placement import FREQUENCY, ORIGINAL
from neuralink_cli.report.drawing import LIGHT, WIDTH, Drawn, drawing_style, new_figure, render
from neuralink_cli.report.measurements import Measurements
from neuralink_cli.report.pictures import BlockPictures, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_NAME = 28
# More layers than this are a line without a marker for each.
_MARKED_LAYERS = 48
# Runs so long that fewer of the neurons are in them are not shown.
_LEAST_SHARE = 0.002


def fires(pictures: BlockPictures, *, stored: bool) -> Figure:
    """Which slots fire at which token, in one order."""
    figure = new_figure(240)
    _show_raster(figure.subplots(), pictures, stored=stored)
    return figure


def fires_in_both(pictures: BlockPictures) -> Figure:
    """The same in both orders, side by side."""
    figure = new_figure(280, width=2 * WIDTH)
    for axes, stored in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        _show_raster(axes, pictures, stored=stored)
        axes.set_title("stored order" if stored else "original order")
    axes.set_ylabel("")
    return figure


def together(pictures: BlockPictures, *, stored: bool) -> Figure:
    """Which slots fire together, in one order; both orders have the same scale."""
    figure = new_figure(330)
    axes = figure.subplots()
    pairs = pictures.stored_pairs if stored else pictures.original_pairs
    most = strongest_pair(pictures)
    _show(axes, pairs / most if most else pairs, "stored" if stored else "original", pictures.neurons)
    axes.set_ylim(pictures.neurons, 0)
    axes.set_aspect("equal")
    axes.set_xlabel("slot")
    axes.set_ylabel("slot")
    return figure


def strongest_pair(pictures: BlockPictures) -> float:
    """What the strongest colour of `together` stands for, see `co_activation`."""
    return float(max(pictures.original_pairs.max(initial=0), pictures.stored_pairs.max(initial=0)))


def run_lengths(measured: Measurements) -> Figure:
    """Share of the neurons that fire in runs of at least so many slots."""
    figure = new_figure(240)
    axes = figure.subplots()
    longest = 2
    for runs, line in zip(measured.curve.runs, _line_styles(len(measured.curve.runs)), strict=True):
        neurons = runs.counts * np.arange(runs.counts.size)
        total = int(neurons.sum())
        if not total:
            continue
        at_least = neurons[::-1].cumsum()[::-1] / total
        longest = max(longest, int(np.flatnonzero(at_least >= _LEAST_SHARE)[-1]))
        axes.plot(np.arange(1, at_least.size), at_least[1:], label=_short(runs.order), marker="o", **line)
    axes.set_xscale("log")
    axes.set_xlim(0.95, longest * 1.1)
    places = [digit * 10**power for power in range(5) for digit in (1, 2, 5) if digit * 10**power <= longest]
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("length of the run, in slots")
    axes.set_ylabel("in runs at least so long")
    _legend(axes)
    return figure


def dram(measured: Measurements) -> Figure:
    """Mean I/O time of a token, and the hit rate, over the budget of DRAM."""
    figure = new_figure(330)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    slowest = max(point.io_mean for line in measured.curve.lines for point in line.points)
    scale, unit = (1e3, "ms") if slowest >= 1e-3 else (1e6, "µs")
    naive, *collapsed = measured.curve.lines
    styles = _line_styles(len(collapsed))
    own: dict[str, Any] = {"color": LIGHT["original"], "linestyle": (0, (1, 1.5))}
    for line, style in [(naive, own), *zip(collapsed, styles, strict=True)]:
        shares = [point.share for point in line.points]
        name = _short(line.order) if line.collapse else f"{line.order}, naive reading"
        upper.plot(shares, [scale * point.io_mean for point in line.points], label=name, marker="o", **style)
        lower.plot(shares, [point.hit_rate for point in line.points], marker="o", **style)
    upper.set_ylim(bottom=0)
    upper.set_ylabel(f"I/O time a token, {unit}")
    lower.set_ylim(0, 1)
    lower.set_ylabel("hit rate")
    lower.yaxis.set_major_formatter(_percent)
    lower.xaxis.set_major_formatter(_percent)
    lower.set_xlabel("DRAM, as a share of all bundles")
    _legend(upper)
    return figure


def gain_by_layer(measured: Measurements) -> Figure:
    """Gain of the stored order, layer by layer."""
    layers = measured.layers
    figure = new_figure(230)
    axes = figure.subplots()
    marker = "o" if len(layers) <= _MARKED_LAYERS else ""
    places = np.arange(len(layers))
    series = (
        ("over naive reading", [layer.gain_over_naive for layer in layers], "other"),
        ("over the original order", [layer.gain for layer in layers], "stored"),
    )
    for label, gains, role in series:
        axes.plot(places, gains, marker=marker, color=LIGHT[role], label=label)
    axes.axhline(1, color=LIGHT["ink"], linewidth=0.8)
    axes.set_ylim(0, 1.15 * max(1.0, *(max(gains) for _, gains, _ in series)))
    axes.set_ylabel("gain")
    _name_layers(axes, [layer.name for layer in layers])
    _legend(axes, columns=2)
    return figure


def gain_by_dataset(measured: Measurements) -> Figure:
    """Gain of the stored order on each dataset, and in total, with its 95 % interval."""
    row = measured.stored
    gains: list[tuple[str, Ratio]] = [
        (_short(part.name), gain) for part, gain in zip(row.by_source, row.gains_by_source, strict=True)
    ]
    if len(gains) > 1:
        gains.append(("all", row.gain))
    figure = new_figure(70 + 34 * len(gains))
    axes = figure.subplots()
    places = np.arange(len(gains))
    values = np.array([gain.value for _, gain in gains])
    ends = np.abs(np.array([[gain.low, gain.high] for _, gain in gains]).T - values)
    axes.barh(places, values, height=0.55, color=LIGHT["stored"], alpha=0.55)
    axes.errorbar(values, places, xerr=ends, fmt="none", ecolor=LIGHT["ink"], elinewidth=1.4, capsize=3)
    for place, (_, gain) in zip(places, gains, strict=True):
        axes.annotate(f"{gain.value:.2f}", (gain.high, float(place)), (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=LIGHT["ink"], linewidth=0.8)
    axes.set_xlim(0, 1.18 * max(1.0, max(gain.high for _, gain in gains)))
    axes.set_yticks(places, [name for name, _ in gains])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("gain over the original order")
    return figure


def active_by_layer(measured: Measurements) -> Figure:
    """Share of neurons that fire at a token, layer by layer."""
    figure = new_figure(210)
    axes = figure.subplots()
    shares = [layer.active_ratio for layer in measured.layers]
    axes.bar(np.arange(len(shares)), shares, width=0.7, color=LIGHT["stored"], alpha=0.55)
    axes.set_ylim(0, 1.1 * max(shares) or 1.0)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylabel("neurons that fire")
    _name_layers(axes, [layer.name for layer in measured.layers])
    return figure


def _show_raster(axes: Axes, pictures: BlockPictures, *, stored: bool) -> None:
    shares = pictures.stored if stored else pictures.original
    most = float(max(pictures.original.max(initial=0), pictures.stored.max(initial=0)))
    _show(axes, np.sqrt(shares / most) if most else shares, "stored" if stored else "original", pictures.neurons)
    axes.set_ylim(shares.shape[0], 0)
    axes.set_xlabel("slot")
    axes.set_ylabel("token")


def _show(axes: Axes, strength: Picture, role: str, slots: int) -> None:
    """Cells in one colour, as opaque as they are strong (0 to 1): right on light and on dark pages."""
    axes.grid(visible=False)
    cells = np.zeros((*strength.shape, 4), dtype=np.uint8)
    cells[..., :3] = [int(LIGHT[role][k : k + 2], 16) for k in (1, 3, 5)]
    cells[..., 3] = np.rint(255 * strength)
    axes.imshow(cells, extent=(0, slots, strength.shape[0], 0), aspect="auto", interpolation="none")
    axes.set_xlim(0, slots)
    if strength.shape[0] == strength.shape[1]:
        axes.images[0].set_extent((0, slots, slots, 0))


def _line_styles(count: int) -> list[dict[str, Any]]:
    """Of original, frequency and stored order."""
    styles: list[dict[str, Any]] = [
        {"color": LIGHT["original"]},
        {"color": LIGHT["other"], "linestyle": (0, (4, 1.5))},
        {"color": LIGHT["stored"]},
    ]
    return styles[:count]


def _percent(value: float, _position: object) -> str:
    return f"{100 * value:.3g}%"


def _short(name: str) -> str:
    """A name that fits beside its figure."""
    return {ORIGINAL: "original order", FREQUENCY: "by frequency"}.get(name, shorten(printable(name), _LONGEST_NAME))


def _legend(axes: Axes, columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=columns, loc="best")


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Numbers of layers where they say enough, else their names; only as many as fit."""
    numbers = [re.fullmatch(r"layers\.(\d+)(?:\.experts)?", name) for name in names]
    plain = all(numbers)
    labels = [found[1] if found else _short(name) for found, name in zip(numbers, names, strict=True)]
    step = -(-len(names) // (16 if plain else 8))
    places: npt.NDArray[np.int64] = np.arange(0, len(names), step)
    axes.set_xticks(places, [labels[k] for k in places])
    if not plain:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("layer" if plain else "")


# Every figure of a report by name, in the order of the page.
_FIGURES: Mapping[str, Callable[[Measurements], Figure]] = {
    "fires-original": lambda measured: fires(measured.pictures, stored=False),
    "fires-stored": lambda measured: fires(measured.pictures, stored=True),
    "together-original": lambda measured: together(measured.pictures, stored=False),
    "together-stored": lambda measured: together(measured.pictures, stored=True),
    "dram": dram,
    "run-lengths": run_lengths,
    "gain-by-layer": gain_by_layer,
    "gain-by-dataset": gain_by_dataset,
    "active-by-layer": active_by_layer,
}
FIGURE_NAMES = tuple(_FIGURES)


def draw_all(measured: Measurements, *, png: bool = False) -> dict[str, Drawn]:
    """All figures of a report by name, in the order of the page; as PNG too if asked."""
    with drawing_style():
        return {name: render(name, draw(measured), png=png) for name, draw in _FIGURES.items()}
