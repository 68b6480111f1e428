"""Scores of runs on resampled subjects: the same resamples for every arm, budget and run of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medim.metrics.ranking import Statistic
from medim.types import Array, UserError

RESAMPLES = 1000
MIN_SUBJECTS = 5  # in all, and of each class
_CELLS = 4_000_000  # weights held at once
_MORE = "Measure on more subjects (a larger validation split or another source)."

Metric = dict[str, float | int | None]  # value, ci_low, ci_high, n
Cells = Sequence[Sequence[Statistic]]  # [S][T]: a statistic of the cases for each seed and label subset


@dataclass(frozen=True, eq=False)
class Draw:
    """How often each subject counts.

    Attributes:
        counts: (1 + R, subjects); the first row is all ones, each other a resample.
        of_case: (N,) place of each case's subject.
    """

    counts: Array
    of_case: Array


@dataclass(frozen=True, eq=False)
class Scores:
    """A metric of the runs of an arm at one budget, or a difference of two.

    Attributes:
        values: (S, T, 1 + R) by pretraining seed and label subset: of all cases, then of each resample of subjects; R
            may be 0, for a metric that is known for all cases only. NaN where a resample defines none.
        subjects: number of them; 0 where R is 0.
    """

    values: Array
    subjects: int = 0

    def __sub__(self, other: Scores) -> Scores:
        """Run by run, on the same subjects; a single subset (all labels there are) stands for each of the other's.

        Raises:
            ValueError: other numbers of seeds, subsets, resamples or subjects.
        """
        ours, theirs = self.values, other.values
        if not (self.subjects and other.subjects):
            ours, theirs = ours[..., :1], theirs[..., :1]
        elif self.subjects != other.subjects:
            raise ValueError(f"expected scores of the same subjects, got {self.subjects} and {other.subjects}.")
        if len(ours) != len(theirs) or ours.shape[2] != theirs.shape[2]:
            raise ValueError(
                f"expected as many seeds and resamples, got (S, T, 1 + R) {ours.shape} and {theirs.shape}."
            )
        return Scores(ours - theirs, min(self.subjects, other.subjects))


def draw(
    subjects: Sequence[str], labels: Sequence[object] | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Draw:
    """Resample subjects with replacement, once for a whole study.

    Args:
        subjects: (N,) whose case it is.
        labels: (N,) the class of each case, where there are classes.
        seed: of the draw; it follows the order in which subjects first appear.
        resamples: number of them.

    Raises:
        UserError: fewer than five subjects in all, or with a class.
    """
    places = {subject: place for place, subject in enumerate(dict.fromkeys(subjects))}
    count = len(places)
    if count < MIN_SUBJECTS:
        raise UserError(f"interval: expected at least {MIN_SUBJECTS} subjects to measure on, got {count}. {_MORE}")
    if labels is not None:
        held = Counter(label for _, label in dict.fromkeys(zip(subjects, labels, strict=True)))
        if len(held) < 2 or min(held.values()) < MIN_SUBJECTS:
            got = ", ".join(f"{number} with {label}" for label, number in held.items())
            raise UserError(f"interval: expected {MIN_SUBJECTS} subjects of each of two classes, got {got}. {_MORE}")
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    counts = np.concatenate([np.ones((1, count)), drawn]).astype(np.uint16)
    return Draw(counts, np.array([places[subject] for subject in subjects], dtype=np.intp))


def score(cells: Cells, drawn: Draw) -> Scores:
    """A metric of all runs of an arm at one budget, on all cases and on each resample.

    Raises:
        UserError: the metric is not defined for all cases, or for most resamples (a class is missing).
    """
    rows = max(1, _CELLS // len(drawn.of_case))
    parts = []
    for start in range(0, len(drawn.counts), rows):
        weights = drawn.counts[start : start + rows][:, drawn.of_case].astype(np.float64)  # (rows, N)
        parts.append(np.array([[statistic(weights) for statistic in row] for row in cells]))
    values = np.concatenate(parts, axis=2)
    defined = np.isfinite(values).all(axis=(0, 1))
    if not defined[0] or 2 * defined.sum() < len(defined):
        got = "all cases" if not defined[0] else f"{len(defined) - defined.sum()} of {len(defined)} resamples"
        raise UserError(f"interval: expected cases of every class, got a metric that is undefined on {got}. {_MORE}")
    return Scores(values, drawn.counts.shape[1])


def mean_of(values: Sequence[float]) -> Statistic:
    """The weighted mean of a value a case (N,), as a statistic."""
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ column / weights.sum(axis=1)


def bootstrap(
    statistic: Statistic,
    subjects: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    value: float | None = None,
) -> Metric:
    """A statistic of the cases and its 95 % percentile interval over resampled subjects (cluster bootstrap).

    Resamples that define no value (AUROC of a single class) are left out; there is no interval with fewer than two
    subjects or where more than half of the resamples are left out.

    Args:
        statistic: weights (R, N) to values (R,), NaN where undefined.
        subjects: (N,) whose case it is.
        seed: of the draw; resamples follow the order in which subjects first appear.
        resamples: number of them.
        value: the statistic of all cases, where a library computed it; by default the statistic at equal weights.

    Returns:
        `value`, `ci_low`, `ci_high` (None where undefined) and `n`, the number of cases.
    """
    places = {subject: place for place, subject in enumerate(dict.fromkeys(subjects))}
    of_case = np.array([places[subject] for subject in subjects], dtype=np.intp)
    cases, count = len(subjects), len(places)
    if value is None and cases:
        value = _finite(statistic(np.ones((1, cases)))[0])
    metric: Metric = {"value": value, "ci_low": None, "ci_high": None, "n": cases}
    if count < 2 or value is None:
        return metric
    rng = np.random.default_rng(seed)
    values, left = [], resamples
    while left:
        rows = min(left, max(1, _CELLS // cases))
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows)  # (rows, subjects)
        values.append(statistic(drawn[:, of_case].astype(np.float64)))  # (rows, cases)
        left -= rows
    defined = np.concatenate(values)
    defined = defined[np.isfinite(defined)]
    if 2 * len(defined) >= resamples:
        metric["ci_low"], metric["ci_high"] = (float(v) for v in np.percentile(defined, [2.5, 97.5]))
    return metric


def mean_over_subjects(
    values: Sequence[float | None], subjects: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> Metric:
    """Mean over the cases that have a value, with its interval over their subjects; see `bootstrap`."""
    kept = [(v, s) for v, s in zip(values, subjects, strict=True) if v is not None and np.isfinite(v)]
    if not kept:
        return {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    numbers = np.array([v for v, _ in kept])
    return bootstrap(lambda w: w @ numbers / w.sum(axis=1), [s for _, s in kept], seed=seed, resamples=resamples)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
