"""Metrics of predicted numbers, as functions of predictions (N,), truth (N,) and case weights (R, N)."""

from __future__ import annotations

import numpy as np

from medim.metrics.metric import divide_or_nan
from medim.types import Array

ROUNDING = 1e-14  # relative error of a difference from the mean


def r2_score(predictions: Array, truth: Array, weights: Array) -> Array:
    """Coefficient of determination, 1 - sum (truth - prediction)^2 / sum (truth - mean truth)^2.

    It is 0 for the mean of the cases as prediction, negative for a worse one, and NaN if the truth is constant.
    """
    predictions, truth = predictions.astype(np.float64), truth.astype(np.float64)
    return 1 - divide_or_nan(weights @ (predictions - truth) ** 2, _weighted_covariance(weights, truth, truth))


def mean_absolute_error(predictions: Array, truth: Array, weights: Array) -> Array:
    """Mean absolute error, in the unit of the truth."""
    return np.asarray(weights @ np.abs(predictions.astype(np.float64) - truth) / weights.sum(axis=1))


def pearson_correlation(predictions: Array, truth: Array, weights: Array) -> Array:
    """Correlation coefficient; NaN if the truth or the prediction is constant."""
    predictions, truth = predictions.astype(np.float64), truth.astype(np.float64)
    variances = [_weighted_covariance(weights, values, values) for values in (predictions, truth)]
    scale = np.sqrt(np.maximum(variances[0], 0) * np.maximum(variances[1], 0))
    return divide_or_nan(_weighted_covariance(weights, predictions, truth), scale)


def _weighted_covariance(weights: Array, a: Array, b: Array) -> Array:
    """Sum of w (a - mean a) (b - mean b) of each row of weights: (R,); 0 within rounding becomes 0."""
    (gaps_a, error_a), (gaps_b, error_b) = (_subtract_means(weights, values) for values in (a, b))
    covariance = np.asarray((weights * gaps_a * gaps_b).sum(axis=1))
    return np.where(np.abs(covariance) <= error_a * error_b * weights.sum(axis=1), 0.0, covariance)


def _subtract_means(weights: Array, values: Array) -> tuple[Array, Array]:
    """Values minus their mean in each row of weights: (R, N); and the largest rounding error of a row, (R,).

    The mean is subtracted twice, as the first one is rounded to the precision of the largest value. The rows are
    treated one by one, so that a large value has no effect on the resamples without it.
    """
    totals = weights.sum(axis=1, keepdims=True)
    gaps = values - weights @ values[:, None] / totals
    gaps -= (weights * gaps).sum(axis=1, keepdims=True) / totals
    return gaps, ROUNDING * np.where(weights > 0, np.abs(values), 0.0).max(axis=1, initial=0.0)
