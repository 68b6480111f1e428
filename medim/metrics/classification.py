"""Classification metrics, as functions of probabilities (N, K), class indices (N,) and case weights (R, N)."""

from __future__ import annotations

import numpy as np

from medim.metrics.metric import MetricFunction, divide_or_nan
from medim.metrics.ranking import average_precision, rank_auroc
from medim.types import Array

ECE_BINS = 15


def one_vs_rest_auroc(probabilities: Array, labels: Array, weights: Array) -> Array:
    """AUROC of the second of two classes; for more, the mean over the classes that occur of one against the rest."""
    return _average_over_classes(rank_auroc, probabilities, labels, weights)


def one_vs_rest_precision(probabilities: Array, labels: Array, weights: Array) -> Array:
    """Average precision over the same classes as `one_vs_rest_auroc`; its chance level is the share of positives."""
    return _average_over_classes(average_precision, probabilities, labels, weights)


def classification_accuracy(probabilities: Array, labels: Array, weights: Array) -> Array:
    """Share of cases whose most probable class is the true one."""
    return np.asarray(weights @ _is_correct(probabilities, labels) / weights.sum(axis=1))


def balanced_accuracy(probabilities: Array, labels: Array, weights: Array) -> Array:
    """Mean recall of the classes that occur; a class missing from a resample is omitted from its mean."""
    is_correct = _is_correct(probabilities, labels)
    recalls = [
        divide_or_nan(weights @ (is_correct * (labels == k)), weights @ (labels == k)) for k in np.unique(labels)
    ]
    return _nan_mean(np.array(recalls))


def macro_f1(probabilities: Array, labels: Array, weights: Array) -> Array:
    """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted, if defined in a resample."""
    is_correct, predictions = _is_correct(probabilities, labels), probabilities.argmax(axis=1)
    scores = []
    for k in np.union1d(labels, predictions):
        denominator = (labels == k).astype(np.float64) + (predictions == k)
        scores.append(divide_or_nan(2 * weights @ (is_correct * (labels == k)), weights @ denominator))
    return _nan_mean(np.array(scores))


def calibration_error(probabilities: Array, labels: Array, weights: Array) -> Array:
    """Expected calibration error of the predicted class, in 15 bins of equal width (Guo et al. 2017).

    Sum of |Σ w (correct - confidence)| over the bins (closed above), divided by the sum of weights.
    """
    confidence = probabilities.max(axis=1)
    gap = _is_correct(probabilities, labels) - confidence
    bin_index = np.clip(np.ceil(confidence * ECE_BINS) - 1, 0, ECE_BINS - 1)
    gaps = sum(np.abs(weights @ (gap * (bin_index == b))) for b in range(ECE_BINS))
    return np.asarray(gaps / weights.sum(axis=1))


def _average_over_classes(ranking: MetricFunction, probabilities: Array, labels: Array, weights: Array) -> Array:
    """Average a ranking of each class against the rest; for two classes, use the second class only."""
    positive_classes = [1] if probabilities.shape[1] == 2 else np.unique(labels)
    rankings = [ranking(probabilities[:, k], labels == k, weights) for k in positive_classes]
    return np.asarray(np.mean(rankings, axis=0))


def _is_correct(probabilities: Array, labels: Array) -> Array:
    """1 for cases whose most probable class is the true one, else 0: (N,)."""
    return np.asarray(probabilities.argmax(axis=1) == labels, dtype=np.float64)


def _nan_mean(values: Array) -> Array:
    """Mean over the first axis of the finite values; NaN if there is none."""
    is_finite = np.isfinite(values)
    return divide_or_nan(np.where(is_finite, values, 0.0).sum(axis=0), is_finite.sum(axis=0))
