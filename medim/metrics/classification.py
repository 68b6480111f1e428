"""Classification metrics of the cases, as values and as functions of case weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medim.metrics.ranking import Statistic, auroc, average_precision, ratio
from medim.types import Array

ECE_BINS = 15


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


def _nanmean(values: Array) -> Array:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))
