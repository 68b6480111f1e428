"""Metrics as pure functions of arrays, their intervals over subjects, and the table of all metrics.

To add a metric, write a function in a module of this folder and add a line to `METRICS`: see
`docs/how-to/add-metric.md`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from medim.metrics.classification import (
    balanced_accuracy,
    calibration_error,
    classification_accuracy,
    macro_f1,
    one_vs_rest_auroc,
    one_vs_rest_precision,
)
from medim.metrics.metric import Metric, Statistic, evaluate_metric
from medim.metrics.ranking import average_precision, rank_auroc
from medim.metrics.regression import mean_absolute_error, pearson_correlation, r2_score
from medim.metrics.segmentation import hausdorff_95, mask_dice, surface_dice
from medim.types import Array

METRICS: dict[str, Metric] = {  # the first metric of a task is its primary metric
    "auroc": Metric("AUROC", {"classification": one_vs_rest_auroc, "multi_label": rank_auroc}),
    "average_precision": Metric(
        "Average precision", {"classification": one_vs_rest_precision, "multi_label": average_precision}
    ),
    "accuracy": Metric("Accuracy", {"classification": classification_accuracy}),
    "balanced_accuracy": Metric("Balanced accuracy", {"classification": balanced_accuracy}),
    "f1": Metric("F1, mean over classes", {"classification": macro_f1}),
    "ece": Metric("Calibration error (ECE)", {"classification": calibration_error}, higher_is_better=False),
    "dice": Metric("Dice", mask_function=mask_dice, mean_title="Dice, mean over classes"),
    "hd95": Metric("HD95", mask_function=hausdorff_95, unit="mm", higher_is_better=False, limits=(0.0, math.inf)),
    "surface_dice": Metric("Surface Dice at 1 mm", mask_function=surface_dice),
    "r2": Metric("R2", {"regression": r2_score}, limits=(-math.inf, 1.0)),
    "mae": Metric(
        "Mean absolute error", {"regression": mean_absolute_error}, higher_is_better=False, limits=(0.0, math.inf)
    ),
    "pearson": Metric("Pearson correlation", {"regression": pearson_correlation}, limits=(-1.0, 1.0)),
}


def list_metrics(task: str) -> tuple[str, ...]:
    """List the metrics of a task by name, the primary one first.

    Examples:
        >>> list_metrics("regression")
        ('r2', 'mae', 'pearson')
    """
    return tuple(name for name, metric in METRICS.items() if task in metric.tasks)


def find_metric(key: str) -> tuple[Metric, str] | None:
    """Split a key such as `hd95_left` into its entry of `METRICS` and its class; None for an unknown metric."""
    if key in METRICS:
        return METRICS[key], ""
    names = [name for name in METRICS if key.startswith(f"{name}_")]
    name = max(names, key=len, default=None)
    return None if name is None else (METRICS[name], key.removeprefix(f"{name}_"))


def higher_is_better(key: str) -> bool:
    """Whether larger values of a metric are better, by a key such as `hd95_left`; true for an unknown metric.

    Examples:
        >>> higher_is_better("dice_left"), higher_is_better("hd95_left")
        (True, False)
    """
    match = find_metric(key)
    return match is None or match[0].higher_is_better


def build_statistics(task: str, predictions: Array, targets: Array) -> dict[str, Statistic]:
    """Build the metrics of predictions as functions of case weights, by name; undefined if a prediction is not finite.

    Args:
        task: name of the task.
        predictions: predictions of N cases, as `Metric.functions` describes them.
        targets: their targets.

    Examples:
        >>> statistics = build_statistics("regression", np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
        >>> statistics["mae"](np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])).round(2).tolist()
        [0.33, 0.5]
    """
    functions = {name: METRICS[name].functions[task] for name in list_metrics(task)}
    return {name: partial(evaluate_metric, function, predictions, targets) for name, function in functions.items()}


def compute_metrics(task: str, predictions: Array, targets: Array) -> dict[str, float | None]:
    """Compute the metrics of predictions, by name; None if a metric is not defined.

    Args:
        task: name of the task.
        predictions: predictions of N cases, as `Metric.functions` describes them.
        targets: their targets.

    Examples:
        >>> metrics = compute_metrics("classification", np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))
        >>> metrics["auroc"], metrics["accuracy"]
        (1.0, 1.0)
    """
    if not len(targets):
        return dict.fromkeys(list_metrics(task))
    weights = np.ones((1, len(targets)))
    values = {name: float(value(weights)[0]) for name, value in build_statistics(task, predictions, targets).items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
