"""Ranking metrics and operating points of one score for two classes (positive and negative).

The metrics are functions of scores (N,), higher means positive, of positive (N,) bool, and of case weights (R, N). An
*operating point* is a threshold with a given sensitivity. Choose it on the labels used for training or selection, and
evaluate it on other cases: on the same cases, sensitivity and specificity would be optimistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from medim.metrics.metric import Statistic, divide_or_nan
from medim.types import Array, UserError


def rank_auroc(scores: Array, positive: Array, weights: Array) -> Array:
    """Mann-Whitney statistic: weight of correctly ordered pairs (ties: one half), divided by the weight of all pairs.

    NaN if there are no positives or no negatives.
    """
    above, below = _sum_by_score(weights, scores, positive)
    n_lower = np.cumsum(below, axis=1) - below / 2
    return divide_or_nan((above * n_lower).sum(axis=1), above.sum(axis=1) * below.sum(axis=1))


def average_precision(scores: Array, positive: Array, weights: Array) -> Array:
    """Mean precision at the scores of the positives (as in scikit-learn); NaN without positives or negatives.

    The chance level is the share of positives, so values of data sets with different shares are not comparable.
    """
    above, below = (side[:, ::-1] for side in _sum_by_score(weights, scores, positive))  # highest score first
    true_positives, predicted_positives = above.cumsum(axis=1), (above + below).cumsum(axis=1)
    precision = np.divide(
        true_positives, predicted_positives, out=np.zeros_like(true_positives), where=predicted_positives > 0
    )
    sides = np.where(below.sum(axis=1) > 0, above.sum(axis=1), 0.0)
    return divide_or_nan((above * precision).sum(axis=1), sides)


def auroc_standard_error(value: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC over independent cases (Hanley and McNeil 1982).

    Args:
        value: the AUROC.
        positives: number of positive cases, 1 or more.
        negatives: number of negative cases, 1 or more.
    """
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance_terms = (positives - 1) * (q1 - value**2) + (negatives - 1) * (q2 - value**2)
    return float(np.sqrt(max(0.0, value * (1 - value) + variance_terms) / (positives * negatives)))


def choose_threshold(scores: Array, positive: Array, sensitivity: float) -> float:
    """Choose the highest threshold (score >= threshold) with at least the given sensitivity.

    Args:
        scores: (N,) scores of cases that may be used for the choice.
        positive: (N,) bool.
        sensitivity: required sensitivity, above 0 and at most 1.

    Raises:
        UserError: there are no positive or no negative cases, or the sensitivity is out of range.
    """
    from sklearn.metrics import roc_curve

    if not 0 < sensitivity <= 1:
        raise UserError(f"sensitivity: expected above 0 and at most 1, got {sensitivity}.")
    if not positive.any() or positive.all():
        raise UserError(
            f"operating point: expected positive and negative cases, got "
            f"{int(positive.sum())} positive of {len(positive)}. Give a larger label budget."
        )
    _, sensitivities, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    return float(
        thresholds[np.argmax(sensitivities >= sensitivity - 1e-9)]
    )  # tolerance: 0.7 of ten cases are 7 in spite of rounding


def compute_roc_curves(scores: Array, positive: Array, classes: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """Compute the ROC curve of each class against the rest.

    Args:
        scores: (N, K) scores.
        positive: (N, K): 1 positive, 0 negative, NaN unknown.
        classes: names of the K classes.

    Returns:
        False positive rates and sensitivities by class; a class without positive or negative cases has none.
    """
    from sklearn.metrics import roc_curve

    curves = {}
    for name, column, labels in zip(classes, scores.T, positive.T, strict=True):
        is_known = np.isfinite(labels) & np.isfinite(column)
        if len(np.unique(labels[is_known])) == 2:
            false_positive_rates, sensitivities, _ = roc_curve(labels[is_known], column[is_known])
            curves[name] = (false_positive_rates, sensitivities)
    return curves


def operating_point_statistics(scores: Array, positive: Array, threshold: float) -> dict[str, Statistic]:
    """`sensitivity` and `specificity` of a threshold that was chosen on other cases.

    Args:
        scores: (N,).
        positive: (N,) bool.
        threshold: result of `choose_threshold` on other cases.
    """
    is_positive = scores >= threshold
    sides = {"sensitivity": (is_positive, positive), "specificity": (~is_positive, ~positive)}
    return {name: partial(_weighted_share, is_correct, side) for name, (is_correct, side) in sides.items()}


def _weighted_share(is_correct: Array, side: Array, weights: Array) -> Array:
    """Weight of the correct cases of a side, divided by the weight of the side: (R,)."""
    return divide_or_nan(weights @ (is_correct & side).astype(np.float64), weights @ side.astype(np.float64))


def _sum_by_score(weights: Array, scores: Array, positive: Array) -> tuple[Array, Array]:
    """Weight of positives and of negatives at each distinct score, lowest first: two arrays (R, distinct scores)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # first case of each distinct score
    above, below = (np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (positive, ~positive))
    return above, below
