"""Interface of a metric: its functions by task, and its presentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medim.types import Array

Statistic = Callable[[Array], Array]  # weights (R, N) of the cases -> values (R,), NaN if undefined on a resample
MetricFunction = Callable[[Array, Array, Array], Array]  # predictions, targets, weights (R, N) -> values (R,)
MaskFunction = Callable[[Array, Array, Sequence[float]], float]  # prediction, truth, spacing in mm -> value of a case


@dataclass(frozen=True)
class Metric:
    """A metric of one or several tasks.

    A metric function takes the predictions and targets of all cases and R rows of case weights, and returns R values:
    the weights are ones for the metric of the cases, and multiplicities for the resamples of a bootstrap. The value is
    NaN where the weights do not define it (AUROC of a single class).

    Attributes:
        title: name in reports.
        functions: metric function of each task, by the name of the task. Predictions and targets are:
            `classification`: probabilities (N, K), class indices (N,); `multi_label`: probabilities (N,), presence (N,)
            bool, of the labelled images of one finding; `regression`: numbers (N,), numbers (N,).
        mask_function: function of two masks of a case, not empty and cropped to their common bounding box; makes this a
            metric of `segmentation`. Its value over cases is their mean. `medim.metrics.segmentation` defines the value
            if a mask is empty.
        mean_title: title of the mean over the classes, where the metric has a value per class.
        unit: unit, empty for numbers without one.
        higher_is_better: direction.
        limits: smallest and largest possible value.

    Examples:
        >>> error = Metric("Largest error", unit="years", higher_is_better=False, limits=(0.0, float("inf")))
        >>> error.tasks, error.is_score
        ((), False)
    """

    title: str
    functions: Mapping[str, MetricFunction] = field(default_factory=dict)
    mask_function: MaskFunction | None = None
    mean_title: str = ""
    unit: str = ""
    higher_is_better: bool = True
    limits: tuple[float, float] = (0.0, 1.0)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks of the metric."""
        return (*self.functions, *(["segmentation"] if self.mask_function else []))

    @property
    def is_distance(self) -> bool:
        """Whether the metric is a distance in mm, which has a penalty for a missed structure."""
        return self.unit == "mm" and not self.higher_is_better

    @property
    def is_score(self) -> bool:
        """Whether the metric is at most 1 and higher is better, so that figures can share an axis."""
        return self.higher_is_better and self.limits[1] == 1.0


def evaluate_metric(function: MetricFunction, predictions: Array, targets: Array, weights: Array) -> Array:
    """Values (R,) of a metric function; NaN if a prediction is not finite, such as of a network that diverged.

    Examples:
        >>> count_hits = lambda predictions, targets, weights: weights @ (predictions == targets)
        >>> evaluate_metric(count_hits, np.array([1.0, np.nan]), np.array([1.0, 2.0]), np.ones((1, 2)))
        array([nan])
    """
    if not np.isfinite(predictions).all():
        return np.full(len(weights), np.nan)
    return function(predictions, targets, weights)


def divide_or_nan(numerator: Array, denominator: Array) -> Array:
    """Quotients (R,), NaN if the denominator is not positive.

    Examples:
        >>> divide_or_nan(np.array([1.0, 1.0]), np.array([4.0, 0.0])).tolist()
        [0.25, nan]
    """
    undefined = np.full(len(numerator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=denominator > 0))
