"""Render a figure as inline SVG with the colours and fonts of the page and a text alternative."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

WIDTH = 4.6  # inches: 331 CSS pixels, about the width of a phone screen
LARGE_WIDTH = 6.4
_COLOURS = {  # placeholder colour in matplotlib -> colour variable of the page (light or dark)
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--one)",
    "#040404": "var(--two)",
    "#050505": "var(--line)",
    "#060606": "var(--three)",
    "#070707": "var(--four)",
    "#080808": "var(--five)",
}
INK, SOFT, ONE, TWO, LINE, THREE, FOUR, FIVE = _COLOURS
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medim",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        svg: the drawing.
        alt: description with the numbers of the figure.
        caption: title of the figure.
        large: whether the figure has a row of its own.
    """

    svg: Markup
    alt: str
    caption: str
    large: bool = False

    def placed(self, place: str) -> Markup:
        """Add a title and a description to the drawing, and prefix its ids to make them unique in the page."""
        text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{place}-", str(self.svg))
        head = Markup('<svg role="img" aria-labelledby="{0}-title {0}-desc"').format(place)
        words = Markup('<title id="{0}-title">{1}</title><desc id="{0}-desc">{2}</desc>')
        attributes, body = text.removeprefix("<svg").split(">", 1)
        return Markup(head + Markup(attributes + ">") + words.format(place, self.caption, self.alt) + Markup(body))


def draw_legend(axes: Axes, ncols: int = 3) -> None:
    """Draw a legend above the axes, where it covers no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=ncols, borderaxespad=0.2, handlelength=1.6)


@contextmanager
def open_canvas(height: float, width: float = WIDTH) -> Iterator[tuple[Canvas, Axes]]:
    """Open an empty drawing of this size in inches, in the style of the page."""
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        canvas.patch.set_visible(False)
        axes = canvas.subplots()
        axes.patch.set_visible(False)
        yield canvas, axes


def render_svg(canvas: Canvas) -> Markup:
    """Render the drawing as an inline element without date, fixed size or external reference."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    view_box = re.search(r'viewBox="([^"]+)"', text)
    assert view_box is not None
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view_box[1]}">', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    for source_colour, page_colour in _COLOURS.items():
        text = text.replace(source_colour, page_colour)
    return Markup(re.sub(r"\s*\n\s*", " ", text))  # matplotlib escaped every label
