"""Render a figure as inline SVG with the colours and fonts of the page and a text alternative."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from medim.parsing import encode_csv

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
_FILE_COLOURS = ("#17212b", "#55626f", "#0b67a3", "#b4470f", "#dbe1e7", "#7a3e9d", "#17703f", "#8a5a00")  # on white
_SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_XLINK_NAMESPACE = "http://www.w3.org/1999/xlink"
_SAFE_CHARACTERS = " /:;=(),'!*$@?[]|"
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
        data: header and rows of the values in the figure; empty without them.
    """

    svg: Markup
    alt: str
    caption: str
    large: bool = False
    data: Sequence[Sequence[object]] = ()

    @property
    def standalone_svg(self) -> str:
        """The drawing as a file of its own: light colours, a size and the description."""
        text = str(self.svg)
        for page_colour, colour in zip(_COLOURS.values(), _FILE_COLOURS, strict=True):
            text = text.replace(page_colour, colour)
        text = text.replace("font-family:inherit", "font-family:sans-serif").replace(" href=", " xlink:href=")
        attributes, body = text.removeprefix("<svg").split(">", 1)
        width, height = attributes.split('"')[1].split()[2:]
        names = f'xmlns="{_SVG_NAMESPACE}" xmlns:xlink="{_XLINK_NAMESPACE}" width="{width}pt" height="{height}pt"'
        return f"<svg {names}{attributes}><title>{escape(self.caption)}</title><desc>{escape(self.alt)}</desc>{body}"

    def list_downloads(self, name: str) -> dict[str, tuple[str, Markup]]:
        """List the files of the figure: title to file name and data URI.

        Args:
            name: title of the section, as the first part of the file names.
        """
        stem = "-".join(re.findall(r"[\w.]+", f"{name} {self.caption}"))[:100]
        downloads = {"SVG": (f"{stem}.svg", _build_data_uri("image/svg+xml", _compact_quotes(self.standalone_svg)))}
        if self.data:
            downloads["CSV"] = (f"{stem}.csv", _build_data_uri("text/csv", _format_csv(*self.data)))
        return downloads

    def placed(self, place: str) -> Markup:
        """Add a title and a description to the drawing, and prefix its ids to make them unique in the page."""
        text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{place}-", str(self.svg))
        head = Markup('<svg role="img" aria-labelledby="{0}-title {0}-desc"').format(place)
        words = Markup('<title id="{0}-title">{1}</title><desc id="{0}-desc">{2}</desc>')
        attributes, body = text.removeprefix("<svg").split(">", 1)
        return Markup(head + Markup(attributes + ">") + words.format(place, self.caption, self.alt) + Markup(body))


def _compact_quotes(svg: str) -> str:
    """Put attributes in single quotes, which a data URI contains without an escape."""
    return re.sub(r"<[^<>']+>", lambda match: match[0].replace('"', "'"), svg)


def _build_data_uri(media_type: str, text: str) -> Markup:
    """Build a data URI that needs no escape in an attribute in double quotes."""
    return Markup(f"data:{media_type};charset=utf-8,{quote(text, safe=_SAFE_CHARACTERS)}")


def _format_csv(head: Sequence[object], *rows: Sequence[object]) -> str:
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    return encode_csv([str(name) for name in head], cells).decode()


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
    text = re.sub(r'(?<= )(d|x|y|width|height|points|transform)="[^"]*"', _round_coordinates, text)
    text = _remove_empty_parts(text)
    text = re.sub(r'(?<= style)="[^"]*"', lambda match: re.sub(r"(?<=[:;]) ", "", match[0]), text)
    return Markup(re.sub(r"\s*\n\s*", " ", re.sub(r">\s+<", "><", text)))  # matplotlib escaped every label


def _remove_empty_parts(svg: str) -> str:
    """Remove ids without a reference, groups without attributes, empty definitions and rotations by zero."""
    names = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    short_names = {name: f"i{number}" for number, name in enumerate(names)}
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{short_names[match[1]]}"' if match[1] in names else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', lambda match: match[1] + short_names[match[2]], svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*\)"|<defs>\s*</defs>', "", svg)
    open_groups: list[str] = []
    parts = []
    for part in re.split(r"(<g>|<g [^>]*>|</g>)", svg):
        is_start = part.startswith(("<g>", "<g "))
        open_groups += [part] if is_start else []
        is_bare = (is_start or part == "</g>") and open_groups[-1] == "<g>"
        if part == "</g>":
            open_groups.pop()
        parts.append("" if is_bare else part)
    return "".join(parts)


def _round_coordinates(match: re.Match[str]) -> str:
    """Round coordinates to hundredths of a point."""
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), match[0])
