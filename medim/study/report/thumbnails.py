"""The worst cases of a study as pictures, drawn while its images are at hand and kept in `worst.json`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medim.data.index.index import Index, Record
from medim.evaluation.evaluate import open_network
from medim.files import write_json
from medim.inference.network import Network
from medim.reports.contact_sheet import scaled, windowed
from medim.study.cell import Bench
from medim.study.design import SCRATCH, Arm, Cell
from medim.study.report.view import Opened
from medim.study.results import Run
from medim.study.results_table import TRUTH
from medim.types import Array, Volume

WORST = "worst.json"
COUNT = 6
SIDE = 320  # pixels of a picture's longer side
TRUE, PREDICTED = (64, 196, 255), (255, 150, 40)  # of the contours; the second is dashed
DASH = 4  # pixels
CONTOURS = "solid blue: the truth; dashed orange: the prediction"


def write_worst(bench: Bench, study: Opened) -> None:
    """Write `worst.json`: the cases with the lowest metric of the best arm's model that was kept, with pictures.

    Args:
        bench: what the cells share.
        study: the study, its results written.
    """
    shown = _shown(bench, study)
    content: dict[str, Any] = {"schema_version": 1, "arm": None, "budget": None, "tiles": []}
    if shown is not None:
        content |= {"arm": shown.arm.name, "budget": shown.budget.name if shown.budget else None}
        content["tiles"] = _tiles(bench, study, shown)
    write_json(bench.out / WORST, content)


def case_scores(study: Opened, run: Run) -> Array:
    """(N,) Dice of each case, or the probability that it gives to the true class."""
    assert study.results is not None
    columns = study.results.values[run]
    if TRUTH not in columns:
        return columns["dice"]
    probabilities, labels = study.results.probabilities(run)
    return np.asarray(probabilities[np.arange(len(labels)), labels])


def overlay(volume: Volume, truth: Array | None = None, prediction: Array | None = None) -> str:
    """A JPEG as data URI: the slice with the largest truth, contours on it.

    Args:
        volume: (C, ...) as read: channels are averaged; of 3D an axial slice, seen from the feet.
        truth: (...) labels; None draws none.
        prediction: likewise.
    """
    grey, spacing = windowed(volume.array.mean(axis=0)), np.array(volume.spacing)
    planes = [grey, truth, prediction]
    if grey.ndim == 3:
        place = slice_of(grey if truth is None else truth)
        planes = [None if plane is None else plane[:, :, place].T[::-1, ::-1] for plane in planes]
        spacing = spacing[[1, 0]]
    assert planes[0] is not None
    extent = np.multiply(planes[0].shape, spacing)
    size = extent * SIDE / extent.max()
    picture = np.array(scaled(planes[0], size).convert("RGB"))
    rows, columns = np.indices(picture.shape[:2])
    for labels, colour, dashed in zip(planes[1:], (TRUE, PREDICTED), (False, True), strict=True):
        if labels is not None:
            edge = _edge(_resized(labels, picture.shape[:2]))
            picture[edge & ((rows + columns) // DASH % 2 == 0) if dashed else edge] = colour
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def slice_of(labels: Array) -> int:
    """The axial slice that holds most of a label map (X, Y, Z); the middle one of an empty map."""
    areas = (labels > 0).sum(axis=(0, 1))
    return int(areas.argmax()) if areas.any() and areas.max() > areas.min() else labels.shape[2] // 2


def _shown(bench: Bench, study: Opened) -> Cell | None:
    """The first cell, at the largest budget with a kept model, of the best-supported arm that has one."""
    ranked = {row["arm"]: None for row in sorted(study.rows, key=lambda row: row is not study.best)}
    arms: Mapping[str, Arm] = {arm.name: arm for arm in bench.design.arms if not bench.design.probed(arm)}
    for name in (*ranked, SCRATCH):
        for budget in reversed(bench.design.budgets):
            cell = Cell(arms[name], 0, budget) if name in arms else None
            runs = study.results.values if study.results else {}
            if cell and Run(name, budget.name, 0, 0) in runs and (bench.out / cell.folder / "model").is_dir():
                return cell
    return None


def _tiles(bench: Bench, study: Opened, cell: Cell) -> list[dict[str, str | None]]:
    assert study.results is not None
    assert cell.budget is not None
    run = Run(cell.arm.name, cell.budget.name, cell.pretrain_seed, cell.subset_seed)
    scores, cases = case_scores(study, run), study.results.cases
    records = {record.image: record for record in bench.cohort.index.records}
    order = sorted(range(len(cases)), key=lambda place: (scores[place], cases[place]))[:COUNT]
    network = _network(bench.out / cell.folder) if bench.design.task == "segmentation" else None
    tiles: list[dict[str, str | None]] = []
    for rank, place in enumerate(order, start=1):
        record = records[cases[place]]
        words = _words(study, run, place)
        tile = {"caption": f"{record.subject}, {record.image}: {words}", "alt": f"Worst case {rank}: {words}"}
        try:
            source, where = _picture(bench.cohort.index, record, network)
        except Exception as error:  # a decoder may raise anything; one bad file must not end the page
            tiles.append({**tile, "source": None, "alt": f"{tile['alt']}; no picture ({type(error).__name__})"})
            continue
        tiles.append({**tile, "source": source, "alt": f"{tile['alt']}; {where}"})
    return tiles


def _picture(index: Index, record: Record, network: Network | None) -> tuple[str, str]:
    volume = index.open(record)
    if network is None:
        return overlay(volume), "the middle slice" if volume.spatial_dims == 3 else "the whole picture"
    truth = index.open_mask(record).array[0]
    where = f"axial slice {slice_of(truth) + 1} of {truth.shape[2]}" if truth.ndim == 3 else "the whole picture"
    return overlay(volume, truth, network(volume)), f"{where}; {CONTOURS}"


def _network(folder: Path) -> Network:
    return open_network(folder)[0]


def _words(study: Opened, run: Run, place: int) -> str:
    results = study.results
    assert results is not None
    columns, score = results.values[run], case_scores(study, run)[place]
    if TRUTH not in columns:
        return (
            f"Dice {score:.3f} (" + ", ".join(f"{n} {columns[f'dice_{n}'][place]:.3f}" for n in results.classes) + ")"
        )
    probabilities, labels = results.probabilities(run)
    called = results.classes[int(probabilities[place].argmax())]
    return f"truth {results.classes[labels[place]]}, its probability {score:.3f}, called {called}"


def _resized(labels: Array, shape: tuple[int, ...]) -> Array:
    rows, columns = (np.arange(new) * old // new for new, old in zip(shape, labels.shape, strict=True))
    return labels[np.ix_(rows, columns)]


def _edge(labels: Array) -> Array:
    """Where a label differs from that above, below, left or right, two pixels wide."""
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(labels.astype(np.int16), axis=axis) != 0
        edge |= np.insert(differs, 0, False, axis=axis) | np.insert(differs, differs.shape[axis], False, axis=axis)
    return edge
