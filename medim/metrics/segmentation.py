"""Segmentation metrics of a case: Dice, HD95 and surface Dice, computed by MONAI.

Values of a case in which truth or prediction does not contain the class:

| metric | neither contains it | only the truth (missed) | only the prediction |
| --- | --- | --- | --- |
| Dice, surface Dice | None | 0 | 0 |
| HD95 | None | diagonal of the image | None |

None is excluded from the mean; `n` of each metric is the number of cases with a value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medim.metrics.metric import Metric
from medim.types import Array

SURFACE_TOLERANCE_MM = 1.0
METRIC_RULE = 2  # version of this table; 1: Dice of a class that neither contains was 1, and a miss had no distance
MISSED_NOTE = "A missed structure counts with the diagonal of its image as distance."
FIRST_RULE_NOTE = (
    "Metric rule 1, of an earlier version of medim: a class that neither truth nor prediction contains counted as Dice "
    "1, also in the mean, and a missed structure had no distance. Measure again to compare with new results."
)
_ROUNDING_MM = 1e-3  # headers may store 1 mm as 0.9999999 or 1.0000001


def mask_dice(prediction: Array, truth: Array, spacing: Sequence[float]) -> float:
    """2 |P and T| / (|P| + |T|)."""
    from monai.metrics.meandice import compute_dice

    return _call_monai(compute_dice, prediction, truth)


def hausdorff_95(prediction: Array, truth: Array, spacing: Sequence[float]) -> float:
    """Larger of the two directed 95th percentiles of the distances between the surfaces, in mm.

    The surface is the voxels of a mask that touch its outside.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    return _call_monai(compute_hausdorff_distance, prediction, truth, True, percentile=95, spacing=list(spacing))


def surface_dice(prediction: Array, truth: Array, spacing: Sequence[float]) -> float:
    """Share of both surfaces within 1 mm of the other surface (Nikolov et al. 2021)."""
    from monai.metrics.surface_dice import compute_surface_dice

    tolerances = [SURFACE_TOLERANCE_MM + _ROUNDING_MM]
    return _call_monai(compute_surface_dice, prediction, truth, tolerances, True, spacing=list(spacing))


def segmentation_metrics(
    prediction: Array,
    truth: Array,
    spacing: Sequence[float],
    classes: Sequence[str],
    metrics: Mapping[str, Metric],
) -> dict[str, dict[str, float | None]]:
    """Compare a label map with the truth, class by class.

    Args:
        prediction: (D, H, W) or (H, W), integer labels, 0 is the background.
        truth: labels on the same grid.
        spacing: distance between voxel centres along each axis, in mm.
        classes: names of the labels 1, 2, ...
        metrics: entries of `medim.metrics.METRICS` with a `mask_function`; others are ignored.

    Returns:
        Class name to the metrics, by name. The module docstring defines the values for empty masks.

    Raises:
        ValueError: the grids differ.
    """
    if prediction.shape != truth.shape or len(spacing) != truth.ndim:
        raise ValueError(
            f"expected prediction and truth on one grid, got {prediction.shape} and {truth.shape}, "
            f"{len(spacing)} spacings. Bring the mask onto the image's grid first."
        )
    spacing_mm = [float(mm) for mm in spacing]
    diagonal = math.hypot(*(n * mm for n, mm in zip(truth.shape, spacing_mm, strict=True)))
    scores: dict[str, dict[str, float | None]] = {}
    for value, class_name in enumerate(classes, start=1):
        masks = prediction == value, truth == value
        is_empty = [not mask.any() for mask in masks]
        box = None if any(is_empty) else _bounding_box(masks)
        scores[class_name] = {}
        for name, metric in metrics.items():
            if metric.mask_function is None:
                continue
            if box is None:
                scores[class_name][name] = _value_of_empty_mask(metric, is_empty[0], is_empty[1], diagonal)
            else:
                scores[class_name][name] = metric.mask_function(masks[0][box], masks[1][box], spacing_mm)
    return scores


def _value_of_empty_mask(metric: Metric, no_prediction: bool, no_truth: bool, diagonal: float) -> float | None:
    """Value of a metric if prediction, truth or both are empty; `diagonal` of the image in mm."""
    if no_prediction and no_truth:
        return None
    if metric.is_score:
        return 0.0
    return diagonal if metric.is_distance and not no_truth else None


def _call_monai(compute: Callable[..., Any], prediction: Array, truth: Array, *args: Any, **options: Any) -> float:
    """Call a metric of MONAI on two masks."""
    import torch

    masks = (torch.from_numpy(mask[None, None]) for mask in (prediction, truth))  # (1, 1, ...)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # warning of MONAI about its own internals
        return float(compute(*masks, *args, **options))


def _bounding_box(masks: tuple[Array, Array]) -> tuple[slice, ...]:
    """Bounding box of both masks; voxels outside change no metric and cost time."""
    union = masks[0] | masks[1]
    box = []
    for axis in range(union.ndim):
        indices = np.flatnonzero(union.any(axis=tuple(a for a in range(union.ndim) if a != axis)))
        box.append(slice(int(indices[0]), int(indices[-1]) + 1))
    return tuple(box)
