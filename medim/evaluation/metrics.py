"""Metrics of segmentation and classification, and their 95 % intervals over subjects.

Per case values come from MONAI, values over cases from scikit-learn and torchmetrics. An interval is a percentile
bootstrap over *subjects*: a resample draws subjects with replacement, and a case counts as often as its subject. Each
metric over cases stands here a second time as a function of such weights, many resamples at once; the tests hold both
against each other.

Rules where a mask is empty (both: neither truth nor prediction has the class; one: only one of them has it):

| metric | both empty | one empty |
| --- | --- | --- |
| Dice | 1 | 0 |
| surface Dice | 1 | 0 |
| HD95 | None | None |

None is left out of the mean; `n` beside each metric says how many cases it stands on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from medim.evaluation.binary import Statistic, auroc, average_precision, ratio
from medim.types import Array

SURFACE_TOLERANCE_MM = 1.0
ECE_BINS = 15
RESAMPLES = 1000
_ROUNDING_MM = 1e-3  # headers hold 1 mm as 0.9999999 or 1.0000001
_CELLS = 4_000_000  # weights held at once

Metric = dict[str, float | int | None]  # value, ci_low, ci_high, n


def segmentation_metrics(
    prediction: Array, truth: Array, spacing: Sequence[float], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Compare a label map with the truth, class by class.

    Dice is 2 |P and T| / (|P| + |T|). HD95 is the larger of the two directed 95th percentiles of the distances between
    the surfaces (the voxels of a mask that touch its outside), in mm. Surface Dice is the share of both surfaces that
    lies within 1 mm of the other one (Nikolov et al. 2021). See the module's docstring for empty masks.

    Args:
        prediction: (D, H, W) or (H, W), integer labels, 0 the background.
        truth: the same grid.
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
            same = 1.0 if masks[0].any() == masks[1].any() else 0.0
            scores[name] = {"dice": same, "hd95": None, "surface_dice": same}
            continue
        ours, theirs = (torch.from_numpy(mask[_around(masks)][None, None]) for mask in masks)  # (1, 1, ...)
        mm, near = [float(v) for v in spacing], [SURFACE_TOLERANCE_MM + _ROUNDING_MM]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of MONAI, about its own internals
            scores[name] = {
                "dice": float(compute_dice(ours, theirs)),
                "hd95": float(compute_hausdorff_distance(ours, theirs, True, percentile=95, spacing=mm)),
                "surface_dice": float(compute_surface_dice(ours, theirs, near, True, spacing=mm)),
            }
    return scores


def classification_metrics(probabilities: Array, labels: Array) -> dict[str, float | None]:
    """Compare class probabilities with the labels.

    `auroc`: of the second of two classes; of more, the mean over those that occur of one against the rest; None where
    fewer than two occur. `average_precision`: the same of the precision averaged over the positives, whose chance level
    is their share. `balanced_accuracy`: mean recall over the classes that occur. `f1`: mean over the classes that
    occur or are predicted (macro), which needs no positive class. `ece`: expected calibration error of the predicted
    class's probability in 15 bins of equal width (Guo et al. 2017).

    Args:
        probabilities: (N, K), rows sum to one.
        labels: (N,) class indices.

    Returns:
        The six values; all None where N is 0.
    """
    import torch
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score, roc_auc_score
    from torchmetrics.functional.classification import multiclass_calibration_error

    if len(labels) == 0:
        return dict.fromkeys(("auroc", "average_precision", "accuracy", "balanced_accuracy", "f1", "ece"))
    predicted, occurring = probabilities.argmax(axis=1), np.unique(labels)
    ranked: dict[str, float | None] = {"auroc": None, "average_precision": None}
    if len(occurring) > 1:
        sides = [(labels == k, probabilities[:, k]) for k in _positives(probabilities, occurring)]
        ranked["auroc"] = float(np.mean([roc_auc_score(*side) for side in sides]))
        ranked["average_precision"] = float(np.mean([average_precision_score(*side) for side in sides]))
    named = np.union1d(occurring, predicted)
    ece = multiclass_calibration_error(
        torch.from_numpy(probabilities.astype(np.float64)),
        torch.from_numpy(labels.astype(np.int64)),
        num_classes=probabilities.shape[1],
        n_bins=ECE_BINS,
    )
    return {
        **ranked,
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall_score(labels, predicted, labels=occurring, average="macro")),
        "f1": float(f1_score(labels, predicted, labels=named, average="macro", zero_division=0.0)),
        "ece": float(ece),
    }


def bootstrap(
    statistic: Statistic,
    subjects: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    value: float | None = None,
) -> Metric:
    """A statistic of the cases and its 95 % percentile interval over resampled subjects (cluster bootstrap).

    Resamples that define no value (AUROC of a single class) are left out; there is no interval with fewer than two
    subjects or where more than half of the resamples are left out.

    Args:
        statistic: weights (R, N) to values (R,), NaN where undefined.
        subjects: (N,) whose case it is.
        seed: of the draw; resamples follow the order in which subjects first appear.
        resamples: number of them.
        value: the statistic of all cases, where a library computed it; by default the statistic at equal weights.

    Returns:
        `value`, `ci_low`, `ci_high` (None where undefined) and `n`, the number of cases.
    """
    places = {subject: place for place, subject in enumerate(dict.fromkeys(subjects))}
    of_case = np.array([places[subject] for subject in subjects], dtype=np.intp)
    cases, count = len(subjects), len(places)
    if value is None and cases:
        value = _finite(statistic(np.ones((1, cases)))[0])
    metric: Metric = {"value": value, "ci_low": None, "ci_high": None, "n": cases}
    if count < 2 or value is None:
        return metric
    rng = np.random.default_rng(seed)
    values, left = [], resamples
    while left:
        rows = min(left, max(1, _CELLS // cases))
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows)  # (rows, subjects)
        values.append(statistic(drawn[:, of_case].astype(np.float64)))  # (rows, cases)
        left -= rows
    defined = np.concatenate(values)
    defined = defined[np.isfinite(defined)]
    if 2 * len(defined) >= resamples:
        metric["ci_low"], metric["ci_high"] = (float(v) for v in np.percentile(defined, [2.5, 97.5]))
    return metric


def mean_over_subjects(
    values: Sequence[float | None], subjects: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> Metric:
    """Mean over the cases that have a value, with its interval over their subjects; see `bootstrap`."""
    kept = [(v, s) for v, s in zip(values, subjects, strict=True) if v is not None and np.isfinite(v)]
    if not kept:
        return {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    numbers = np.array([v for v, _ in kept])
    return bootstrap(lambda w: w @ numbers / w.sum(axis=1), [s for _, s in kept], seed=seed, resamples=resamples)


def classification_statistics(probabilities: Array, labels: Array) -> dict[str, Statistic]:
    """The metrics of `classification_metrics` as functions of the cases' weights, for `bootstrap`.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices.
    """
    predicted, occurring = probabilities.argmax(axis=1), np.unique(labels)
    hit = (predicted == labels).astype(np.float64)
    confidence = probabilities.max(axis=1)

    def mean_of(statistic: Callable[[Array, Array], Statistic]) -> Statistic:
        """A ranking of each class against the rest, averaged; of two classes the second alone."""
        of_class = [statistic(probabilities[:, k], labels == k) for k in _positives(probabilities, occurring)]
        return lambda weights: np.asarray(np.mean([one(weights) for one in of_class], axis=0))

    def accuracy(weights: Array) -> Array:
        return np.asarray(weights @ hit / weights.sum(axis=1))

    def balanced_accuracy(weights: Array) -> Array:
        """Mean recall of the classes that occur; one that a resample lacks is left out of its mean."""
        recalls = [ratio(weights @ (hit * (labels == k)), weights @ (labels == k)) for k in occurring]
        return _nanmean(np.array(recalls))

    def f1(weights: Array) -> Array:
        """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted, where a resample defines it."""
        scores = []
        for k in np.union1d(occurring, predicted):
            both = (labels == k).astype(np.float64) + (predicted == k)
            scores.append(ratio(2 * weights @ (hit * (labels == k)), weights @ both))
        return _nanmean(np.array(scores))

    def ece(weights: Array) -> Array:
        """Sum of |Σ w (hit - confidence)| over the bins, which hold their upper ends, over that of the weights."""
        gap = hit - confidence
        which = np.clip(np.ceil(confidence * ECE_BINS) - 1, 0, ECE_BINS - 1)
        gaps = sum(np.abs(weights @ (gap * (which == b))) for b in range(ECE_BINS))
        return np.asarray(gaps / weights.sum(axis=1))

    ranked = {"auroc": mean_of(auroc), "average_precision": mean_of(average_precision)}
    return {**ranked, "accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": f1, "ece": ece}


def _positives(probabilities: Array, occurring: Array) -> list[int]:
    """The classes whose AUROC against the rest is averaged."""
    return [1] if probabilities.shape[1] == 2 else [int(k) for k in occurring]


def _around(masks: tuple[Array, Array]) -> tuple[slice, ...]:
    """The box that holds both masks: what lies outside changes no metric and costs time."""
    union = masks[0] | masks[1]
    box = []
    for axis in range(union.ndim):
        held = np.flatnonzero(union.any(axis=tuple(a for a in range(union.ndim) if a != axis)))
        box.append(slice(int(held[0]), int(held[-1]) + 1))
    return tuple(box)


def _nanmean(values: Array) -> Array:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
