"""Segmentation: one class per voxel, learnt from masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.data.preprocessing.steps import restore_grid
from medim.metrics import METRICS
from medim.metrics.bootstrap import N_RESAMPLES, MetricEstimate, mean_over_subjects, weighted_mean
from medim.metrics.metric import Statistic
from medim.metrics.segmentation import segmentation_metrics
from medim.tasks.task import (
    AgreementPlot,
    AnswerRow,
    CaseRow,
    CaseTable,
    ColumnType,
    EvaluationDetails,
    LabelledCase,
    MaskSource,
    Plot,
    StripPlot,
    Task,
    list_subjects,
)
from medim.types import Array, Volume

N_WORST = 5
SIZE_COLUMNS = {3: ("truth_ml", "predicted_ml"), 2: ("truth_mm2", "predicted_mm2")}  # by spatial dimensions


class Segmentation(Task):
    """Label maps on the grid of each image; class 0 is the background."""

    name = "segmentation"
    option = "segmentation"
    kind = "segmenter"
    title = "segmentation"
    inversion = "resample logits (order 1), then argmax"
    monai_output = "segmentation"
    dense = True
    study_column = "dice"
    case_label = "Dice"
    worst_case_text = "with the lowest Dice"
    output_text = "one label per voxel"

    @property
    def case_columns(self) -> Mapping[str, ColumnType]:
        """Metrics, volumes (None in 2D) and areas (None in 3D)."""
        return dict.fromkeys((*self.metrics, *SIZE_COLUMNS[3], *SIZE_COLUMNS[2]), "number")

    @property
    def target_remedy(self) -> str:
        """A Decathlon folder or a table."""
        return "Use a Decathlon folder (`dataset.json`), or --labels CSV with the columns image,mask."

    def class_names(self, index: Index) -> tuple[str, ...]:
        """Names of the mask values 1, 2, ..."""
        return index.classes

    def encode_targets(self, records: Sequence[ImageRecord], classes: Sequence[str]) -> Array | None:
        """None: the masks are the targets."""
        return None

    def count_targets(
        self, records: Sequence[ImageRecord], classes: Sequence[str], read_mask: MaskSource | None = None
    ) -> Array:
        """Voxels of the background and of each class."""
        assert read_mask is not None
        counts = np.zeros(self.count_outputs(classes), np.int64)
        for record in records:
            counts += np.bincount(read_mask(record).reshape(-1), minlength=len(counts))[: len(counts)]
        return counts

    def make_blank_targets(self, count: int, shape: Sequence[int]) -> Array:
        """(count, *shape) of background."""
        return np.zeros((count, *shape), np.int64)

    def to_answer(self, logits: Array, input_volume: Volume, volume: Volume) -> Array:
        """Label map on the grid of the image; see `to_label_map`."""
        return to_label_map(logits, input_volume, volume)

    def find_class_error(self, classes: Sequence[str], source_classes: Sequence[str]) -> str | None:
        """Masks with other class names; the order may differ."""
        if not source_classes or set(classes) == set(source_classes):
            return None
        return (
            f"masks: expected the model's classes ({', '.join(classes)}), got {', '.join(source_classes)}. Name them "
            "alike in dataset.json, or measure on another source."
        )

    def find_target_error(self, case: LabelledCase) -> tuple[str, str] | None:
        """Masks off the grid of the image, or with more values than classes."""
        mask, volume = case.target, case.volume
        if mask.shape != volume.shape:
            return "mask-off-grid", f"expected a mask on the image's grid {volume.shape}, got {mask.shape}"
        if mask.array.max() > len(case.classes):
            return "unknown-class", f"expected mask values 0 to {len(case.classes)}, got {mask.array.max()}"
        return None

    def score_case(self, answer: Array, case: LabelledCase) -> list[CaseRow]:
        """One row per class: metrics of the case, and the volumes (3D) or areas (2D)."""
        volume, classes = case.volume, case.classes
        truth = _renumber_mask(case.target.array[0], classes, case.source_classes)
        scores = segmentation_metrics(answer, truth, volume.spacing, classes, METRICS)
        rows: list[CaseRow] = [{"class": name, **scores[name]} for name in classes]
        dims = volume.spatial_dims
        voxel = abs(float(np.linalg.det(volume.affine[:dims, :dims])))
        size = voxel / 1000 if dims == 3 else voxel  # ml or mm2
        for value, row in enumerate(rows, start=1):
            for column, labels in zip(SIZE_COLUMNS[dims], (truth, answer), strict=True):
                row[column] = size * int((labels == value).sum())
        return rows

    def measure_recalls(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> dict[str, float]:
        """Fraction of the labelled voxels of each class that the network finds, over all cases."""
        recalls = {}
        for name, group in _group_by_class(rows, classes).items():
            columns = SIZE_COLUMNS[2 if any(row.get(SIZE_COLUMNS[3][0]) is None for row in group) else 3]
            truth, predicted = (np.array([row[column] for row in group], np.float64) for column in columns)
            overlap = np.array([row["dice"] for row in group], np.float64) * (truth + predicted) / 2
            if truth.sum() > 0:
                recalls[name] = float(overlap.sum() / truth.sum())
        return recalls

    def summarise_cases(
        self, rows: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
    ) -> dict[str, MetricEstimate]:
        """Mean Dice over the classes, then each metric of each class."""
        subjects = list_subjects(rows)
        rows_by_class = _group_by_class(rows, classes)
        means = np.mean([[row["dice"] for row in rows_by_class[name]] for name in classes], axis=0)
        metrics = {"dice": mean_over_subjects(list(means), subjects, seed=seed, resamples=resamples)}
        for metric in self.metrics:
            for name in classes:
                values = [row[metric] for row in rows_by_class[name]]
                metrics[f"{metric}_{name}"] = mean_over_subjects(values, subjects, seed=seed, resamples=resamples)
        return metrics

    def compare_cases(
        self, one: Sequence[CaseRow], two: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0
    ) -> dict[str, MetricEstimate]:
        """Mean differences of the cases; a metric that one side does not define for a case is left out there."""
        subjects = list_subjects(one)
        differences = {}
        for metric in self.metrics:
            for number, name in enumerate(classes):
                sides = ([row.get(metric) for row in rows[number :: len(classes)]] for rows in (one, two))
                gaps = [None if a is None or b is None else a - b for a, b in zip(*sides, strict=True)]
                differences[f"{metric}_{name}"] = mean_over_subjects(gaps, subjects, seed=seed)
        means = [
            np.mean([[row["dice"] for row in rows[k :: len(classes)]] for k in range(len(classes))], axis=0)
            for rows in (one, two)
        ]
        return {"dice": mean_over_subjects(list(means[0] - means[1]), subjects, seed=seed), **differences}

    def describe_evaluation(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> EvaluationDetails:
        """Dice by class, predicted against true volumes, and the images with the lowest Dice."""
        groups = _group_by_class(rows, classes)
        dice = {name: [row["dice"] for row in group] for name, group in groups.items()}
        plots: list[Plot] = [StripPlot(dice, "Dice", "Dice by class")]
        if all(row["truth_ml"] is not None for row in rows):
            truth, predicted = (
                {name: [row[side] for row in group] for name, group in groups.items()}
                for side in ("truth_ml", "predicted_ml")
            )
            plots.append(AgreementPlot(truth, predicted, "Predicted against true volumes"))
        rows_by_image: dict[str, list[CaseRow]] = {}
        for row in rows:
            rows_by_image.setdefault(row["image"], []).append(row)
        worst = sorted(rows_by_image.items(), key=lambda item: np.mean([row["dice"] for row in item[1]]))[:N_WORST]
        cells = [(image, *(f"{row['dice']:.3f}" for row in group)) for image, group in worst]
        return EvaluationDetails(plots, [CaseTable("The five images with the lowest Dice", ("Image", *classes), cells)])

    def answer_columns(self, answer: Array, volume: Volume, classes: Sequence[str]) -> AnswerRow:
        """Size of each class: `ml_<class>` in 3D, `mm2_<class>` in 2D."""
        unit, scale = ("ml", 1e-3) if volume.spatial_dims == 3 else ("mm2", 1.0)
        sizes = class_sizes(answer, volume, len(classes))
        return {f"{unit}_{name}": round(size * scale, 6) for name, size in zip(classes, sizes, strict=True)}

    def study_metrics(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Mean Dice, then each metric of each class."""
        return (self.metric, *(f"{metric}_{name}" for metric in self.metrics for name in classes))

    def to_study_rows(self, case_rows: Sequence[CaseRow]) -> list[tuple[str, float | None]]:
        """Mean Dice, then each metric of each class."""
        dice = float(np.mean([row["dice"] for row in case_rows]))
        return [("dice", dice), *((f"{name}_{row['class']}", row[name]) for name in self.metrics for row in case_rows)]

    def study_statistics(self, columns: Mapping[str, Array], classes: Sequence[str]) -> dict[str, Statistic]:
        """Weighted mean of each metric over the cases that define it."""
        return {name: weighted_mean(column) for name, column in columns.items()}

    def study_case_scores(self, columns: Mapping[str, Array], classes: Sequence[str]) -> Array:
        """Mean Dice of each case."""
        return columns["dice"]

    def describe_study_case(self, columns: Mapping[str, Array], classes: Sequence[str], case: int) -> str:
        """Dice, in all and of each class."""
        parts = ", ".join(f"{name} {columns[f'dice_{name}'][case]:.3f}" for name in classes)
        return f"Dice {columns['dice'][case]:.3f} ({parts})"


def to_label_map(logits: Array, input_volume: Volume, volume: Volume) -> Array:
    """Logits (K, *processed.shape), class 0 being the background, as labels on the grid of the image as read.

    Logits are brought back (linearly) before they are compared, so the borders are those of the image's own grid. What
    preprocessing cut away is background.

    Returns:
        (*volume.shape) uint8.
    """
    labels: Array = np.zeros(volume.shape, np.uint8)
    highest: Array | None = None
    for number, channel in enumerate(logits):  # one class at a time: all would take four bytes per voxel and class
        values = restore_grid(channel[None], input_volume, volume, order=1, fill=0.0)[0]
        if highest is None:
            highest = values
        else:
            _update_labels(labels, highest, values, number)
        del values  # before the next class is computed
    return labels


def _update_labels(labels: Array, highest: Array, values: Array, number: int) -> None:
    """Assign a class to the voxels with values above the highest so far; a NaN is the highest, as in `np.argmax`."""
    for layer, layer_highest, layer_values in zip(labels, highest, values, strict=True):
        is_higher = layer_values > layer_highest
        is_higher |= np.isnan(layer_values) & ~np.isnan(layer_highest)
        layer[is_higher] = number
        np.copyto(layer_highest, layer_values, where=is_higher)


def class_sizes(labels: Array, volume: Volume, classes: int) -> list[float]:
    """Size of each class: mm3 in 3D, mm2 in 2D."""
    dims = volume.spatial_dims
    voxel = abs(float(np.linalg.det(volume.affine[:dims, :dims])))
    counts = sum(np.bincount(layer.reshape(-1), minlength=classes + 1) for layer in labels)  # converts to int64
    return [float(n) * voxel for n in np.asarray(counts)[1:]]


def _group_by_class(rows: Sequence[CaseRow], classes: Sequence[str]) -> dict[str, list[CaseRow]]:
    return {name: [row for row in rows if row["class"] == name] for name in classes}


def _renumber_mask(mask: Array, classes: Sequence[str], source_classes: Sequence[str]) -> Array:
    """Mask values as numbered by the network; unchanged where the source names no classes."""
    if not source_classes:
        return mask
    mapping = np.array([0, *(list(classes).index(name) + 1 for name in source_classes)], dtype=np.uint8)
    return np.asarray(mapping[mask])
