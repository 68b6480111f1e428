"""Bootstrap over subjects: intervals of metrics, and scores of runs on shared resamples.

A study uses the same resamples of subjects for every arm, budget and run, so that differences are paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medim.metrics.metric import Statistic, divide_or_nan
from medim.types import Array, UserError

N_RESAMPLES = 1000
MIN_SUBJECTS = 5  # in total, and per class
_MAX_WEIGHTS = 4_000_000  # weights in memory at a time
_REMEDY = "Evaluate on more subjects (a larger validation split or another source)."

MetricEstimate = dict[str, float | int | None]  # value, ci_low, ci_high, n
RunStatistics = Sequence[Sequence[Statistic]]  # [S][T]: one statistic per pretraining seed and label subset


@dataclass(frozen=True, eq=False)
class Resamples:
    """Resamples of subjects, drawn with replacement.

    Attributes:
        counts: (1 + R, subjects) multiplicity of each subject; the first row is all ones, each other row is a resample.
        case_index: (N,) index of the subject of each case.
    """

    counts: Array
    case_index: Array


@dataclass(frozen=True, eq=False)
class Scores:
    """Metric of the runs of an arm at one budget, or the difference of two arms.

    Attributes:
        values: (S, T, 1 + R) by pretraining seed and label subset: for all cases, then for each resample of subjects. R
            is 0 for a metric that exists for all cases only. NaN if a resample does not define the metric.
        subjects: number of subjects; 0 if R is 0.

    Examples:
        >>> ours = Scores(np.array([[[0.82]], [[0.84]]]))  # two pretraining seeds, one label subset
        >>> scratch = Scores(np.array([[[0.80]], [[0.81]]]))
        >>> (ours - scratch).values.round(2).ravel().tolist()
        [0.02, 0.03]
    """

    values: Array
    subjects: int = 0

    def __neg__(self) -> Scores:
        """Scores of which higher is better, for a metric of which lower is better."""
        return Scores(-self.values, self.subjects)

    def __sub__(self, other: Scores) -> Scores:
        """Subtract run by run, on the same subjects; a single subset (all labels) is paired with each other subset.

        Raises:
            ValueError: the numbers of seeds, subsets, resamples or subjects differ.
        """
        ours, theirs = self.values, other.values
        if not (self.subjects and other.subjects):
            ours, theirs = ours[..., :1], theirs[..., :1]
        elif self.subjects != other.subjects:
            raise ValueError(f"expected scores of the same subjects, got {self.subjects} and {other.subjects}.")
        if len(ours) != len(theirs) or ours.shape[2] != theirs.shape[2]:
            raise ValueError(
                f"expected equal numbers of seeds and resamples, got (S, T, 1 + R) {ours.shape} and {theirs.shape}."
            )
        return Scores(ours - theirs, min(self.subjects, other.subjects))


def draw_resamples(
    subjects: Sequence[str], labels: Sequence[object] | None = None, *, seed: int = 0, resamples: int = N_RESAMPLES
) -> Resamples:
    """Resample subjects with replacement, once for a whole study.

    Args:
        subjects: (N,) subject of each case.
        labels: (N,) class of each case, if there are classes.
        seed: random seed of the draw; a resample depends on the order in which subjects first occur.
        resamples: number of resamples.

    Raises:
        UserError: fewer than five subjects in total, or with a class.

    Examples:
        >>> resamples = draw_resamples(["a", "b", "c", "d", "e", "e"], resamples=3)
        >>> resamples.counts.shape, resamples.counts.sum(axis=1).tolist()
        ((4, 5), [5, 5, 5, 5])
        >>> resamples.case_index.tolist()
        [0, 1, 2, 3, 4, 4]
    """
    count = len(set(subjects))
    if count < MIN_SUBJECTS:
        raise UserError(f"interval: expected at least {MIN_SUBJECTS} subjects, got {count}. {_REMEDY}")
    if labels is not None:
        subject_counts = Counter(label for _, label in dict.fromkeys(zip(subjects, labels, strict=True)))
        if len(subject_counts) < 2 or min(subject_counts.values()) < MIN_SUBJECTS:
            listing = ", ".join(f"{number} with {label}" for label, number in subject_counts.items())
            raise UserError(
                f"interval: expected {MIN_SUBJECTS} subjects of each of two classes, got {listing}. {_REMEDY}"
            )
    return _resample_subjects(subjects, seed, resamples)


def compute_scores(run_statistics: RunStatistics, resamples: Resamples) -> Scores:
    """Compute a metric of all runs of an arm at one budget, on all cases and on each resample.

    Raises:
        UserError: the metric is undefined on all cases, or on more than half of the resamples (a class is missing).

    Examples:
        >>> resamples = draw_resamples(["a", "b", "c", "d", "e"], resamples=3)
        >>> scores = compute_scores([[weighted_mean([0.8, 0.7, 0.9, 0.8, 0.8])]], resamples)
        >>> scores.values.shape, float(scores.values[0, 0, 0].round(3))
        ((1, 1, 4), 0.8)
    """
    values = _evaluate_statistics(run_statistics, resamples)
    is_defined = np.asarray(np.isfinite(values).all(axis=(0, 1)))
    if not is_defined[0] or 2 * is_defined.sum() < len(is_defined):
        extent = (
            "all cases" if not is_defined[0] else f"{len(is_defined) - is_defined.sum()} of {len(is_defined)} resamples"
        )
        raise UserError(
            f"interval: expected cases of every class, got a metric that is undefined on {extent}. {_REMEDY}"
        )
    return Scores(values, resamples.counts.shape[1])


def weighted_mean(values: Sequence[float] | Array) -> Statistic:
    """Build the weighted mean over the cases with a value (N,), as a statistic; NaN if no case has a value.

    Examples:
        >>> mean = weighted_mean([0.5, 1.0, float("nan")])
        >>> mean(np.array([[1.0, 1.0, 1.0], [3.0, 1.0, 2.0]])).tolist()
        [0.75, 0.625]
    """
    column = np.asarray(values, dtype=np.float64)
    valid = np.isfinite(column)
    finite_column = np.where(valid, column, 0.0)
    return lambda weights: divide_or_nan(weights @ finite_column, weights @ valid)


def mean_of_statistics(statistics: Sequence[Statistic]) -> Statistic:
    """Build the mean of statistics, over those that are defined; NaN if none is.

    Examples:
        >>> mean = mean_of_statistics([weighted_mean([0.5, 1.0]), weighted_mean([0.25, float("nan")])])
        >>> mean(np.array([[1.0, 1.0], [0.0, 1.0]])).tolist()
        [0.5, 1.0]
    """

    def evaluate(weights: Array) -> Array:
        values = np.array([statistic(weights) for statistic in statistics]).reshape(-1, len(weights))
        return divide_or_nan(np.nansum(values, axis=0), np.isfinite(values).sum(axis=0))

    return evaluate


def bootstrap_intervals(
    statistics: Mapping[str, Statistic], subjects: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
) -> dict[str, MetricEstimate]:
    """Compute statistics of the cases with 95 % percentile intervals over resampled subjects (cluster bootstrap).

    Resamples without a value (AUROC of a single class) are omitted. There is no interval for fewer than two subjects,
    or if more than half of the resamples are omitted.

    Args:
        statistics: functions of weights (R, N) with values (R,), NaN if undefined, by metric.
        subjects: (N,) subject of each case.
        seed: random seed of the draw; a resample depends on the order in which subjects first occur.
        resamples: number of resamples.

    Returns:
        By metric: `value`, `ci_low`, `ci_high` (None if undefined) and `n`, the number of cases.

    Examples:
        >>> estimates = bootstrap_intervals({"dice": weighted_mean([0.7, 0.8, 0.9])}, ["a", "b", "c"])
        >>> {name: round(number, 2) for name, number in estimates["dice"].items()}
        {'value': 0.8, 'ci_low': 0.7, 'ci_high': 0.9, 'n': 3}
    """
    empty: MetricEstimate = {"value": None, "ci_low": None, "ci_high": None, "n": len(subjects)}
    if not len(subjects):
        return {name: dict(empty) for name in statistics}
    draw = _resample_subjects(subjects, seed, resamples if len(set(subjects)) > 1 else 0)
    values = _evaluate_statistics([list(statistics.values())], draw)[0]
    return {name: _summarise_resamples(row, empty) for name, row in zip(statistics, values, strict=True)}


def _resample_subjects(subjects: Sequence[str], seed: int, resamples: int) -> Resamples:
    """Draw resamples of the subjects in order of occurrence; the draw does not depend on the size of its parts."""
    positions = {subject: position for position, subject in enumerate(dict.fromkeys(subjects))}
    rng, count = np.random.default_rng(seed), len(positions)
    counts = np.ones((1 + resamples, count), dtype=np.uint16)
    rows = max(1, _MAX_WEIGHTS // count)
    for start in range(1, 1 + resamples, rows):
        part = counts[start : start + rows]
        part[:] = rng.multinomial(count, np.full(count, 1 / count), size=len(part))
    return Resamples(counts, np.array([positions[subject] for subject in subjects], dtype=np.intp))


def _evaluate_statistics(statistics: RunStatistics, resamples: Resamples) -> Array:
    """Evaluate a grid [S][T] of statistics on all cases and on each resample: (S, T, 1 + R)."""
    rows = max(1, _MAX_WEIGHTS // len(resamples.case_index))
    parts = []
    for start in range(0, len(resamples.counts), rows):
        weights = resamples.counts[start : start + rows][:, resamples.case_index].astype(np.float64)  # (rows, N)
        parts.append(np.array([[statistic(weights) for statistic in row] for row in statistics]))
    return np.concatenate(parts, axis=2)


def _summarise_resamples(values: Array, empty: MetricEstimate) -> MetricEstimate:
    """Value on all cases, and the percentiles of the resamples: (1 + R,)."""
    if not np.isfinite(values[0]):
        return dict(empty)
    estimate = {**empty, "value": float(values[0])}
    finite_values = values[1:][np.isfinite(values[1:])]
    if len(finite_values) and 2 * len(finite_values) >= len(values) - 1:
        estimate["ci_low"], estimate["ci_high"] = (float(v) for v in np.percentile(finite_values, [2.5, 97.5]))
    return estimate
