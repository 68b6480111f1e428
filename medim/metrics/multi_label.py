"""Metrics of multi-label findings: one value per finding, and the mean over findings.

Unlabelled findings of an image (NaN) are ignored. The mean is over the findings with positive and negative images; it
is undefined on a resample in which one of these findings has no positive or no negative image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from medim.metrics.bootstrap import MetricEstimate, bootstrap_intervals
from medim.metrics.metric import MetricFunction, Statistic, evaluate_metric
from medim.types import Array


def multi_label_metrics(
    functions: Mapping[str, MetricFunction],
    probabilities: Array,
    labels: Array,
    classes: Sequence[str],
    subjects: Sequence[str],
    *,
    seed: int,
    resamples: int,
) -> dict[str, MetricEstimate]:
    """Compute the metrics of each finding, and their means, with 95 % intervals over subjects.

    Args:
        functions: functions of the scores and the presence of one finding, by metric.
        probabilities: (N, K).
        labels: (N, K): 1 present, 0 absent, NaN unlabelled.
        classes: names of the findings.
        subjects: (N,) subject of each image.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap resamples.

    Returns:
        The means (`auroc`, ...), then `auroc_<finding>` and so on. `n` counts the images with a label of the finding,
        for a mean those with any label. The value of a finding without positive or negative images is None.
    """
    has_label = np.isfinite(labels)

    def estimate(statistics: Mapping[str, Statistic], rows: Array) -> dict[str, MetricEstimate]:
        selection = [subject for subject, is_selected in zip(subjects, rows, strict=True) if is_selected]
        return bootstrap_intervals(statistics, selection, seed=seed, resamples=resamples)

    any_label = np.asarray(has_label.any(axis=1))
    estimates = estimate(mean_statistics(functions, probabilities[any_label], labels[any_label]), any_label)
    by_finding: dict[str, MetricEstimate] = {}
    for k, finding in enumerate(classes):
        rows = has_label[:, k]
        columns = probabilities[rows, k], labels[rows, k] == 1
        statistics = {f"{name}_{finding}": partial(evaluate_metric, f, *columns) for name, f in functions.items()}
        by_finding |= estimate(statistics, rows)
    return estimates | {
        f"{name}_{finding}": by_finding[f"{name}_{finding}"] for name in functions for finding in classes
    }


def mean_statistics(
    functions: Mapping[str, MetricFunction], probabilities: Array, labels: Array
) -> dict[str, Statistic]:
    """Build the mean of each metric over the findings with positive and negative images, as a statistic.

    Args:
        functions: functions of the scores and the presence of one finding, by metric.
        probabilities: (N, K).
        labels: (N, K) of 1, 0 and NaN.
    """
    has_label = np.isfinite(labels)
    two_sided = [k for k in range(labels.shape[1]) if {0.0, 1.0} <= set(labels[has_label[:, k], k])]
    findings = [(rows := has_label[:, k], probabilities[rows, k], labels[rows, k] == 1) for k in two_sided]

    def average_over_findings(function: MetricFunction, weights: Array) -> Array:
        """Average the findings, each over its labelled images; NaN if no finding has positives and negatives."""
        if not findings:
            return np.full(len(weights), np.nan)
        values = [evaluate_metric(function, scores, present, weights[:, rows]) for rows, scores, present in findings]
        return np.asarray(np.mean(values, axis=0))

    return {name: partial(average_over_findings, function) for name, function in functions.items()}
