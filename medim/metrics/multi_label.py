"""Metrics of findings, any number of which an image may have: each for itself, and their mean.

What is not known of an image (NaN) takes no part, finding by finding. The mean is over the findings that are present in
some image and absent from another; a resample that lacks a side of one of them defines no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medim.metrics.bootstrap import Metric, bootstrap
from medim.metrics.ranking import Statistic, auroc, average_precision
from medim.types import Array

RANKINGS: dict[str, Callable[[Array, Array], Statistic]] = {"auroc": auroc, "average_precision": average_precision}


def multi_label_metrics(
    probabilities: Array, labels: Array, classes: Sequence[str], subjects: Sequence[str], *, seed: int, resamples: int
) -> dict[str, Metric]:
    """Rankings of each finding, and their means, with 95 % intervals over subjects.

    Args:
        probabilities: (N, K).
        labels: (N, K) of 1 (present), 0 (absent) and NaN (unknown).
        classes: names of the findings.
        subjects: (N,) whose image it is.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        `auroc`, `average_precision` (means), then `auroc_<finding>` and so on; `n` counts the images where the finding
        is known, for a mean those where any is. The value of a finding without both sides is None.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    exact = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    known = np.isfinite(labels)
    settings = {"seed": seed, "resamples": resamples}
    means, single = {}, {}
    for metric, ranking in RANKINGS.items():
        values = []
        for k, name in enumerate(classes):
            rows = known[:, k]
            scores, present, own = probabilities[rows, k], labels[rows, k] == 1, _chosen(subjects, rows)
            if present.any() and not present.all():
                values.append(float(exact[metric](present, scores)))
                single[f"{metric}_{name}"] = bootstrap(ranking(scores, present), own, value=values[-1], **settings)
            else:
                single[f"{metric}_{name}"] = Metric(value=None, ci_low=None, ci_high=None, n=len(own))
        any_known = np.asarray(known.any(axis=1))
        statistic = mean_ranking(ranking, probabilities[any_known], labels[any_known])
        mean = float(np.mean(values)) if values else None
        means[metric] = bootstrap(statistic, _chosen(subjects, any_known), value=mean, **settings)
    return means | single


def mean_ranking(ranking: Callable[[Array, Array], Statistic], probabilities: Array, labels: Array) -> Statistic:
    """Mean of a ranking over the findings that have both sides, as a function of the images' weights.

    Args:
        ranking: an entry of RANKINGS.
        probabilities: (N, K).
        labels: (N, K) of 1, 0 and NaN.
    """
    known = np.isfinite(labels)
    both = [k for k in range(labels.shape[1]) if {0.0, 1.0} <= set(labels[known[:, k], k])]
    of_finding = [(known[:, k], ranking(probabilities[known[:, k], k], labels[known[:, k], k] == 1)) for k in both]

    def statistic(weights: Array) -> Array:
        """Each finding by the weights of the images where it is known; NaN where no finding has both sides."""
        if not of_finding:
            return np.full(len(weights), np.nan)
        return np.asarray(np.mean([one(weights[:, rows]) for rows, one in of_finding], axis=0))

    return statistic


def _chosen(subjects: Sequence[str], rows: Array) -> list[str]:
    return [subject for subject, taken in zip(subjects, rows, strict=True) if taken]
