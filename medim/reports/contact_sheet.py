"""Contact sheet: thumbnails of a few images of a cohort, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from medim.data.index.index import ImageRecord, Index
from medim.data.preprocessing.quality import QualityMetrics, measure_quality
from medim.data.readers import ReadError
from medim.pictures.slices import PLANES, scale_picture, window_intensities
from medim.reports.page import ContactSheet, Tile, pluralise
from medim.types import Volume

N_TILES = 24
CELL_PIXELS = {2: 224, 3: 144}  # pixels per side of a picture; a volume has three pictures in a row
JPEG_QUALITY = 85  # 24 tiles stay below half a megabyte


def build_contact_sheet(index: Index, note: str) -> tuple[ContactSheet, dict[str, QualityMetrics]]:
    """Build a sheet of sample images of a cohort.

    Args:
        index: index of the cohort.
        note: note above the images.

    Returns:
        The sheet, and the quality metrics of the images that could be read, by image key.
    """
    sheet_records = sample_records(index.records)
    tiles, quality_by_image = [], {}
    for number, record in enumerate(sheet_records, start=1):
        alt = f"Image {number} of {len(sheet_records)}, {_format_grid(record)}"
        try:
            volume = index.open(record)
            source, quality = encode_picture(volume), measure_quality(volume)
        except Exception as error:  # a decoder may raise any exception; one bad file must not stop the report
            reason = error.reason if isinstance(error, ReadError) else "unreadable"
            tiles.append(Tile(f"{record.subject}: {reason}", f"{alt}: cannot be read ({reason})"))
            continue
        views = "middle slice, axial, coronal and sagittal" if volume.spatial_dims == 3 else "the whole picture"
        tiles.append(Tile(record.subject, f"{alt}: {views}", source))
        quality_by_image[record.image] = quality
    n_unread = len(sheet_records) - len(quality_by_image)
    note_text = f"{pluralise(len(sheet_records), 'image')}, evenly sampled over the subjects in index order. {note}"
    if any(len(record.shape) == 3 for record in sheet_records):
        note_text += " The patient's right is on the left; in a sagittal slice the front is on the left."
    if n_unread:
        note_text += f" {pluralise(n_unread, 'image')} could not be read."
    return ContactSheet("Contact sheet", note_text, tiles), quality_by_image


def sample_records(records: Sequence[ImageRecord], count: int = N_TILES) -> list[ImageRecord]:
    """Sample records evenly over subjects, in index order: the first image of each subject, then the second images."""
    records_by_subject: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        records_by_subject[record.subject].append(record)
    subject_records = list(records_by_subject.values())
    if len(subject_records) >= count:
        return [subject_records[place * len(subject_records) // count][0] for place in range(count)]
    turns = [(turn, place) for place, images in enumerate(subject_records) for turn in range(len(images))]
    image_keys = {subject_records[place][turn].image for turn, place in sorted(turns)[:count]}
    return [record for record in records if record.image in image_keys]


def encode_picture(volume: Volume) -> str:
    """Encode a JPEG as data URI: grey values from the 1st to the 99th percentile, proportions in mm.

    Args:
        volume: (C, ...) as read; channels are averaged. A 3D volume is shown by its middle slices: axial (seen from the
            feet), coronal (from the front) and sagittal (from the left).
    """
    grey = window_intensities(volume.array.mean(axis=0))
    cell, extent = CELL_PIXELS[grey.ndim], np.multiply(grey.shape, volume.spacing)
    scale = cell / extent.max()
    if grey.ndim == 2:
        canvas = scale_picture(grey, extent * scale)
    else:
        canvas = Image.new("L", (3 * cell, cell))
        for panel, (axis, rows, columns) in enumerate(PLANES):
            plane = grey.take(grey.shape[axis] // 2, axis)  # its axes point to the right, the front or the top
            view = scale_picture(plane.T[::-1, ::-1], extent[[rows, columns]] * scale)
            canvas.paste(view, (panel * cell + (cell - view.width) // 2, (cell - view.height) // 2))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _format_grid(record: ImageRecord) -> str:
    size = " × ".join(map(str, record.shape))
    return f"{record.modality}, {size} voxels of {' × '.join(f'{v:.3g}' for v in record.spacing)} mm"
