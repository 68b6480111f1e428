"""Savings by pretraining: labels for an equal metric, and training steps to the final level of scratch.

Both invert paired differences. A number of labels M is inside the interval if scratch with M labels is neither
significantly worse nor significantly better than the arm (`intervals.compute_interval`, with the same seeds, subsets
and resampled subjects for both curves). The interval therefore excludes the number of labels of the arm itself if the
difference there is significant, so the sentence and the p-value agree. Source of the idea: Fieller 1954, doi
10.1111/j.2517-6161.1954.tb00159.x. Nothing is extrapolated: outside the measured range, results are "more than" or
"fewer than".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression

from medim.metrics.bootstrap import Scores
from medim.study.statistics.intervals import ComparisonVerdict, VarianceSource, compute_interval
from medim.types import Array

GRID_POINTS = 200  # points at which a curve is evaluated, in addition to its budgets


@dataclass(frozen=True)
class CensoredValue:
    """Number of labels or steps, censored at the limits of the measured range."""

    value: float
    censored: Literal["", "fewer than", "at most", "more than"] = ""

    def __format__(self, spec: str) -> str:
        return f"{self.censored} {self.value:{spec or ',.0f'}}".strip()

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class CensoredInterval:
    """Number of labels or steps with its 95 % interval."""

    value: CensoredValue
    low: CensoredValue
    high: CensoredValue

    def rescale(self, change: Callable[[float], float]) -> CensoredInterval:
        """Apply an increasing function to the value and both limits."""
        return CensoredInterval(
            *(CensoredValue(change(a.value), a.censored) for a in (self.value, self.low, self.high))
        )


@dataclass(frozen=True, kw_only=True)
class LabelsSaved:
    """Number of labels that the labels of one budget are equivalent to with pretraining.

    Attributes:
        labels: N, labels of the arm.
        equivalent_labels: M, labels that scratch needs for the same metric.
        savings: M - N.
        ratio: M / N.
        variance_sources: sources of variance in the interval.
    """

    labels: float
    equivalent_labels: CensoredInterval
    savings: CensoredInterval
    ratio: CensoredInterval
    variance_sources: tuple[VarianceSource, ...]


@dataclass(frozen=True)
class TimeToLevel:
    """Training step at which an arm reaches the final level of scratch.

    Attributes:
        level: mean metric of scratch at the end of its training.
        steps: first measured step at which the mean of the arm reaches the level. The interval extends from the first
            step at which the upper limit reaches the level to the first step at which the lower limit does.
        variance_sources: sources of variance in the interval.
    """

    level: float
    steps: CensoredInterval
    variance_sources: tuple[VarianceSource, ...]


def labels_saved(budgets: Sequence[float], ours: Sequence[Scores], scratch: Sequence[Scores]) -> list[LabelsSaved]:
    """Compute for each budget the number of labels that scratch needs to reach the metric of an arm.

    The curve of scratch is linear in the logarithm of the labels and never decreases: budgets with means in the wrong
    order are pooled in every run and resample (isotonic regression; Barlow et al. 1972).

    Args:
        budgets: numbers of labels, increasing, above 0.
        ours: scores of the arm at each budget, for a metric of which higher is better.
        scratch: scores of scratch at each budget, with the same number of seeds; a budget of all labels may have a
            single subset.

    Raises:
        ValueError: the budgets do not increase, or the scores differ in number, seeds or resamples.

    Examples:
        >>> ours = [Scores(np.array([[[0.80]], [[0.81]]])), Scores(np.array([[[0.90]], [[0.91]]]))]  # two seeds
        >>> scratch = [Scores(np.array([[[0.70]], [[0.71]]])), Scores(np.array([[[0.90]], [[0.91]]]))]
        >>> ten_labels, _ = labels_saved([10, 1000], ours, scratch)
        >>> f"{ten_labels.equivalent_labels.value} labels, {ten_labels.ratio.value:.1f} times as many"
        '100 labels, 10.0 times as many'
    """
    if not (len(budgets) == len(ours) == len(scratch) > 1) or np.any(np.diff([0.0, *budgets]) <= 0):
        raise ValueError(f"budgets: expected two or more increasing ones, with scores of both arms, got {budgets}.")
    if len({(len(score.values), score.values.shape[2]) for score in (*ours, *scratch)}) > 1:
        raise ValueError("scores: the number of seeds or resamples differs between budgets or arms.")
    label_counts = np.asarray(budgets, dtype=np.float64)
    grid = np.unique([*label_counts, *np.geomspace(label_counts[0], label_counts[-1], GRID_POINTS)[1:-1]])
    curve = _interpolate(label_counts, _monotone_curve(scratch), grid)
    results = []
    for labels, level in zip(budgets, ours, strict=True):
        gaps = [compute_interval(point - level) for point in curve]
        lows, values, highs = (np.array([getattr(gap, end) for gap in gaps]) for end in ("low", "value", "high"))
        ends = _first_crossing(grid, values), _first_crossing(grid, highs), _last_crossing(grid, lows)
        equivalent = CensoredInterval(*ends)
        savings, ratio = equivalent.rescale(lambda m, n=labels: m - n), equivalent.rescale(lambda m, n=labels: m / n)  # type: ignore[misc]
        results.append(
            LabelsSaved(
                labels=labels,
                equivalent_labels=equivalent,
                savings=savings,
                ratio=ratio,
                variance_sources=gaps[0].variance_sources,
            )
        )
    return results


def summary_sentence(result: LabelsSaved, verdict: ComparisonVerdict) -> str:
    """Format the result of one budget as a sentence that claims no more than the corrected verdict.

    Examples:
        >>> estimate = CensoredInterval(CensoredValue(38), CensoredValue(21), CensoredValue(60))
        >>> options = {"savings": estimate, "ratio": estimate, "variance_sources": ("seeds",)}
        >>> result = LabelsSaved(labels=10, equivalent_labels=estimate, **options)
        >>> summary_sentence(result, "benefit")
        'With 10 labels and the encoder you get what 38 labels (21 to 60) give without.'
    """
    label_text, _ = _format_label_count(result.labels)
    equivalent_text = _format_equivalent_labels(result.equivalent_labels)
    if verdict == "no evidence of a benefit":
        estimate = result.equivalent_labels
        return (
            f"No evidence of a benefit with {label_text}. Point estimate: like {estimate.value} labels from scratch "
            f"(95 % CI {estimate.low} to {estimate.high})."
        )
    if verdict == "harm":
        return f"The encoder does harm: with {label_text} and the encoder you get {equivalent_text}."
    return f"With {label_text} and the encoder you get {equivalent_text}."


def _format_equivalent_labels(estimate: CensoredInterval) -> str:
    """Format `what 38 labels (21 to 60) give without`; numbers outside the measured range are not stated."""
    value, low, high = estimate.value, estimate.low, estimate.high
    labels, verb = _format_label_count(value.value)
    if low.censored and high.censored and low != high:
        within = " (the interval reaches beyond all that was tried)"
    elif high.censored == "more than" and not low.censored:
        within = f" ({low} or more)"
    elif low.censored == "fewer than" and not high.censored:
        within = f" ({high} or fewer)"
    else:
        within = f" ({low} to {high})" if low != high else ""
    if value.censored == "more than":
        return f"more than {labels} {verb} without, the most that were tried{within}"
    if value.censored == "fewer than":
        return f"less than {labels} {verb} without, the fewest that were tried{within}"
    return f"what {labels}{within} {verb} without"


def _format_label_count(count: float) -> tuple[str, str]:
    """Format a count as `38 labels`, with the verb form for it."""
    return ("1 label", "gives") if round(count) == 1 else (f"{count:,.0f} labels", "give")


def time_to_level(steps: Sequence[int], ours: Sequence[Scores], final: Scores) -> TimeToLevel:
    """Find the first measured step at which an arm reaches the final level of scratch.

    Args:
        steps: steps at which the arm was measured, increasing.
        ours: scores of the arm at each step, for a metric of which higher is better.
        final: scores of scratch at the end of its training.

    Examples:
        >>> ours = [Scores(np.array([[[value]], [[value]]])) for value in (0.5, 0.7, 0.9)]  # two seeds
        >>> result = time_to_level([100, 200, 300], ours, Scores(np.array([[[0.68]], [[0.70]]])))
        >>> round(result.level, 2), str(result.steps.value)
        (0.69, '200')
    """
    gaps = [compute_interval(score - final) for score in ours]

    def find_first_step(end: Literal["low", "value", "high"]) -> CensoredValue:
        crossings = [step for step, gap in zip(steps, gaps, strict=True) if getattr(gap, end) >= 0]
        if not crossings:
            return CensoredValue(steps[-1], "more than")
        return CensoredValue(crossings[0], "at most" if crossings[0] == steps[0] > 0 else "")

    level = float(final.values[..., 0].mean())
    return TimeToLevel(
        level,
        CensoredInterval(find_first_step("value"), find_first_step("high"), find_first_step("low")),
        gaps[0].variance_sources,
    )


def _monotone_curve(scores: Sequence[Scores]) -> list[Scores]:
    """Pool neighbouring budgets until no mean is below that of a smaller budget."""
    blocks = isotonic_regression([score.values[..., 0].mean() for score in scores]).blocks
    curve = []
    for start, end in pairwise(blocks):
        shape = np.broadcast_shapes(*(score.values.shape for score in scores[start:end]))
        block = sum(np.broadcast_to(score.values, shape) for score in scores[start:end]) / (end - start)
        curve += [Scores(block, scores[start].subjects)] * int(end - start)
    return curve


def _interpolate(budgets: Array, scores: Sequence[Scores], grid: Array) -> list[Scores]:
    """Interpolate scores at the points of a grid, linearly in the logarithm of the labels."""
    lower_indices = np.clip(np.searchsorted(budgets, grid, side="right") - 1, 0, len(budgets) - 2)
    shares = np.log(grid / budgets[lower_indices]) / np.log(budgets[lower_indices + 1] / budgets[lower_indices])
    return [
        Scores((1 - share) * scores[index].values + share * scores[index + 1].values, scores[index].subjects)
        for index, share in zip(lower_indices, shares, strict=True)
    ]


def _first_crossing(grid: Array, values: Array) -> CensoredValue:
    """Find the first point at which the values reach 0."""
    indices = np.flatnonzero(values >= 0)
    if not len(indices):
        return CensoredValue(float(grid[-1]), "more than")
    if indices[0] == 0:
        return CensoredValue(float(grid[0]), "fewer than" if values[0] > 0 else "")
    return _interpolate_crossing(grid, values, int(indices[0]))


def _last_crossing(grid: Array, values: Array) -> CensoredValue:
    """Find the last point at which the values leave 0."""
    indices = np.flatnonzero(values <= 0)
    if not len(indices):
        return CensoredValue(float(grid[0]), "fewer than")
    if indices[-1] == len(grid) - 1:
        return CensoredValue(float(grid[-1]), "more than" if values[-1] < 0 else "")
    return _interpolate_crossing(grid, values, int(indices[-1]) + 1)


def _interpolate_crossing(grid: Array, values: Array, after: int) -> CensoredValue:
    """Find the zero between two grid points, by linear interpolation in the logarithm of the labels."""
    share = values[after - 1] / (values[after - 1] - values[after])
    return CensoredValue(float(grid[after - 1] * (grid[after] / grid[after - 1]) ** share))
