"""Confidence intervals, corrected p-values and verdicts for the difference between two arms of a study.

A study trains every arm with S pretraining seeds and T label subsets, crossed, and evaluates it on the cases of N
subjects. Seeds, subsets and subjects are random samples, so all three contribute to the variance. Subjects are
resampled with replacement (cluster bootstrap), the same ones for every arm, budget and run, so that common effects
cancel in differences. There are too few seeds and subsets to resample: the result of infinitely many resamples is
computed from the crossed analysis of variance, each level with its own n / (n - 1). See `compute_interval` for the
combination of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from medim.metrics import find_metric
from medim.metrics.bootstrap import N_RESAMPLES, RunStatistics, Scores, compute_scores, draw_resamples
from medim.types import Array, UserError

LEVEL = 0.95
MetricLimits = tuple[float, float]  # smallest and largest possible value
UNBOUNDED: MetricLimits = (-math.inf, math.inf)

VarianceSource = Literal["seeds", "subsets", "subjects"]
ComparisonVerdict = Literal["benefit", "harm", "no evidence of a benefit"]


@dataclass(frozen=True, kw_only=True)
class ConfidenceInterval:
    """Mean over runs with its 95 % interval.

    Attributes:
        value: mean over the runs, each computed from all cases.
        low: lower limit.
        high: upper limit.
        error: standard error.
        df: degrees of freedom of Student's t.
        variance_sources: sources of variance in the interval, those with more than one sample.
        seeds: number of pretraining seeds.
        subsets: number of label subsets.
        subjects: number of subjects; 0 if they were not resampled.
    """

    value: float
    low: float
    high: float
    error: float
    df: float
    variance_sources: tuple[VarianceSource, ...]
    seeds: int
    subsets: int
    subjects: int

    @property
    def scope_text(self) -> str:
        """Description of the sources of variance in the interval, and of those that are not included."""
        counts = {"seeds": self.seeds, "subsets": self.subsets, "subjects": self.subjects}
        names = {"seeds": "pretraining seeds", "subsets": "label subsets", "subjects": "subjects"}
        only = {
            "seeds": "this pair of pretraining and from-scratch runs",
            "subsets": "this label subset",
            "subjects": "these subjects",
        }
        sources = [f"{counts[source]} {names[source]}" for source in self.variance_sources]
        exclusions = [only[source] for source in only if source not in self.variance_sources]
        return f"over {_join_words(sources)}" + (
            f"; it applies only to {_join_words(exclusions)}" if exclusions else ""
        )

    def p_value(self, against: float = 0.0) -> float:
        """Compute the two-sided p-value of the mean being `against`; below 0.05 exactly if the interval excludes it."""
        if self.error == 0:
            return float(self.value == against)
        return float(2 * stats.t.sf(abs(self.value - against) / self.error, self.df))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of an arm with the scratch arm at one budget.

    Attributes:
        arm: name of the arm.
        budget: name of the label budget.
        difference: paired difference, arm minus scratch.
        p: two-sided p-value.
        p_corrected: p-value corrected for all comparisons of the same family (Holm).
        verdict: benefit, harm, or no evidence of a benefit.
    """

    arm: str
    budget: str
    difference: ConfidenceInterval
    p: float
    p_corrected: float
    verdict: ComparisonVerdict


def compute_interval(scores: Scores, limits: MetricLimits = UNBOUNDED) -> ConfidenceInterval:
    """Compute the mean over seeds, subsets and subjects with its 95 % interval: value ± t(df) · error.

    The bootstrap over subjects gives the variance of the mean due to subjects, times n / (n - 1). It also gives the
    part of the scatter between seeds, between subsets and of the rest that is noise of subjects. The observed scatter
    of seeds and of subsets above that noise is added. The interaction, which both include, is subtracted once if it is
    above zero. This is the variance that the crossed bootstrap (Owen 2007, arXiv 0711.4047; Owen and Eckles 2012, doi
    10.1214/12-AOAS547) estimates, without the noise that it counts at every level and without its factor (n - 1) / n at
    each level (Davison and Hinkley 1997, section 3.8).

    The degrees of freedom are those of Satterthwaite (1946, doi 10.2307/3002019), from the mean squares in the
    variance; if there is no excess scatter between runs, they are those of the subjects. The degrees of freedom of a
    sum are never below the smallest of its parts; if subtracting the noise brings them below, the smallest of the parts
    is used. Studies with several readers are analysed similarly (Hillis 2007, doi 10.1002/sim.2532).
    `benchmarks/coverage.py` measures the coverage of the interval.

    Args:
        scores: scores of the runs.
        limits: smallest and largest possible value of the metric; the interval is clipped to them.

    Raises:
        UserError: there is a single run and the subjects were not resampled.

    Examples:
        >>> scores = Scores(np.array([[[0.80]], [[0.82]], [[0.84]]]))  # three pretraining seeds, one label subset
        >>> interval = compute_interval(scores)
        >>> f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
        '0.82 (0.77 to 0.87)'
    """
    values = scores.values[..., np.isfinite(scores.values).all(axis=(0, 1))]
    seeds, subsets, _ = values.shape
    level_sizes: dict[VarianceSource, int] = {"seeds": seeds, "subsets": subsets, "subjects": scores.subjects}
    variance_sources: tuple[VarianceSource, ...] = tuple(source for source, size in level_sizes.items() if size > 1)
    if not variance_sources:
        raise UserError("interval: cannot be computed from one run without resampled subjects. Add seeds or subsets.")
    value = float(values[..., 0].mean())
    error, df = _compute_error(values, scores.subjects)
    half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
    low, high = (float(np.clip(end, *limits)) for end in (value - half, value + half))
    return ConfidenceInterval(
        value=value,
        low=low,
        high=high,
        error=error,
        df=df,
        variance_sources=variance_sources,
        seeds=seeds,
        subsets=subsets,
        subjects=scores.subjects,
    )


def _compute_error(values: Array, n_subjects: int) -> tuple[float, float]:
    """Compute the standard error of the mean and its degrees of freedom; see `compute_interval`.

    Args:
        values: (seeds, subsets, 1 + resamples) scores, the first of all subjects; without missing values.
        n_subjects: number of resampled subjects; 0 for none.
    """
    seeds, subsets, _ = values.shape
    run_scatter, noise, total = _compute_variance_components(values[..., :1]), np.zeros(3), 0.0
    if n_subjects:
        spread = values[..., 1:] - values[..., 1:].mean(axis=-1, keepdims=True)
        spread *= math.sqrt(n_subjects / (n_subjects - 1))
        noise, total = _compute_variance_components(spread), float((spread.mean(axis=(0, 1)) ** 2).mean())
    excess = run_scatter - noise  # of seeds, of subsets, of both
    freedom = [size - 1 for size in (seeds, subsets, n_subjects) if size > 1]
    df_denominator, interaction = total**2 / max(n_subjects - 1, 1), 0.0
    if excess[0] + excess[1] > 0:
        total += float(excess[0] + excess[1])
        interaction = max(float(excess.min()), 0.0)
        df_denominator += sum(
            float(square) ** 2 / max(n - 1, 1) for square, n in zip(run_scatter, (seeds, subsets), strict=False)
        )
    df = max(total**2 / df_denominator, min(freedom)) if df_denominator else 1.0
    return math.sqrt(total - interaction), df


def paired_difference(
    ours: RunStatistics,
    theirs: RunStatistics,
    subjects: Sequence[str],
    *,
    limits: MetricLimits = UNBOUNDED,
    seed: int = 0,
    resamples: int = N_RESAMPLES,
) -> ConfidenceInterval:
    """Compute the mean difference of two arms over a grid of runs; see `compute_interval`.

    Args:
        ours: statistics by seed and label subset, each from weights of the cases (R, N) to values (R,).
        theirs: statistics of the runs that are paired with `ours`.
        subjects: (N,) subject of each case.
        limits: smallest and largest possible difference; see `get_metric_limits`.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        UserError: there are too few subjects for an interval.
        ValueError: the grids of the arms have different shapes.

    Examples:
        >>> from medim.metrics.bootstrap import weighted_mean
        >>> ours, scratch = weighted_mean([0.8, 0.7, 0.9, 0.8, 0.9]), weighted_mean([0.7, 0.7, 0.8, 0.6, 0.8])
        >>> difference = paired_difference([[ours]], [[scratch]], ["a", "b", "c", "d", "e"])
        >>> round(difference.value, 3), difference.variance_sources
        (0.1, ('subjects',))
    """
    subject_resamples = draw_resamples(subjects, seed=seed, resamples=resamples)
    return compute_interval(compute_scores(ours, subject_resamples) - compute_scores(theirs, subject_resamples), limits)


def compare_to_scratch(
    pairs: Mapping[tuple[str, str], tuple[Scores, Scores]],
    limits: MetricLimits = UNBOUNDED,
    *,
    higher_is_better: bool = True,
) -> list[Comparison]:
    """Compare arms with scratch: p-values and verdicts, corrected together.

    The verdict is a benefit if the p-value after Holm correction is below 0.05 and the arm is better, and harm if it is
    worse.

    Args:
        pairs: scores of the arm and of scratch, by arm and budget.
        limits: smallest and largest possible difference; see `get_metric_limits`.
        higher_is_better: direction of the metric.

    Examples:
        >>> ours = Scores(np.array([[[0.84]], [[0.85]], [[0.86]]]))  # three pretraining seeds, one label subset
        >>> scratch = Scores(np.array([[[0.80]], [[0.81]], [[0.81]]]))
        >>> [comparison] = compare_to_scratch({("local_dim", "10%"): (ours, scratch)})
        >>> round(comparison.difference.value, 3), comparison.verdict
        (0.043, 'benefit')
    """
    differences = {key: compute_interval(ours - scratch, limits) for key, (ours, scratch) in pairs.items()}
    p = [difference.p_value() for difference in differences.values()]
    results = []
    for ((arm, budget), difference), raw_p, corrected_p in zip(
        differences.items(), p, apply_holm_correction(p), strict=True
    ):
        verdict: ComparisonVerdict = "no evidence of a benefit"
        if corrected_p < 1 - LEVEL:
            verdict = "benefit" if (difference.value > 0) == higher_is_better else "harm"
        results.append(
            Comparison(arm=arm, budget=budget, difference=difference, p=raw_p, p_corrected=corrected_p, verdict=verdict)
        )
    return results


def get_metric_limits(metric: str, *, difference: bool = False) -> MetricLimits:
    """Get the smallest and largest possible value of a metric or difference, as in `METRICS`; 0 to 1 if unknown.

    Args:
        metric: key of the metric, such as `dice` or `hd95_left`.
        difference: whether the value is a difference of two arms.
    """
    match = find_metric(metric)
    lower, upper = match[0].limits if match else (0.0, 1.0)
    return (lower - upper, upper - lower) if difference else (lower, upper)


def combine_verdicts(comparisons: Sequence[Comparison]) -> ComparisonVerdict:
    """Combine the verdicts of several budgets: harm if any shows harm, else benefit if any shows a benefit.

    Examples:
        >>> better, worse = Scores(np.array([[[0.84]], [[0.85]]])), Scores(np.array([[[0.60]], [[0.61]]]))
        >>> pairs = {("local_dim", "10%"): (better, worse), ("local_dim", "100%"): (worse, better)}
        >>> combine_verdicts(compare_to_scratch(pairs))
        'harm'
    """
    verdicts = {comparison.verdict for comparison in comparisons}
    return "harm" if "harm" in verdicts else "benefit" if "benefit" in verdicts else "no evidence of a benefit"


def apply_holm_correction(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number by the method of Holm (1979), which controls the family-wise error rate.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is below the one before, or above 1.
    Source: Scandinavian Journal of Statistics 6, 65 to 70.
    """
    order = np.argsort(p, kind="stable")
    cumulative = np.maximum.accumulate(np.asarray(p, dtype=np.float64)[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(cumulative, 1.0)
    return [float(value) for value in result]


def _compute_variance_components(values: Array) -> Array:
    """Compute the variance of the mean due to seeds, subsets and their interaction: (S, T, R) to (3,), mean over R.

    The result is the mean squares of the crossed analysis of variance over S T; 0 for a level with one sample.
    """
    seeds, subsets, _ = values.shape
    mean = values.mean(axis=(0, 1), keepdims=True)
    rows, columns = values.mean(axis=1, keepdims=True) - mean, values.mean(axis=0, keepdims=True) - mean
    components = []
    for part, free in ((rows, seeds - 1), (columns, subsets - 1), (values - mean - rows - columns, None)):
        within = (seeds - 1) * (subsets - 1) if free is None else free
        sum_of_squares = float((part**2).sum(axis=(0, 1)).mean())
        components.append(sum_of_squares / (within * part.shape[0] * part.shape[1]) if within else 0.0)
    return np.array(components)


def _join_words(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
