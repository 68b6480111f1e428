"""Metrics of predicted numbers, as functions of case weights."""

from __future__ import annotations

import numpy as np

from medim.metrics.ranking import Statistic, divide_or_nan
from medim.types import Array


def regression_statistics(predictions: Array, truth: Array) -> dict[str, Statistic]:
    """Build the metrics of predicted numbers.

    `r2`: coefficient of determination, 1 - sum (truth - prediction)^2 / sum (truth - mean truth)^2; 0 for the mean of
    the cases as prediction, negative for a worse one. `mae`: mean absolute error, in the unit of the truth. `pearson`:
    correlation coefficient. `r2` and `pearson` are NaN where the truth (or, for `pearson`, the prediction) is constant.

    Args:
        predictions: (N,).
        truth: (N,).

    Returns:
        Functions of case weights (R, N) with values (R,), by metric.
    """
    errors = predictions - truth

    def r2_statistic(weights: Array) -> Array:
        return 1 - divide_or_nan(weights @ errors**2, _weighted_covariance(weights, truth, truth))

    def mae_statistic(weights: Array) -> Array:
        return np.asarray(weights @ np.abs(errors) / weights.sum(axis=1))

    def pearson_statistic(weights: Array) -> Array:
        variances = [_weighted_covariance(weights, values, values) for values in (predictions, truth)]
        scale = np.sqrt(np.maximum(variances[0], 0) * np.maximum(variances[1], 0))
        return divide_or_nan(_weighted_covariance(weights, predictions, truth), scale)

    return {"r2": r2_statistic, "mae": mae_statistic, "pearson": pearson_statistic}


def _weighted_covariance(weights: Array, a: Array, b: Array) -> Array:
    """Sum of w (a - mean a) (b - mean b) of each row of weights: (R,); 0 within rounding becomes 0."""
    totals = weights.sum(axis=1, keepdims=True)
    shifted_a, shifted_b = a - a.mean(), b - b.mean()  # of the same variance, with less rounding
    gaps_a, gaps_b = (values - weights @ values[:, None] / totals for values in (shifted_a, shifted_b))
    covariance = np.asarray((weights * gaps_a * gaps_b).sum(axis=1))
    floor = 1e-12 * float(np.abs(shifted_a).max(initial=0) * np.abs(shifted_b).max(initial=0)) * totals[:, 0]
    return np.where(np.abs(covariance) <= floor, 0.0, covariance)
