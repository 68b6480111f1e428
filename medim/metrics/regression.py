"""Metrics of predicted numbers, as functions of predictions (N,), truth (N,) and case weights (R, N)."""

from __future__ import annotations

import numpy as np

from medim.metrics.metric import divide_or_nan
from medim.types import Array


def r2_score(predictions: Array, truth: Array, weights: Array) -> Array:
    """Coefficient of determination, 1 - sum (truth - prediction)^2 / sum (truth - mean truth)^2.

    It is 0 for the mean of the cases as prediction, negative for a worse one, and NaN if the truth is constant.
    """
    return 1 - divide_or_nan(weights @ (predictions - truth) ** 2, _weighted_covariance(weights, truth, truth))


def mean_absolute_error(predictions: Array, truth: Array, weights: Array) -> Array:
    """Mean absolute error, in the unit of the truth."""
    return np.asarray(weights @ np.abs(predictions - truth) / weights.sum(axis=1))


def pearson_correlation(predictions: Array, truth: Array, weights: Array) -> Array:
    """Correlation coefficient; NaN if the truth or the prediction is constant."""
    variances = [_weighted_covariance(weights, values, values) for values in (predictions, truth)]
    scale = np.sqrt(np.maximum(variances[0], 0) * np.maximum(variances[1], 0))
    return divide_or_nan(_weighted_covariance(weights, predictions, truth), scale)


def _weighted_covariance(weights: Array, a: Array, b: Array) -> Array:
    """Sum of w (a - mean a) (b - mean b) of each row of weights: (R,); 0 within rounding becomes 0."""
    totals = weights.sum(axis=1, keepdims=True)
    shifted_a, shifted_b = a - a.mean(), b - b.mean()  # of the same variance, with less rounding
    gaps_a, gaps_b = (values - weights @ values[:, None] / totals for values in (shifted_a, shifted_b))
    covariance = np.asarray((weights * gaps_a * gaps_b).sum(axis=1))
    floor = 1e-12 * float(np.abs(shifted_a).max(initial=0) * np.abs(shifted_b).max(initial=0)) * totals[:, 0]
    return np.where(np.abs(covariance) <= floor, 0.0, covariance)
