"""Metrics of multi-label findings: one value per finding, and the mean over findings.

Unlabelled findings of an image (NaN) are ignored. The mean is over the findings with positive and negative images; it
is undefined on a resample in which one of these findings has no positive or no negative image.
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
    """Compute the ranking metrics of each finding, and their means, with 95 % intervals over subjects.

    Args:
        probabilities: (N, K).
        labels: (N, K): 1 present, 0 absent, NaN unlabelled.
        classes: names of the findings.
        subjects: (N,) subject of each image.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap resamples.

    Returns:
        `auroc`, `average_precision` (means), then `auroc_<finding>` and so on. `n` counts the images with a label of
        the finding, for a mean those with any label. The value of a finding without positive or negative images is
        None.
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
    """Build the mean of a ranking metric over the findings with positive and negative images, as a statistic.

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
        """Average the findings, each over its labelled images; NaN if no finding has positives and negatives."""
        if not finding_statistics:
            return np.full(len(weights), np.nan)
        return np.asarray(
            np.mean([finding_statistic(weights[:, rows]) for rows, finding_statistic in finding_statistics], axis=0)
        )

    return mean_statistic


def _select_subjects(subjects: Sequence[str], rows: Array) -> list[str]:
    return [subject for subject, is_selected in zip(subjects, rows, strict=True) if is_selected]
