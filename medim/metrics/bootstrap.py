"""Bootstrap over subjects: intervals of metrics, and scores of runs on shared resamples.

A study uses the same resamples of subjects for every arm, budget and run, so that differences are paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medim.metrics.ranking import Statistic
from medim.types import Array, UserError

N_RESAMPLES = 1000
MIN_SUBJECTS = 5  # in total, and per class
_MAX_WEIGHTS = 4_000_000  # weights in memory at a time
_REMEDY = "Evaluate on more subjects (a larger validation split or another source)."

Metric = dict[str, float | int | None]  # value, ci_low, ci_high, n
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
    positions = {subject: position for position, subject in enumerate(dict.fromkeys(subjects))}
    count = len(positions)
    if count < MIN_SUBJECTS:
        raise UserError(f"interval: expected at least {MIN_SUBJECTS} subjects, got {count}. {_REMEDY}")
    if labels is not None:
        subject_counts = Counter(label for _, label in dict.fromkeys(zip(subjects, labels, strict=True)))
        if len(subject_counts) < 2 or min(subject_counts.values()) < MIN_SUBJECTS:
            listing = ", ".join(f"{number} with {label}" for label, number in subject_counts.items())
            raise UserError(
                f"interval: expected {MIN_SUBJECTS} subjects of each of two classes, got {listing}. {_REMEDY}"
            )
    samples = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    counts = np.concatenate([np.ones((1, count)), samples]).astype(np.uint16)
    return Resamples(counts, np.array([positions[subject] for subject in subjects], dtype=np.intp))


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
    rows = max(1, _MAX_WEIGHTS // len(resamples.case_index))
    parts = []
    for start in range(0, len(resamples.counts), rows):
        weights = resamples.counts[start : start + rows][:, resamples.case_index].astype(np.float64)  # (rows, N)
        parts.append(np.array([[statistic(weights) for statistic in row] for row in run_statistics]))
    values = np.concatenate(parts, axis=2)
    is_defined = np.isfinite(values).all(axis=(0, 1))
    if not is_defined[0] or 2 * is_defined.sum() < len(is_defined):
        extent = (
            "all cases" if not is_defined[0] else f"{len(is_defined) - is_defined.sum()} of {len(is_defined)} resamples"
        )
        raise UserError(
            f"interval: expected cases of every class, got a metric that is undefined on {extent}. {_REMEDY}"
        )
    return Scores(values, resamples.counts.shape[1])


def weighted_mean(values: Sequence[float]) -> Statistic:
    """Build the weighted mean of one value per case (N,), as a statistic.

    Examples:
        >>> mean = weighted_mean([0.5, 1.0])
        >>> mean(np.array([[1.0, 1.0], [3.0, 1.0]])).tolist()
        [0.75, 0.625]
    """
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ column / weights.sum(axis=1)


def mean_over_valid(column: Array) -> Statistic:
    """Build the weighted mean over the cases with a value, as a statistic; NaN if no case has a value."""
    valid = np.isfinite(column)
    finite_column = np.where(valid, column, 0.0)

    def compute_mean(weights: Array) -> Array:
        total = weights @ valid
        return np.asarray(np.divide(weights @ finite_column, total, out=np.full(len(weights), np.nan), where=total > 0))

    return compute_mean


def bootstrap_interval(
    statistic: Statistic,
    subjects: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = N_RESAMPLES,
    value: float | None = None,
) -> Metric:
    """Compute a statistic of the cases and its 95 % percentile interval over resampled subjects (cluster bootstrap).

    Resamples without a value (AUROC of a single class) are omitted. There is no interval for fewer than two subjects,
    or if more than half of the resamples are omitted.

    Args:
        statistic: weights (R, N) to values (R,), NaN if undefined.
        subjects: (N,) subject of each case.
        seed: random seed of the draw; a resample depends on the order in which subjects first occur.
        resamples: number of resamples.
        value: value of the statistic on all cases, if a library computed it; by default the statistic at equal weights.

    Returns:
        `value`, `ci_low`, `ci_high` (None if undefined) and `n`, the number of cases.
    """
    subject_numbers = {subject: place for place, subject in enumerate(dict.fromkeys(subjects))}
    case_index = np.array([subject_numbers[subject] for subject in subjects], dtype=np.intp)
    n_cases, n_subjects = len(subjects), len(subject_numbers)
    if value is None and n_cases:
        value = _none_if_not_finite(statistic(np.ones((1, n_cases)))[0])
    metric: Metric = {"value": value, "ci_low": None, "ci_high": None, "n": n_cases}
    if n_subjects < 2 or value is None:
        return metric
    rng = np.random.default_rng(seed)
    values, n_remaining = [], resamples
    while n_remaining:
        n_rows = min(n_remaining, max(1, _MAX_WEIGHTS // n_cases))
        draws = rng.multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), size=n_rows)  # (rows, subjects)
        values.append(statistic(draws[:, case_index].astype(np.float64)))  # (rows, cases)
        n_remaining -= n_rows
    finite_values = np.concatenate(values)
    finite_values = finite_values[np.isfinite(finite_values)]
    if 2 * len(finite_values) >= resamples:
        metric["ci_low"], metric["ci_high"] = (float(v) for v in np.percentile(finite_values, [2.5, 97.5]))
    return metric


def mean_over_subjects(
    values: Sequence[float | None], subjects: Sequence[str], *, seed: int = 0, resamples: int = N_RESAMPLES
) -> Metric:
    """Compute the mean over the cases with a value, and its interval over subjects (`bootstrap_interval`)."""
    defined_pairs = [(v, s) for v, s in zip(values, subjects, strict=True) if v is not None and np.isfinite(v)]
    if not defined_pairs:
        return {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    numbers = np.array([v for v, _ in defined_pairs])
    return bootstrap_interval(
        lambda w: w @ numbers / w.sum(axis=1), [s for _, s in defined_pairs], seed=seed, resamples=resamples
    )


def _none_if_not_finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
