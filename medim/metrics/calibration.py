"""Calibration curve and expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medim.metrics.classification import ECE_BINS, calibration_error
from medim.types import Array


@dataclass(frozen=True)
class Calibration:
    """Predicted probability against observed accuracy, in equal-width bins of the probability of the predicted class.

    Attributes:
        edges: (B + 1,) edges of the bins, which are open below and closed above.
        counts: (B,) number of cases per bin.
        mean_confidence: (B,) mean probability per bin; None for an empty bin.
        accuracy: (B,) share of correct predictions per bin; None for an empty bin.
        ece: expected calibration error, the mean |predicted - observed| over the cases; None if a probability is not
            finite, and then no case is in a bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean_confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    ece: float | None


def compute_calibration(probabilities: Array, labels: Array) -> Calibration:
    """Compute the calibration curve of a classifier; its `ece` is `calibration_error` of the same cases.

    Args:
        probabilities: (N, K), rows sum to one; rows of several runs are concatenated.
        labels: (N,) class indices.
    """
    is_finite = bool(np.isfinite(probabilities).all())
    usable = slice(None if is_finite else 0)
    confidence, correct = probabilities[usable].max(axis=1), probabilities[usable].argmax(axis=1) == labels[usable]
    bins = np.clip(np.ceil(confidence * ECE_BINS) - 1, 0, ECE_BINS - 1).astype(np.intp)
    counts = np.bincount(bins, minlength=ECE_BINS)
    sums = [np.bincount(bins, weights=values, minlength=ECE_BINS) for values in (confidence, correct)]
    mean_confidence, accuracy = (
        tuple(float(total / count) if count else None for total, count in zip(values, counts, strict=True))
        for values in sums
    )
    edges = tuple(float(edge) for edge in np.linspace(0, 1, ECE_BINS + 1))
    ece = float(calibration_error(probabilities, labels, np.ones((1, len(labels))))[0]) if is_finite else None
    return Calibration(edges, tuple(int(count) for count in counts), mean_confidence, accuracy, ece)
