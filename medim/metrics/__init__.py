"""Metrics as pure functions of arrays, their intervals over subjects, and the table of all metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricInfo:
    """Presentation of a metric.

    Attributes:
        title: name in reports.
        mean_title: title of the mean over the classes, where the metric has a value per class.
        unit: unit, empty for numbers without one.
        higher_is_better: direction.
        limits: smallest and largest possible value.
    """

    title: str
    mean_title: str = ""
    unit: str = ""
    higher_is_better: bool = True
    limits: tuple[float, float] = (0.0, 1.0)

    @property
    def is_score(self) -> bool:
        """Whether the metric is at most 1 and higher is better, so that figures can share an axis."""
        return self.higher_is_better and self.limits[1] == 1.0


METRICS: dict[str, MetricInfo] = {
    "surface_dice": MetricInfo("Surface Dice at 1 mm"),
    "balanced_accuracy": MetricInfo("Balanced accuracy"),
    "accuracy": MetricInfo("Accuracy"),
    "auroc": MetricInfo("AUROC"),
    "average_precision": MetricInfo("Average precision"),
    "dice": MetricInfo("Dice", mean_title="Dice, mean over classes"),
    "hd95": MetricInfo("HD95", unit="mm", higher_is_better=False, limits=(0.0, math.inf)),
    "f1": MetricInfo("F1, mean over classes"),
    "ece": MetricInfo("Calibration error (ECE)", higher_is_better=False),
    "r2": MetricInfo("R2", limits=(-math.inf, 1.0)),
    "mae": MetricInfo("Mean absolute error", higher_is_better=False, limits=(0.0, math.inf)),
    "pearson": MetricInfo("Pearson correlation", limits=(-1.0, 1.0)),
}


def find_metric(key: str) -> tuple[MetricInfo, str] | None:
    """Split a key such as `hd95_left` into its entry of `METRICS` and its class; None for an unknown metric."""
    for name, info in METRICS.items():
        if key == name:
            return info, ""
        if key.startswith(f"{name}_"):
            return info, key.removeprefix(f"{name}_")
    return None
