"""Classification metrics, as values and as functions of case weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medim.metrics.ranking import Statistic, auroc, average_precision, divide_or_nan
from medim.types import Array

ECE_BINS = 15


def classification_metrics(probabilities: Array, labels: Array) -> dict[str, float | None]:
    """Compare class probabilities with the labels.

    `auroc`: for two classes, AUROC of the second class; for more, the mean over the classes that occur of one class
    against the rest; None if fewer than two classes occur. `average_precision`: the same for the average precision,
    with the share of positives as its chance level. `balanced_accuracy`: mean recall over the classes that occur. `f1`:
    mean over the classes that occur or are predicted (macro), independent of a positive class. `ece`: expected
    calibration error of the probability of the predicted class in 15 bins of equal width (Guo et al. 2017).

    Args:
        probabilities: (N, K), rows sum to one.
        labels: (N,) class indices.

    Returns:
        The six values; all None if N is 0.
    """
    import torch
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score, roc_auc_score
    from torchmetrics.functional.classification import multiclass_calibration_error

    if len(labels) == 0:
        return dict.fromkeys(("auroc", "average_precision", "accuracy", "balanced_accuracy", "f1", "ece"))
    predictions, present_classes = probabilities.argmax(axis=1), np.unique(labels)
    ranking_metrics: dict[str, float | None] = {"auroc": None, "average_precision": None}
    if len(present_classes) > 1:
        sides = [(labels == k, probabilities[:, k]) for k in _positive_classes(probabilities, present_classes)]
        ranking_metrics["auroc"] = float(np.mean([roc_auc_score(*side) for side in sides]))
        ranking_metrics["average_precision"] = float(np.mean([average_precision_score(*side) for side in sides]))
    class_union = np.union1d(present_classes, predictions)
    ece = multiclass_calibration_error(
        torch.from_numpy(probabilities.astype(np.float64)),
        torch.from_numpy(labels.astype(np.int64)),
        num_classes=probabilities.shape[1],
        n_bins=ECE_BINS,
    )
    return {
        **ranking_metrics,
        "accuracy": float(accuracy_score(labels, predictions)),
        "balanced_accuracy": float(recall_score(labels, predictions, labels=present_classes, average="macro")),
        "f1": float(f1_score(labels, predictions, labels=class_union, average="macro", zero_division=0.0)),
        "ece": float(ece),
    }


def classification_statistics(probabilities: Array, labels: Array) -> dict[str, Statistic]:
    """Metrics of `classification_metrics` as functions of the weights of the cases, for the bootstrap.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices.
    """
    predictions, present_classes = probabilities.argmax(axis=1), np.unique(labels)
    is_correct = (predictions == labels).astype(np.float64)
    confidence = probabilities.max(axis=1)

    def average_over_classes(statistic: Callable[[Array, Array], Statistic]) -> Statistic:
        """Average a ranking of each class against the rest; for two classes, use the second class only."""
        class_statistics = [
            statistic(probabilities[:, k], labels == k) for k in _positive_classes(probabilities, present_classes)
        ]
        return lambda weights: np.asarray(
            np.mean([class_statistic(weights) for class_statistic in class_statistics], axis=0)
        )

    def accuracy_statistic(weights: Array) -> Array:
        return np.asarray(weights @ is_correct / weights.sum(axis=1))

    def balanced_accuracy_statistic(weights: Array) -> Array:
        """Mean recall of the classes that occur; a class missing from a resample is omitted from its mean."""
        recalls = [
            divide_or_nan(weights @ (is_correct * (labels == k)), weights @ (labels == k)) for k in present_classes
        ]
        return _nan_mean(np.array(recalls))

    def f1_statistic(weights: Array) -> Array:
        """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted, if defined in a resample."""
        scores = []
        for k in np.union1d(present_classes, predictions):
            denominator = (labels == k).astype(np.float64) + (predictions == k)
            scores.append(divide_or_nan(2 * weights @ (is_correct * (labels == k)), weights @ denominator))
        return _nan_mean(np.array(scores))

    def ece_statistic(weights: Array) -> Array:
        """Sum of |Σ w (correct - confidence)| over the bins (closed above), divided by the sum of weights."""
        gap = is_correct - confidence
        bin_index = np.clip(np.ceil(confidence * ECE_BINS) - 1, 0, ECE_BINS - 1)
        gaps = sum(np.abs(weights @ (gap * (bin_index == b))) for b in range(ECE_BINS))
        return np.asarray(gaps / weights.sum(axis=1))

    ranking_statistics = {
        "auroc": average_over_classes(auroc),
        "average_precision": average_over_classes(average_precision),
    }
    return {
        **ranking_statistics,
        "accuracy": accuracy_statistic,
        "balanced_accuracy": balanced_accuracy_statistic,
        "f1": f1_statistic,
        "ece": ece_statistic,
    }


def _positive_classes(probabilities: Array, present_classes: Array) -> list[int]:
    """Classes to average the AUROC against the rest over."""
    return [1] if probabilities.shape[1] == 2 else [int(k) for k in present_classes]


def _nan_mean(values: Array) -> Array:
    """Mean over the first axis of the finite values; NaN if there is none."""
    is_finite = np.isfinite(values)
    return divide_or_nan(np.where(is_finite, values, 0.0).sum(axis=0), is_finite.sum(axis=0))
