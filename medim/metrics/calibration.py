"""Are probabilities right? The calibration curve beside its expected error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medim.metrics.classification import ECE_BINS
from medim.types import Array


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed, in bins of equal width of the predicted class's probability.

    Attributes:
        edges: (B + 1,) of the bins, which are open below and closed above.
        counts: (B,) cases in each.
        mean_confidence: (B,) their mean probability; None where there is no case.
        accuracy: (B,) the share of them that was right; None where there is no case.
        ece: expected calibration error, the mean |predicted - observed| over the cases.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean_confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    ece: float


def compute_calibration(probabilities: Array, labels: Array) -> Calibration:
    """The calibration curve of a classifier; its `ece` is that of `medim.metrics.classification`.

    Args:
        probabilities: (N, K), rows sum to one; of several runs, one below the other.
        labels: (N,) class indices.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * ECE_BINS) - 1, 0, ECE_BINS - 1).astype(np.intp)
    counts = np.bincount(bins, minlength=ECE_BINS)
    sums = [np.bincount(bins, weights=values, minlength=ECE_BINS) for values in (confidence, correct)]
    mean_confidence, accuracy = (
        tuple(float(total / count) if count else None for total, count in zip(values, counts, strict=True))
        for values in sums
    )
    edges = tuple(float(edge) for edge in np.linspace(0, 1, ECE_BINS + 1))
    ece = float(np.abs(sums[0] - sums[1]).sum() / len(labels))
    return Calibration(edges, tuple(int(count) for count in counts), mean_confidence, accuracy, ece)
