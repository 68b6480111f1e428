"""A contact sheet: a few images of a cohort as pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from medim.data.index.index import Index, Record
from medim.data.preprocessing.quality import Figures, measure
from medim.data.readers import ReadError
from medim.reports.page import Sheet, Tile, many
from medim.types import Array, Volume

COUNT = 24
CELL = {2: 224, 3: 144}  # pixels a side of a picture; a volume has three in a row
QUALITY = 85  # of the JPEG: 24 tiles stay below half a megabyte


def contact_sheet(index: Index, note: str) -> tuple[Sheet, dict[str, Figures]]:
    """Pictures of images that stand for a cohort.

    Args:
        index: the cohort.
        note: what is said above them.

    Returns:
        The sheet, and image key to the figures of those that could be read.
    """
    shown = chosen(index.records)
    tiles, measured = [], {}
    for place, record in enumerate(shown, start=1):
        alt = f"Image {place} of {len(shown)}, {_grid(record)}"
        try:
            volume = index.open(record)
            source, figures = picture(volume), measure(volume)
        except Exception as error:  # a decoder may raise anything; one bad file must not end the page
            reason = error.reason if isinstance(error, ReadError) else "unreadable"
            tiles.append(Tile(f"{record.subject}: {reason}", f"{alt}: cannot be read ({reason})"))
            continue
        views = "middle slice, axial, coronal and sagittal" if volume.spatial_dims == 3 else "the whole picture"
        tiles.append(Tile(record.subject, f"{alt}: {views}", source))
        measured[record.image] = figures
    unread = len(shown) - len(measured)
    told = f"{many(len(shown), 'image')}, evenly spread over the subjects in the order of the index. {note}"
    if any(len(record.shape) == 3 for record in shown):
        told += " The patient's right is on the left; in a sagittal slice the front is on the left."
    if unread:
        told += f" {many(unread, 'image')} could not be read."
    return Sheet("Contact sheet", told, tiles), measured


def chosen(records: Sequence[Record], count: int = COUNT) -> list[Record]:
    """Records evenly spread over subjects, and in their own order: the first image of each, then their second ones."""
    of: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of[record.subject].append(record)
    people = list(of.values())
    if len(people) >= count:
        return [people[place * len(people) // count][0] for place in range(count)]
    turns = [(turn, place) for place, images in enumerate(people) for turn in range(len(images))]
    picked = {people[place][turn].image for turn, place in sorted(turns)[:count]}
    return [record for record in records if record.image in picked]


def picture(volume: Volume) -> str:
    """A JPEG as data URI: the 1st to the 99th percentile in grey, proportions in mm.

    Args:
        volume: (C, ...) as read: channels are averaged; of 3D the middle slices, axial, coronal and sagittal, seen from
            the feet, the front and the left.
    """
    grey = windowed(volume.array.mean(axis=0))
    cell, extent = CELL[grey.ndim], np.multiply(grey.shape, volume.spacing)
    scale = cell / extent.max()
    if grey.ndim == 2:
        canvas = scaled(grey, extent * scale)
    else:
        canvas = Image.new("L", (3 * cell, cell))
        for place, (across, rows, columns) in enumerate(((2, 1, 0), (1, 2, 0), (0, 2, 1))):
            plane = grey.take(grey.shape[across] // 2, across)  # its axes run to the right, the front or the top
            view = scaled(plane.T[::-1, ::-1], extent[[rows, columns]] * scale)
            canvas.paste(view, (place * cell + (cell - view.width) // 2, (cell - view.height) // 2))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def windowed(array: Array) -> Array:
    """Intensities from the 1st to the 99th percentile as grey, uint8."""
    low, high = np.percentile(array, [1, 99])
    if low == high:
        low, high = array.min(), array.max()
    shares = np.clip((array - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    return np.asarray(255 * shares, np.uint8)


def scaled(grey: Array, size: Array) -> Image.Image:
    """A picture of grey values (rows, columns) at a size in pixels."""
    height, width = (max(1, round(float(n))) for n in size)
    return Image.fromarray(np.ascontiguousarray(grey)).resize((width, height), Image.Resampling.BILINEAR)


def _grid(record: Record) -> str:
    size = " × ".join(map(str, record.shape))
    return f"{record.modality}, {size} voxels of {' × '.join(f'{v:.3g}' for v in record.spacing)} mm"
