"""Segmentation metrics of a case: Dice, HD95 and surface Dice, computed by MONAI.

Values for empty masks (both: neither truth nor prediction contains the class; one: only one of them contains it):

| metric | both empty | one empty |
| --- | --- | --- |
| Dice | 1 | 0 |
| surface Dice | 1 | 0 |
| HD95 | None | None |

None is excluded from the mean; `n` of each metric is the number of cases with a value.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from medim.types import Array

SURFACE_TOLERANCE_MM = 1.0
_ROUNDING_MM = 1e-3  # headers may store 1 mm as 0.9999999 or 1.0000001


def segmentation_metrics(
    prediction: Array, truth: Array, spacing: Sequence[float], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Compare a label map with the truth, class by class.

    Dice is 2 |P and T| / (|P| + |T|). HD95 is the larger of the two directed 95th percentiles of the distances between
    the surfaces (the voxels of a mask that touch its outside), in mm. Surface Dice is the share of both surfaces within
    1 mm of the other surface (Nikolov et al. 2021). The module docstring defines the values for empty masks.

    Args:
        prediction: (D, H, W) or (H, W), integer labels, 0 is the background.
        truth: labels on the same grid.
        spacing: distance between voxel centres along each axis, in mm.
        classes: names of the labels 1, 2, ...

    Returns:
        Class name to `dice`, `hd95` and `surface_dice`.

    Raises:
        ValueError: the grids differ.
    """
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice

    if prediction.shape != truth.shape or len(spacing) != truth.ndim:
        raise ValueError(
            f"expected prediction and truth on one grid, got {prediction.shape} and {truth.shape}, "
            f"{len(spacing)} spacings. Bring the mask onto the image's grid first."
        )
    scores: dict[str, dict[str, float | None]] = {}
    for value, name in enumerate(classes, start=1):
        masks = prediction == value, truth == value
        if not (masks[0].any() and masks[1].any()):
            agreement_score = 1.0 if masks[0].any() == masks[1].any() else 0.0
            scores[name] = {"dice": agreement_score, "hd95": None, "surface_dice": agreement_score}
            continue
        prediction_mask, truth_mask = (
            torch.from_numpy(mask[_bounding_box(masks)][None, None]) for mask in masks
        )  # (1, 1, ...)
        spacing_mm, tolerances = [float(v) for v in spacing], [SURFACE_TOLERANCE_MM + _ROUNDING_MM]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # warning of MONAI about its own internals
            scores[name] = {
                "dice": float(compute_dice(prediction_mask, truth_mask)),
                "hd95": float(
                    compute_hausdorff_distance(prediction_mask, truth_mask, True, percentile=95, spacing=spacing_mm)
                ),
                "surface_dice": float(
                    compute_surface_dice(prediction_mask, truth_mask, tolerances, True, spacing=spacing_mm)
                ),
            }
    return scores


def _bounding_box(masks: tuple[Array, Array]) -> tuple[slice, ...]:
    """Bounding box of both masks; voxels outside change no metric and cost time."""
    union = masks[0] | masks[1]
    box = []
    for axis in range(union.ndim):
        indices = np.flatnonzero(union.any(axis=tuple(a for a in range(union.ndim) if a != axis)))
        box.append(slice(int(indices[0]), int(indices[-1]) + 1))
    return tuple(box)
