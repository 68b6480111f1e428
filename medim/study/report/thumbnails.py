"""Pictures of the worst cases of a study, rendered while its images are available and saved in `worst.json`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medim.data.index.index import ImageRecord, Index
from medim.evaluation.evaluate import open_network
from medim.files import write_json
from medim.inference.network import Predictor
from medim.pictures.slices import find_edges, resize_labels, scale_picture, window_intensities
from medim.study.cell import StudyContext
from medim.study.design import SCRATCH, Arm, Cell
from medim.study.report.view import StudyView
from medim.study.results import RunKey
from medim.tasks import find_task
from medim.types import IGNORE_INDEX, Array, Volume

WORST_CASES_FILE = "worst.json"
N_CASES = 6
PICTURE_PIXELS = 320  # longer side of a picture, in pixels
TRUTH_COLOUR, PREDICTION_COLOUR = (64, 196, 255), (255, 150, 40)  # contour colours; the second contour is dashed
DASH_PIXELS = 4  # length of a dash
CONTOUR_LEGEND = "solid blue: truth; dashed orange: prediction"


def write_worst_cases(context: StudyContext, study: StudyView) -> None:
    """Write `worst.json`: the cases with the lowest metric for the saved model of the best arm, with pictures.

    Args:
        context: context of the cells.
        study: the study, with written results.
    """
    cell = _select_cell(context, study)
    content: dict[str, Any] = {"schema_version": 1, "arm": None, "budget": None, "tiles": []}
    if cell is not None:
        content |= {"arm": cell.arm.name, "budget": cell.budget.name if cell.budget else None}
        content["tiles"] = _build_tiles(context, study, cell)
    write_json(context.out / WORST_CASES_FILE, content)


def case_scores(study: StudyView, run: RunKey) -> Array:
    """Dice of each case, or its probability of the true class: (N,)."""
    assert study.results is not None
    return study.results.task.study_case_scores(study.results.values[run], study.results.classes)


def draw_overlay(volume: Volume, truth: Array | None = None, prediction: Array | None = None) -> str:
    """Draw the slice with the largest truth mask, with contours, as a JPEG in a data URI.

    Args:
        volume: (C, ...) as read; channels are averaged. A 3D volume is shown by an axial slice, seen from the feet.
        truth: (...) labels; None draws no contour.
        prediction: (...) labels; None draws no contour.
    """
    grey, spacing = window_intensities(volume.array.mean(axis=0)), np.array(volume.spacing)
    planes = [grey, truth, prediction]
    if grey.ndim == 3:
        slice_number = largest_slice(grey if truth is None else truth)
        planes = [None if plane is None else plane[:, :, slice_number].T[::-1, ::-1] for plane in planes]
        spacing = spacing[[1, 0]]
    assert planes[0] is not None
    extent = np.multiply(planes[0].shape, spacing)
    size = extent * PICTURE_PIXELS / extent.max()
    picture = np.array(scale_picture(planes[0], size).convert("RGB"))
    rows, columns = np.indices(picture.shape[:2])
    for labels, colour, is_dashed in zip(planes[1:], (TRUTH_COLOUR, PREDICTION_COLOUR), (False, True), strict=True):
        if labels is not None:
            edge = find_edges(resize_labels(labels, picture.shape[:2]))
            picture[edge & ((rows + columns) // DASH_PIXELS % 2 == 0) if is_dashed else edge] = colour
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def largest_slice(labels: Array) -> int:
    """Index of the axial slice with the largest area of a label map (X, Y, Z); the middle slice of an empty map."""
    areas = (labels > 0).sum(axis=(0, 1))
    return int(areas.argmax()) if areas.any() and areas.max() > areas.min() else labels.shape[2] // 2


def _select_cell(context: StudyContext, study: StudyView) -> Cell | None:
    """Select the first cell with a saved model, by support of the arm, at the largest possible budget."""
    ranked = {row["arm"]: None for row in sorted(study.rows, key=lambda row: row is not study.best)}
    arms: Mapping[str, Arm] = {arm.name: arm for arm in context.design.arms if not context.design.is_probe_arm(arm)}
    for name in (*ranked, SCRATCH):
        for budget in reversed(context.design.budgets):
            cell = Cell(arms[name], 0, budget) if name in arms else None
            runs = study.results.values if study.results else {}
            if cell and RunKey(name, budget.name, 0, 0) in runs and (context.out / cell.folder / "model").is_dir():
                return cell
    return None


def _build_tiles(context: StudyContext, study: StudyView, cell: Cell) -> list[dict[str, str | None]]:
    assert study.results is not None
    assert cell.budget is not None
    run = RunKey(cell.arm.name, cell.budget.name, cell.pretrain_seed, cell.subset_seed)
    scores, cases = case_scores(study, run), study.results.cases
    records = {record.image: record for record in context.cohort.index.records}
    order = sorted(range(len(cases)), key=lambda place: (scores[place], cases[place]))[:N_CASES]
    network = _open_cell_network(context.out / cell.folder) if find_task(context.design.task).dense else None
    tiles: list[dict[str, str | None]] = []
    for rank, place in enumerate(order, start=1):
        record = records[cases[place]]
        description = _describe_case(study, run, place)
        tile = {
            "caption": f"{record.subject}, {record.image}: {description}",
            "alt": f"Worst case {rank}: {description}",
        }
        try:
            source, view_text = _draw_case(context.cohort.index, record, network)
        except Exception as error:  # a decoder may raise any exception; one bad file must not stop the report
            tiles.append({**tile, "source": None, "alt": f"{tile['alt']}; cannot be read ({type(error).__name__})"})
            continue
        tiles.append({**tile, "source": source, "alt": f"{tile['alt']}; {view_text}"})
    return tiles


def _draw_case(index: Index, record: ImageRecord, network: Predictor | None) -> tuple[str, str]:
    volume = index.open(record)
    if network is None:
        return draw_overlay(volume), "the middle slice" if volume.spatial_dims == 3 else "the whole picture"
    truth = index.open_mask(record).array[0]
    truth[truth == IGNORE_INDEX] = 0
    view_text = (
        f"axial slice {largest_slice(truth) + 1} of {truth.shape[2]}" if truth.ndim == 3 else "the whole picture"
    )
    return draw_overlay(volume, truth, network(volume)), f"{view_text}; {CONTOUR_LEGEND}"


def _open_cell_network(folder: Path) -> Predictor:
    return open_network(folder)[0]


def _describe_case(study: StudyView, run: RunKey, case_number: int) -> str:
    results = study.results
    assert results is not None
    return results.task.describe_study_case(results.values[run], results.classes, case_number)
