"""Draws with matplotlib so that the same figure always has the same bytes, in colours that a page can replace."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuralink_cli.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Every colour of a figure, by role, on a light and on a dark page.
LIGHT = {"ink": "#1f2428", "faint": "#d0d4d9", "stored": "#0b6bcb", "original": "#b4540a", "other": "#6b7785"}
DARK = {"ink": "#e6e9ec", "faint": "#3c444d", "stored": "#58a6ff", "original": "#f0883e", "other": "#9aa5b1"}
# A figure is as wide as a phone, in points: a page scales it up, and its text stays readable when it is not.
WIDTH = 360.0
_POINTS = 72
_DOTS_PER_INCH = 200

_STYLE = {
    "axes.edgecolor": LIGHT["faint"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": LIGHT["ink"],
    "axes.labelsize": 10,
    "axes.prop_cycle": f"cycler('color', ['{LIGHT['ink']}'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": LIGHT["faint"],
    "grid.linewidth": 0.6,
    "image.composite_image": False,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.labelcolor": LIGHT["ink"],
    "lines.color": LIGHT["ink"],
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    # Names from files are not formulas.
    "text.parse_math": False,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["faint"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.color": LIGHT["faint"],
    "ytick.labelcolor": LIGHT["ink"],
}


@dataclass(frozen=True)
class Drawn:
    """A figure as files: `svg` for a page or a paper, `png` on white (None if it was not asked for)."""

    name: str
    svg: str
    png: bytes | None = None


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        MissingDependencyError: matplotlib cannot be imported.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"figures need the Python package matplotlib ({error})", fix="pip install 'neuralink-cli[plot]'"
        ) from None


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Within the block figures look the same whatever the user's own settings of matplotlib are."""
    import matplotlib
    import matplotlib.style

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Of characters that the font does not have: an SVG leaves them to the reader's fonts.
        warnings.simplefilter("ignore")
        matplotlib.style.use("default")
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure; sizes in points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _POINTS, height / _POINTS))


def render(name: str, figure: Figure, *, png: bool = False) -> Drawn:
    """The bytes of a figure; within `drawing_style`.

    Args:
        name: Unique among the figures of a page: it keeps the ids in their SVGs apart.
        png: Whether to draw it as PNG too.
    """
    import matplotlib

    svg = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata=nothing, transparent=True)
    if not png:
        return Drawn(name, svg.getvalue())
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None}, facecolor="white")
    return Drawn(name, svg.getvalue(), pixels.getvalue())


def inline_svg(drawn: Drawn, title: str) -> str:
    """The figure as an element of a page: colours are the page's variables, and ids are its own.

    Args:
        title: What the figure shows, for those who do not see it; as HTML, thus escaped.
    """
    svg = drawn.svg[drawn.svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for role, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'\bid="', f'id="{drawn.name}-', svg)
    svg = svg.replace('href="#', f'href="#{drawn.name}-').replace("url(#", f"url(#{drawn.name}-")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{title}">'
    return opening + svg[svg.index(">") + 1 :]
