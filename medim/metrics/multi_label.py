"""Metrics of findings, any number of which an image may have: each for itself, and their mean.

What is not known of an image (NaN) takes no part, finding by finding. The mean is over the findings that are present in
some image and absent from another; a resample that lacks a side of one of them defines no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medim.metrics.bootstrap import Metric, bootstrap_interval
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

    sklearn_metrics = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    has_label = np.isfinite(labels)
    settings = {"seed": seed, "resamples": resamples}
    means, by_finding = {}, {}
    for metric, ranking in RANKINGS.items():
        values = []
        for k, name in enumerate(classes):
            rows = has_label[:, k]
            scores, present, row_subjects = (
                probabilities[rows, k],
                labels[rows, k] == 1,
                _select_subjects(subjects, rows),
            )
            if present.any() and not present.all():
                values.append(float(sklearn_metrics[metric](present, scores)))
                by_finding[f"{metric}_{name}"] = bootstrap_interval(
                    ranking(scores, present), row_subjects, value=values[-1], **settings
                )
            else:
                by_finding[f"{metric}_{name}"] = Metric(value=None, ci_low=None, ci_high=None, n=len(row_subjects))
        any_label = np.asarray(has_label.any(axis=1))
        statistic = mean_ranking(ranking, probabilities[any_label], labels[any_label])
        mean = float(np.mean(values)) if values else None
        means[metric] = bootstrap_interval(statistic, _select_subjects(subjects, any_label), value=mean, **settings)
    return means | by_finding


def mean_ranking(ranking: Callable[[Array, Array], Statistic], probabilities: Array, labels: Array) -> Statistic:
    """Mean of a ranking over the findings that have both sides, as a function of the images' weights.

    Args:
        ranking: an entry of RANKINGS.
        probabilities: (N, K).
        labels: (N, K) of 1, 0 and NaN.
    """
    has_label = np.isfinite(labels)
    two_sided = [k for k in range(labels.shape[1]) if {0.0, 1.0} <= set(labels[has_label[:, k], k])]
    finding_statistics = [
        (has_label[:, k], ranking(probabilities[has_label[:, k], k], labels[has_label[:, k], k] == 1))
        for k in two_sided
    ]

    def mean_statistic(weights: Array) -> Array:
        """Each finding by the weights of the images where it is known; NaN where no finding has both sides."""
        if not finding_statistics:
            return np.full(len(weights), np.nan)
        return np.asarray(
            np.mean([finding_statistic(weights[:, rows]) for rows, finding_statistic in finding_statistics], axis=0)
        )

    return mean_statistic


def _select_subjects(subjects: Sequence[str], rows: Array) -> list[str]:
    return [subject for subject, is_selected in zip(subjects, rows, strict=True) if is_selected]
