"""Elements of the diagrams of docs/concepts/ as SVG: boxes, grids of cells, arrows and lines of text."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

FILLS = {
    "input": ("#fff8e1", "#b28704"),
    "net": ("#e3f2fd", "#1565c0"),
    "feature": ("#bbdefb", "#1565c0"),
    "yes": ("#a5d6a7", "#2e7d32"),  # positive or prediction target
    "no": ("#f8bbd0", "#ad1457"),  # negative
    "hidden": ("#90a4ae", "#546e7a"),
    "off": ("#ffffff", "#b0bec5"),  # not used
    "loss": ("#f3e5f5", "#6a1b9a"),
}
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
role="img" aria-labelledby="title desc" font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" text-anchor="middle">
<title id="title">{title}</title>
<desc id="desc">{words}</desc>
<defs>
<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0L10 5L0 10z" fill="#37474f"/></marker>
<style>text {{ font-size: 12px; fill: #37474f }} .head {{ font-weight: bold; fill: #0d2c4f }} \
.flow {{ fill: none; stroke: #37474f; stroke-width: 1.5; marker-end: url(#tip) }}</style>
</defs>
<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>"""


class Sketch:
    """Diagram with lengths in pixels; y points downwards.

    Args:
        width: width of the drawing.
        height: height of the drawing.
        title: title of the drawing.
        words: description for screen readers.
    """

    def __init__(self, width: int, height: int, title: str, words: str) -> None:
        self._parts = [HEAD.format(width=width, height=height, title=escape(title), words=escape(words))]

    def text(self, x: float, y: float, words: str, *, head: bool = False, left: bool = False) -> None:
        """Add lines of text, centred on (x, y) or left-aligned at x."""
        lines = words.split("\n")
        for number, line in enumerate(lines):
            line_y = y + 4 + 15 * (number - (len(lines) - 1) / 2)
            kind = ' class="head"' * head + ' text-anchor="start"' * left
            self._parts.append(f'<text{kind} x="{x:g}" y="{line_y:g}">{escape(line)}</text>')

    def box(self, x: float, y: float, width: float, height: float, words: str, kind: str) -> None:
        """Add a rounded box around text; (x, y) is its upper left corner."""
        fill, line = FILLS[kind]
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
        self._parts.append(f'<rect {shape} fill="{fill}" stroke="{line}" stroke-width="1.5"/>')
        self.text(x + width / 2, y + height / 2, words)

    def grid(
        self, x: float, y: float, size: tuple[int, int], cell: float, kind: str | Callable[[int, int], str]
    ) -> None:
        """Add a grid of square cells of one kind, or of `kind(row, column)`; (x, y) is the upper left corner."""
        for row in range(size[0]):
            for column in range(size[1]):
                fill, line = FILLS[kind if isinstance(kind, str) else kind(row, column)]
                corner = f'x="{x + column * cell:g}" y="{y + row * cell:g}" width="{cell:g}" height="{cell:g}"'
                self._parts.append(f'<rect {corner} fill="{fill}" stroke="{line}" stroke-width="0.8"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Add an arrow along a polygonal line through the points."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self._parts.append(f'<path class="flow" d="M{path}"/>')

    def __str__(self) -> str:
        """Content of the SVG file."""
        return "\n".join([*self._parts, "</svg>", ""])
