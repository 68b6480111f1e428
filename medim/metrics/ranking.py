"""What one score tells of two sides: present or absent, one class or the rest.

A `Statistic` takes weights of the cases, many resamples at once, for `medim.metrics.bootstrap.bootstrap_interval`; it
is NaN
where a resample defines no value. An *operating point* is a threshold that gives a chosen sensitivity. It is chosen on
the labels that were trained or selected on and then held against others: chosen on the cases that it is measured on,
both its sensitivity and its specificity would be too good.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medim.types import Array, UserError

Statistic = Callable[[Array], Array]  # weights (R, N) of the cases -> values (R,), NaN where a resample defines none


def auroc(scores: Array, positive: Array) -> Statistic:
    """Mann-Whitney statistic, ties counting half; undefined where a side is missing.

    Args:
        scores: (N,), higher means positive.
        positive: (N,) bool.
    """

    def auroc_statistic(weights: Array) -> Array:
        """The weight of pairs in the right order, a tie for half, over that of all pairs of the two sides."""
        above, below = _sum_by_score(weights, scores, positive)
        n_lower = np.cumsum(below, axis=1) - below / 2
        return divide_or_nan((above * n_lower).sum(axis=1), above.sum(axis=1) * below.sum(axis=1))

    return auroc_statistic


def auroc_standard_error(value: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC over independent cases (Hanley and McNeil 1982).

    Args:
        value: the AUROC.
        positives: cases of one side, 1 or more.
        negatives: of the other.
    """
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance_terms = (positives - 1) * (q1 - value**2) + (negatives - 1) * (q2 - value**2)
    return float(np.sqrt(max(0.0, value * (1 - value) + variance_terms) / (positives * negatives)))


def average_precision(scores: Array, positive: Array) -> Statistic:
    """Mean precision over the positives, each at its own score (scikit-learn's); undefined where a side is missing.

    What an uninformed score gets is the share of positives, so values of sets of unlike shares do not compare.

    Args:
        scores: (N,), higher means positive.
        positive: (N,) bool.
    """

    def average_precision_statistic(weights: Array) -> Array:
        """Precision at the score of each positive, averaged by the positives' weight."""
        above, below = (side[:, ::-1] for side in _sum_by_score(weights, scores, positive))  # highest score first
        true_positives, predicted_positives = above.cumsum(axis=1), (above + below).cumsum(axis=1)
        precision = np.divide(
            true_positives, predicted_positives, out=np.zeros_like(true_positives), where=predicted_positives > 0
        )
        sides = np.where(below.sum(axis=1) > 0, above.sum(axis=1), 0.0)
        return divide_or_nan((above * precision).sum(axis=1), sides)

    return average_precision_statistic


def choose_threshold(scores: Array, positive: Array, sensitivity: float) -> float:
    """The highest threshold by which at least this share of the positives is called so (score >= threshold).

    Args:
        scores: (N,) of the cases that a threshold may be chosen on.
        positive: (N,) bool.
        sensitivity: above 0, at most 1.

    Raises:
        UserError: no positive case, or a share out of range.
    """
    from sklearn.metrics import roc_curve

    if not 0 < sensitivity <= 1:
        raise UserError(f"sensitivity: expected above 0 and at most 1, got {sensitivity}.")
    if not positive.any() or positive.all():
        raise UserError(
            f"operating point: expected positive and negative cases to choose a threshold on, got "
            f"{int(positive.sum())} positive of {len(positive)}. Give a larger label budget."
        )
    _, sensitivities, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    return float(
        thresholds[np.argmax(sensitivities >= sensitivity - 1e-9)]
    )  # 0.7 of ten is 7, whatever 7 / 10 rounds to


def operating_point_statistics(scores: Array, positive: Array, threshold: float) -> dict[str, Statistic]:
    """`sensitivity` and `specificity` of calling positive what reaches a threshold chosen elsewhere.

    Args:
        scores: (N,).
        positive: (N,) bool.
        threshold: of `choose_threshold`, on other cases.
    """
    is_positive = scores >= threshold
    sides = {"sensitivity": (is_positive, positive), "specificity": (~is_positive, ~positive)}
    return {name: _weighted_share(is_correct, side) for name, (is_correct, side) in sides.items()}


def divide_or_nan(numerator: Array, denominator: Array) -> Array:
    """Quotients (R,), NaN where the denominator is not above 0."""
    undefined = np.full(len(numerator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=denominator > 0))


def _weighted_share(is_correct: Array, side: Array) -> Statistic:
    return lambda weights: divide_or_nan(
        weights @ (is_correct & side).astype(np.float64), weights @ side.astype(np.float64)
    )


def _sum_by_score(weights: Array, scores: Array, positive: Array) -> tuple[Array, Array]:
    """Weight of positives and of negatives at each distinct score, lowest first: two of (R, distinct scores)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # first case of each distinct score
    above, below = (np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (positive, ~positive))
    return above, below
