"""Pictures of the worst, typical and best cases of an evaluation, for its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.data.index.index import ImageRecord, Index
from medim.evaluation.cases import name_source_classes
from medim.files import write_json
from medim.inference.network import Predictor
from medim.pictures.case import draw_case
from medim.tasks.task import CaseRow, LabelledCase, Task
from medim.types import Array

PICTURES_FILE = "pictures.json"  # in the folder of an evaluation; it contains patient images
SCHEMA_VERSION = 1
N_WORST_PICTURES = 3
SLICE_PIXELS = {2: 320, 3: 220}  # longest side of a slice


class CasePicture(TypedDict):
    """Picture of a case.

    Attributes:
        caption: caption of the picture.
        alt: description for readers who cannot see it; if the image cannot be read, with the reason.
        source: JPEG as data URI; None if the image cannot be read.
    """

    caption: str
    alt: str
    source: str | None


def write_case_pictures(
    path: Path, index: Index, records: Sequence[ImageRecord], rows: Sequence[CaseRow], network: Predictor
) -> None:
    """Write pictures of the worst, typical and best cases, with the contours of label and prediction.

    A task without a score per case has no pictures, and no file is written.

    Args:
        path: path of the file.
        index: index of the images.
        records: evaluated images.
        rows: rows of `score_cases`.
        network: the evaluated network.
    """
    columns, images = build_columns(network.task, [row for row in rows if not row.get("rejected")])
    if not network.task.in_studies or not images:
        return
    records_by_image = {record.image: record for record in records}
    scores = network.task.study_case_scores(columns, network.classes)
    pictures = [
        draw_case_picture(
            index,
            records_by_image[images[place]],
            network if network.task.dense else None,
            title=title,
            description=network.task.describe_study_case(columns, network.classes, place),
        )
        for title, place in select_cases(scores, images)
    ]
    write_json(path, {"schema_version": SCHEMA_VERSION, "pictures": pictures})


def build_columns(task: Task, rows: Sequence[CaseRow]) -> tuple[Mapping[str, Array], list[str]]:
    """Build the columns (N,) of `Task.to_study_rows` from the rows of N cases, and list their images."""
    if not task.in_studies:
        return {}, []
    rows_by_image: dict[str, list[CaseRow]] = {}
    for row in rows:
        rows_by_image.setdefault(row["image"], []).append(row)
    cases = [dict(task.to_study_rows(case_rows)) for case_rows in rows_by_image.values()]
    names = dict.fromkeys(name for case in cases for name in case)
    return {name: np.array([case.get(name) for case in cases], np.float64) for name in names}, list(rows_by_image)


def select_cases(scores: Array, images: Sequence[str]) -> list[tuple[str, int]]:
    """Select the worst three cases, two typical ones around the median, and the best one.

    Args:
        scores: (N,) score of each case; cases without a score (NaN) are left out.
        images: key of the image of each case, which decides between equal scores.

    Returns:
        Title and place of each selected case, by increasing score.

    Examples:
        >>> select_cases(np.array([0.9, 0.1, np.nan, 0.5]), ["a", "b", "c", "d"])
        [('Worst case 1', 1), ('Worst case 2', 3), ('Worst case 3', 0)]
    """
    order = sorted(np.flatnonzero(np.isfinite(scores)).tolist(), key=lambda place: (scores[place], images[place]))
    count = len(order)
    titles = {rank: f"Worst case {rank + 1}" for rank in range(min(N_WORST_PICTURES, count))}
    for rank, title in (((count - 1) // 2, "Typical case"), (count // 2, "Typical case"), (count - 1, "Best case")):
        if rank >= N_WORST_PICTURES:
            titles.setdefault(rank, title)
    return [(title, order[rank]) for rank, title in sorted(titles.items())]


def draw_case_picture(
    index: Index, record: ImageRecord, network: Predictor | None, *, title: str, description: str
) -> CasePicture:
    """Draw an image; with a segmentation network, the contours of its label map and of the prediction.

    Args:
        index: index of the image.
        record: row of the image.
        network: segmentation network; None for other tasks.
        title: title of the case.
        description: result in a few words.
    """
    caption, alt = f"{title}: {record.subject}, {record.image}: {description}", f"{title}: {description}"
    try:
        volume = index.open(record)
        label_maps: dict[str, Array | None] = {"": None}
        if network is not None:
            mask = index.open_mask(record)
            classes, source_classes = network.classes, name_source_classes(network, index)
            case = LabelledCase(record=record, volume=volume, mask=mask, classes=classes, source_classes=source_classes)
            label_maps = {"label": network.task.read_truth(case), "prediction": network(volume)}
        picture = draw_case(
            volume, label_maps, network.classes if network else (), side=SLICE_PIXELS[len(record.shape)]
        )
    except Exception as error:  # a decoder may raise any exception; one bad file must not stop the report
        return {"caption": caption, "alt": f"{alt}; cannot be read ({type(error).__name__})", "source": None}
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, subsampling=0)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    views = "axial, coronal and sagittal slice" if volume.spatial_dims == 3 else "the whole picture"
    contours = ", contours of label (above) and prediction (below)" if network is not None else ""
    return {"caption": caption, "alt": f"{alt}; {views}{contours}", "source": source}
