"""Segmentation: one class per voxel, learnt from masks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from medim.data.index.index import ImageRecord, Index
from medim.data.preprocessing.steps import restore_grid
from medim.metrics import METRICS
from medim.metrics.bootstrap import (
    N_RESAMPLES,
    MetricEstimate,
    bootstrap_intervals,
    mean_of_statistics,
    weighted_mean,
)
from medim.metrics.metric import Statistic
from medim.metrics.segmentation import segmentation_metrics
from medim.tasks.task import (
    AgreementPlot,
    AnswerRow,
    CaseRow,
    CaseTable,
    ClassSource,
    ColumnType,
    EvaluationDetails,
    LabelledCase,
    MaskSource,
    Plot,
    StripPlot,
    Task,
    list_subjects,
    subtract_statistics,
)
from medim.types import IGNORE_INDEX, Array, Volume

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

    def class_values(self, index: Index) -> tuple[int, ...]:
        """Value of each class in the mask files."""
        return index.class_values or tuple(range(1, len(index.classes) + 1))

    def find_training_error(self, index: Index) -> str | None:
        """Masks with regions of nnU-Net, which overlap, or without any class."""
        if not index.classes:
            return f"{index.source_name}: the masks contain only background. Check them, or add masks with a class."
        if not index.regions:
            return None
        return (
            f"{index.source_name}: dataset.json defines the regions {', '.join(map(repr, index.regions))} as unions of "
            'several mask values, but a voxel has one class here. Name each value in "labels" instead, such as '
            '{"background": 0, "edema": 1, "core": 2}.'
        )

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

    def count_class_images(
        self, records: Sequence[ImageRecord], classes: Sequence[str], list_classes: ClassSource | None = None
    ) -> dict[str, int]:
        """Count the images whose mask contains each class."""
        assert list_classes is not None
        counts = Counter(number for record in records for number in list_classes(record))
        return {name: counts[number] for number, name in enumerate(classes, start=1)}

    def make_blank_targets(self, count: int, shape: Sequence[int]) -> Array:
        """(count, *shape) of background."""
        return np.zeros((count, *shape), np.int64)

    def to_answer(self, logits: Array, input_volume: Volume, volume: Volume) -> Array:
        """Label map on the grid of the image; see `to_label_map`."""
        return to_label_map(logits, input_volume, volume)

    def find_class_error(self, classes: Sequence[str], source_classes: Sequence[str]) -> str | None:
        """Masks with other class names; the order may differ, and classes may be missing."""
        if set(source_classes) <= set(classes):
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
        highest = mask.array.max(where=mask.array != IGNORE_INDEX, initial=0)
        if highest > len(case.source_classes or case.classes):
            return "unknown-class", f"expected class numbers 0 to {len(case.classes)}, got {highest}"
        return None

    def read_truth(self, case: LabelledCase) -> Array:
        """Mask in the class numbers of the network; voxels without a label are background."""
        mask = case.target.array[0]
        return _renumber_mask(np.where(mask == IGNORE_INDEX, 0, mask), case.classes, case.source_classes)

    def score_case(self, answer: Array, case: LabelledCase) -> list[CaseRow]:
        """One row per class: metrics of the case, and the volumes (3D) or areas (2D), over the voxels with a label."""
        volume, classes, truth = case.volume, case.classes, self.read_truth(case)
        answer = np.where(case.target.array[0] == IGNORE_INDEX, 0, answer)
        scores = segmentation_metrics(answer, truth, volume.spacing, classes, METRICS)
        rows: list[CaseRow] = [{"class": name, **scores[name]} for name in classes]
        dims = volume.spatial_dims
        voxel = abs(float(np.linalg.det(volume.affine[:dims, :dims])))
        size = voxel / 1000 if dims == 3 else voxel  # ml or mm2
        for value, row in enumerate(rows, start=1):
            for column, labels in zip(SIZE_COLUMNS[dims], (truth, answer), strict=True):
                row[column] = size * int((labels == value).sum())
        return rows

    def clear_unmeasured_classes(self, rows: Sequence[CaseRow]) -> None:
        """Remove the metrics of classes that the truth of no case contains; their sizes stay."""
        measured_classes = {row["class"] for row in rows if _get_sizes(row)[0] > 0}
        for row in rows:
            if row["class"] not in measured_classes:
                row.update(dict.fromkeys(self.metrics))

    def measure_recalls(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> dict[str, float]:
        """Fraction of the labelled voxels of each class that the network finds, over all cases."""
        recalls = {}
        for name, group in _group_by_class(rows, classes).items():
            truth, predicted = np.array([_get_sizes(row) for row in group], np.float64).reshape(-1, 2).T
            overlap = np.array([row["dice"] or 0.0 for row in group], np.float64) * (truth + predicted) / 2
            if truth.sum() > 0:
                recalls[name] = float(overlap.sum() / truth.sum())
        return recalls

    def summarise_cases(
        self, rows: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
    ) -> dict[str, MetricEstimate]:
        """Mean Dice over the classes, then each metric of each class; `missed` counts cases without the structure."""
        subjects, columns = list_subjects(rows), _build_columns(rows, classes)
        estimates = {
            name: _estimate(statistic, [columns[key] for key in keys], subjects, seed=seed, resamples=resamples)
            for name, (statistic, keys) in self._list_statistics(columns, classes).items()
        }
        for metric in (name for name in self.metrics if METRICS[name].is_distance):
            for name, group in _group_by_class(rows, classes).items():
                estimates[f"{metric}_{name}"]["missed"] = sum(_is_missed(row) for row in group)
        return estimates

    def compare_cases(
        self, one: Sequence[CaseRow], two: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0
    ) -> dict[str, MetricEstimate]:
        """Differences of the metrics; a distance that one side does not define for a case is left out there."""
        subjects = list_subjects(one)
        sides = [_build_columns(rows, classes) for rows in (one, two)]
        for key in (key for key in sides[0] if METRICS[key[0]].is_distance):
            is_undefined = np.isnan(sides[0][key]) | np.isnan(sides[1][key])
            for columns in sides:
                columns[key] = np.where(is_undefined, np.nan, columns[key])
        statistics = [self._list_statistics(columns, classes) for columns in sides]
        differences = {}
        for name, (first, keys) in statistics[0].items():
            second = statistics[1][name][0]
            gap = subtract_statistics({name: first}, {name: second})[name]
            values = [columns[key] for columns in sides for key in keys]
            differences[name] = _estimate(gap, values, subjects, seed=seed)
        return differences

    def _list_statistics(
        self, columns: Mapping[tuple[str, str], Array], classes: Sequence[str]
    ) -> dict[str, tuple[Statistic, list[tuple[str, str]]]]:
        """Statistics by name, each with the keys of its columns: mean Dice over classes, then by metric and class."""
        dice_keys = [(self.metric, name) for name in classes]
        mean_dice = mean_of_statistics([weighted_mean(columns[key]) for key in dice_keys])
        keys = [(metric, name) for metric in self.metrics for name in classes]
        by_class = {
            f"{metric}_{name}": (weighted_mean(columns[metric, name]), [(metric, name)]) for metric, name in keys
        }
        return {self.metric: (mean_dice, dice_keys), **by_class}

    def describe_evaluation(self, rows: Sequence[CaseRow], classes: Sequence[str]) -> EvaluationDetails:
        """Dice by class, predicted against true volumes, and the images with the lowest Dice."""
        groups = _group_by_class(rows, classes)
        columns = _build_columns(rows, classes)
        dice = {name: list(columns["dice", name][np.isfinite(columns["dice", name])]) for name in classes}
        plots: list[Plot] = [StripPlot(dice, "Dice", "Dice by class")]
        if all(row["truth_ml"] is not None for row in rows):
            truth, predicted = (
                {name: [row[side] for row in group] for name, group in groups.items()}
                for side in ("truth_ml", "predicted_ml")
            )
            plots.append(AgreementPlot(truth, predicted, "Predicted against true volumes"))
        images = list(dict.fromkeys(row["image"] for row in rows))
        scores = np.array([columns["dice", name] for name in classes]).reshape(len(classes), -1)  # (classes, images)
        means = mean_of_statistics([weighted_mean(row) for row in scores])(np.eye(len(images)))
        worst = [k for k in np.argsort(means, kind="stable")[:N_WORST] if np.isfinite(means[k])]
        cells = [(images[k], *(_format_dice(value) for value in scores[:, k])) for k in worst]
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
        scores = [row["dice"] for row in case_rows if row["dice"] is not None]
        dice = float(np.mean(scores)) if scores else None
        return [("dice", dice), *((f"{name}_{row['class']}", row[name]) for name in self.metrics for row in case_rows)]

    def study_statistics(self, columns: Mapping[str, Array], classes: Sequence[str]) -> dict[str, Statistic]:
        """Weighted mean of each metric over the cases that define it; mean Dice is that of the classes."""
        statistics = {name: weighted_mean(column) for name, column in columns.items()}
        names = [f"{self.metric}_{name}" for name in classes]
        if names and self.metric in statistics and set(names) <= statistics.keys():
            statistics[self.metric] = mean_of_statistics([statistics[name] for name in names])
        return statistics

    def study_case_scores(self, columns: Mapping[str, Array], classes: Sequence[str]) -> Array:
        """Mean Dice of each case."""
        return columns["dice"]

    def describe_study_case(self, columns: Mapping[str, Array], classes: Sequence[str], case: int) -> str:
        """Dice, in all and of each class."""
        parts = ", ".join(f"{name} {_format_dice(columns[f'dice_{name}'][case])}" for name in classes)
        return f"Dice {_format_dice(columns['dice'][case])} ({parts})"


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


def _get_sizes(row: CaseRow) -> tuple[float, float]:
    """Size of truth and prediction, ml in 3D and mm2 in 2D; NaN in 2D rows of earlier versions."""
    names = SIZE_COLUMNS[2 if row.get(SIZE_COLUMNS[3][0]) is None else 3]
    truth, predicted = (math.nan if row.get(name) is None else float(row[name]) for name in names)
    return truth, predicted


def _is_missed(row: CaseRow) -> bool:
    """Whether the truth of a case contains the class and the prediction does not."""
    truth, predicted = _get_sizes(row)
    return truth > 0 and predicted == 0


def _build_columns(rows: Sequence[CaseRow], classes: Sequence[str]) -> dict[tuple[str, str], Array]:
    """Values (N,) by metric and class, NaN if not defined; none of a class that the truth of no case contains.

    A class that neither truth nor prediction of a case contains has no value, also in rows of the metric rule 1.
    """
    columns = {}
    for name, group in _group_by_class(rows, classes).items():
        sizes = np.array([_get_sizes(row) for row in group], np.float64).reshape(-1, 2)
        is_defined = (sizes != 0).any(axis=1) & (sizes[:, 0] != 0).any()
        for metric in (metric for metric in METRICS if METRICS[metric].mask_function):
            values = np.array([row[metric] for row in group], np.float64)  # None becomes NaN
            columns[metric, name] = np.where(is_defined, values, np.nan)
    return columns


def _estimate(
    statistic: Statistic,
    columns: Sequence[Array],
    subjects: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = N_RESAMPLES,
) -> MetricEstimate:
    """Estimate a statistic with its interval over subjects; `n` is the number of cases with a value in some column."""
    is_defined = np.isfinite(np.array(columns).reshape(len(columns), -1)).any(axis=0)

    def expand_weights(weights: Array) -> Array:
        full_weights = np.zeros((len(weights), len(is_defined)))
        full_weights[:, is_defined] = weights
        return statistic(full_weights)

    kept_subjects = [subject for subject, keep in zip(subjects, is_defined, strict=True) if keep]
    return bootstrap_intervals({"value": expand_weights}, kept_subjects, seed=seed, resamples=resamples)["value"]


def _format_dice(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _renumber_mask(mask: Array, classes: Sequence[str], source_classes: Sequence[str]) -> Array:
    """Mask values as numbered by the network; unchanged where the source names no classes."""
    if not source_classes:
        return mask
    mapping = np.array([0, *(list(classes).index(name) + 1 for name in source_classes)], dtype=np.uint16)
    return np.asarray(mapping[mask])
