"""Picture of an image with the contours of label maps and a legend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medim.pictures.slices import (
    PLANES,
    find_edges,
    find_largest_slice,
    resize_labels,
    scale_picture,
    window_intensities,
)
from medim.types import Array, Volume

COLOURS = (  # of the classes: Okabe and Ito 2008, which readers with colour blindness can distinguish
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
TEXT_PIXELS, MARGIN = 14, 6  # height of text, and space around it
MAX_LEGEND = 12  # classes in a legend


def draw_case(
    volume: Volume, label_maps: Mapping[str, Array | None], classes: Sequence[str] = (), *, side: int, text: str = ""
) -> Image.Image:
    """Draw an image with the contours of label maps, one row per label map.

    A 3D image is shown by an axial (seen from the feet), a coronal (from the front) and a sagittal slice (from the
    left), each through the largest area of the first label map that is not empty.

    Args:
        volume: (C, ...) as read; channels are averaged.
        label_maps: title of the row and labels (*volume.shape), 0 for background; None draws no contour.
        classes: names of the labels 1, 2, ... for the legend.
        side: longest side of a slice, in pixels.
        text: line above the picture.

    Returns:
        RGB picture.
    """
    grey, spacing = window_intensities(volume.array.mean(axis=0)), np.asarray(volume.spacing)
    reference = next((labels for labels in label_maps.values() if labels is not None and labels.any()), None)
    scale = side / np.multiply(grey.shape, spacing).max()
    places: list[tuple[tuple[int, int, int] | None, int]] = [(None, 0)]
    if grey.ndim == 3:
        places = [(plane, find_largest_slice(grey.shape, reference, plane[0])) for plane in PLANES]
    rows = [
        (title, [_draw_slice(grey, labels, spacing * scale, plane, place) for plane, place in places])
        for title, labels in label_maps.items()
    ]
    return _compose(rows, _list_legend(label_maps.values(), classes), text)


def _draw_slice(
    grey: Array, labels: Array | None, scale: Array, plane: tuple[int, int, int] | None = None, place: int = 0
) -> Image.Image:
    """Draw a slice with contours; `scale` is in pixels per voxel and axis."""
    if plane is not None:  # the axes of a volume point to the patient's right, front and top
        axis, *in_plane = plane
        grey, scale = _orient_slice(grey.take(place, axis)), scale[in_plane]
        labels = None if labels is None else _orient_slice(labels.take(place, axis))
    picture = np.array(scale_picture(grey, np.multiply(grey.shape, scale)).convert("RGB"))
    if labels is not None:
        resized = resize_labels(labels, picture.shape[:2])
        is_edge = find_edges(resized)
        for label in np.unique(resized[resized > 0]):
            picture[is_edge & (resized == label)] = _get_colour(int(label))
    return Image.fromarray(picture)


def _orient_slice(plane: Array) -> Array:
    return plane.T[::-1, ::-1]


def _get_colour(label: int) -> tuple[int, int, int]:
    return COLOURS[(label - 1) % len(COLOURS)]


def _list_legend(label_maps: Iterable[Array | None], classes: Sequence[str]) -> list[tuple[str, int]]:
    """List name and label of the classes that a label map contains, at most `MAX_LEGEND`."""
    labels = sorted({int(n) for labels in label_maps if labels is not None for n in np.unique(labels) if n > 0})
    names = [(classes[label - 1] if label <= len(classes) else str(label), label) for label in labels]
    return names[:MAX_LEGEND]


def _compose(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], legend: Sequence[tuple[str, int]], text: str
) -> Image.Image:
    """Put rows of slices below each other, with the title of each row, the text above and the legend below."""
    font, line = ImageFont.load_default(TEXT_PIXELS), TEXT_PIXELS + MARGIN
    header = line if text else 0
    row_heights = [(line if title else 0) + max(tile.height for tile in tiles) + MARGIN for title, tiles in rows]
    widths = [sum(tile.width + MARGIN for tile in tiles) for _, tiles in rows]
    text_widths = [round(font.getlength(part)) for part in [text, *(title for title, _ in rows)]]
    legend_widths = [round(font.getlength(name)) + line + MARGIN for name, _ in legend]
    width = max(*widths, *text_widths, *legend_widths, 1) + MARGIN
    legend_rows = _break_lines(legend_widths, width - MARGIN)
    height = header + sum(row_heights) + line * len(legend_rows) + MARGIN
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN // 2), text, font=font, fill="white")
    top = header + MARGIN
    for (title, tiles), row_height in zip(rows, row_heights, strict=True):
        draw.text((MARGIN, top), title, font=font, fill="white")
        left = MARGIN
        for tile in tiles:
            canvas.paste(tile, (left, top + (line if title else 0)))
            left += tile.width + MARGIN
        top += row_height
    for places in legend_rows:
        left = MARGIN
        for place in places:
            name, label = legend[place]
            draw.rectangle((left, top, left + TEXT_PIXELS, top + TEXT_PIXELS), fill=_get_colour(label))
            draw.text((left + line, top - 1), name, font=font, fill="white")
            left += legend_widths[place]
        top += line
    return canvas


def _break_lines(widths: Sequence[int], width: int) -> list[list[int]]:
    """Distribute items of given widths over lines; return the places of the items in each line."""
    lines: list[list[int]] = []
    used = width
    for place, item in enumerate(widths):
        if used + item > width:
            lines.append([])
            used = 0
        lines[-1].append(place)
        used += item
    return lines
