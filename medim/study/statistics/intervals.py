"""Is one arm better than another? Intervals, corrected p-values and verdicts over all that was drawn.

A study runs every arm with S pretraining seeds and T label subsets, crossed, and measures it on the cases of N
subjects. All three were drawn, and any of them might have come out otherwise. Subjects are resampled with replacement
(cluster bootstrap), the same ones for every arm, budget and run: what they share cancels. Of seeds and subsets there
are too few to resample: what infinitely many resamples would give is computed from the crossed analysis of variance,
each level with its own n / (n - 1). See `compute_interval` for how the parts are put together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from medim.metrics.bootstrap import N_RESAMPLES, RunStatistics, Scores, compute_scores, draw_resamples
from medim.types import Array, UserError

LEVEL = 0.95
MetricLimits = tuple[float, float]  # what a number cannot leave
UNBOUNDED: MetricLimits = (-math.inf, math.inf)

VarianceSource = Literal["seeds", "subsets", "subjects"]
ComparisonVerdict = Literal["benefit", "harm", "no evidence of a benefit"]


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean over runs with its 95 % interval.

    Attributes:
        value: of all cases, mean over the runs.
        low: lower end.
        high: upper end.
        error: standard error.
        df: degrees of freedom of Student's t.
        over: what was drawn more than once, and the interval so speaks of.
        seeds: number of pretraining seeds.
        subsets: number of label subsets.
        subjects: number of subjects; 0 where they were not resampled.
    """

    value: float
    low: float
    high: float
    error: float
    df: float
    over: tuple[VarianceSource, ...]
    seeds: int
    subsets: int
    subjects: int

    @property
    def scope_text(self) -> str:
        """What the interval speaks of, in words."""
        counts = {"seeds": self.seeds, "subsets": self.subsets, "subjects": self.subjects}
        names = {"seeds": "pretraining seeds", "subsets": "label subsets", "subjects": "subjects"}
        only = {
            "seeds": "this one encoder beside this one from-scratch run",
            "subsets": "this one choice of labels",
            "subjects": "these subjects",
        }
        sources = [f"{counts[source]} {names[source]}" for source in self.over]
        exclusions = [only[source] for source in only if source not in self.over]
        return f"over {_join_words(sources)}" + (f"; it speaks of {_join_words(exclusions)} only" if exclusions else "")

    def p_value(self, against: float = 0.0) -> float:
        """Two-sided p-value of the mean being `against`; below 0.05 exactly where the interval leaves it out."""
        if self.error == 0:
            return float(self.value == against)
        return float(2 * stats.t.sf(abs(self.value - against) / self.error, self.df))


@dataclass(frozen=True)
class Comparison:
    """An arm against from-scratch at one budget; `p_corrected` is for all that are made with it (Holm)."""

    arm: str
    budget: str
    difference: ConfidenceInterval
    p: float
    p_corrected: float
    verdict: ComparisonVerdict


def compute_interval(scores: Scores, limits: MetricLimits = UNBOUNDED) -> ConfidenceInterval:
    """The mean over seeds, subsets and subjects with its 95 % interval: value ± t(df) · error.

    The bootstrap over subjects gives the variance of the mean that subjects account for, times n / (n - 1), and how
    much of the scatter between seeds, between subsets and of the rest is noise of subjects too. What the observed
    scatter of seeds and subsets has above that noise is added, less what both count (their interaction), if it is
    above zero. This is the variance that the crossed bootstrap (Owen 2007, arXiv 0711.4047; Owen and Eckles 2012, doi
    10.1214/12-AOAS547) estimates, without the noise that it counts at every level and without its factor (n - 1) / n
    at each (Davison and Hinkley 1997, section 3.8). The degrees of freedom are Satterthwaite's (1946, doi
    10.2307/3002019), of the mean squares that are in it; without runs that differ, those of the subjects. Those of a
    sum are never below the fewest of its parts; taking the noise away may bring them there, and then that number
    stands. Studies with several readers are judged likewise (Hillis 2007, doi 10.1002/sim.2532).
    `benchmarks/coverage.py` measures how often the truth is inside.

    Args:
        scores: of the runs.
        limits: what the metric cannot leave; the ends are clipped to it.

    Raises:
        UserError: a single run whose subjects were not resampled.
    """
    values = scores.values[..., np.isfinite(scores.values).all(axis=(0, 1))]
    seeds, subsets, _ = values.shape
    level_sizes: dict[VarianceSource, int] = {"seeds": seeds, "subsets": subsets, "subjects": scores.subjects}
    variance_sources: tuple[VarianceSource, ...] = tuple(source for source, size in level_sizes.items() if size > 1)
    if not variance_sources:
        raise UserError("interval: expected several runs or resampled subjects, got one number. Add seeds or subsets.")
    value = float(values[..., 0].mean())
    run_scatter, noise, total = _compute_variance_components(values[..., :1]), np.zeros(3), 0.0
    if scores.subjects:
        spread = values[..., 1:] - values[..., 1:].mean(axis=-1, keepdims=True)
        spread *= math.sqrt(scores.subjects / (scores.subjects - 1))
        noise, total = _compute_variance_components(spread), float((spread.mean(axis=(0, 1)) ** 2).mean())
    excess = run_scatter - noise  # of seeds, of subsets, of both
    freedom = [size - 1 for size in level_sizes.values() if size > 1]
    df_denominator, interaction = total**2 / max(scores.subjects - 1, 1), 0.0
    if excess[0] + excess[1] > 0:
        total += float(excess[0] + excess[1])
        interaction = max(float(excess.min()), 0.0)
        df_denominator += sum(
            float(square) ** 2 / max(n - 1, 1) for square, n in zip(run_scatter, (seeds, subsets), strict=False)
        )
    error, df = math.sqrt(total - interaction), max(total**2 / df_denominator, min(freedom)) if df_denominator else 1.0
    half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
    low, high = (float(np.clip(end, *limits)) for end in (value - half, value + half))
    return ConfidenceInterval(value, low, high, error, df, variance_sources, seeds, subsets, scores.subjects)


def paired_difference(
    ours: RunStatistics,
    theirs: RunStatistics,
    subjects: Sequence[str],
    *,
    limits: MetricLimits = UNBOUNDED,
    seed: int = 0,
    resamples: int = N_RESAMPLES,
) -> ConfidenceInterval:
    """Mean difference of two arms over a grid of runs; see `compute_interval`.

    Args:
        ours: a statistic of the cases for each seed and label subset, [S][T]: weights (R, N) to values (R,).
        theirs: likewise, of the runs that ours are paired with.
        subjects: (N,) whose case it is.
        limits: what the difference cannot leave; see `get_metric_limits`.
        seed: of the draw.
        resamples: number of them.

    Raises:
        UserError: too few subjects for an interval.
        ValueError: arms of other shapes.
    """
    subject_resamples = draw_resamples(subjects, seed=seed, resamples=resamples)
    return compute_interval(compute_scores(ours, subject_resamples) - compute_scores(theirs, subject_resamples), limits)


def compare_to_scratch(
    pairs: Mapping[tuple[str, str], tuple[Scores, Scores]], limits: MetricLimits = UNBOUNDED
) -> list[Comparison]:
    """Comparisons of a study that are corrected together, each with p-value and verdict.

    A budget shows a benefit where Holm's p-value is below 0.05 and the difference above zero, harm where it is below.

    Args:
        pairs: arm and budget to the scores of the arm and of from-scratch, of a metric of which more is better.
        limits: what a difference cannot leave; see `get_metric_limits`.
    """
    differences = {key: compute_interval(ours - scratch, limits) for key, (ours, scratch) in pairs.items()}
    p = [difference.p_value() for difference in differences.values()]
    results = []
    for ((arm, budget), difference), raw_p, corrected_p in zip(
        differences.items(), p, apply_holm_correction(p), strict=True
    ):
        verdict: ComparisonVerdict = "no evidence of a benefit"
        if corrected_p < 1 - LEVEL:
            verdict = "benefit" if difference.value > 0 else "harm"
        results.append(Comparison(arm, budget, difference, raw_p, corrected_p, verdict))
    return results


def get_metric_limits(metric: str, *, difference: bool = False) -> MetricLimits:
    """What a metric, or a difference of two, cannot leave: 0 to 1, but for a distance in mm.

    Args:
        metric: its key, such as `dice` or `hd95_left`.
        difference: of two arms.
    """
    upper = math.inf if metric.startswith("hd95") else 1.0
    return (-upper if difference else 0.0, upper)


def combine_verdicts(comparisons: Sequence[Comparison]) -> ComparisonVerdict:
    """Of several budgets: harm where any shows it, else benefit where any shows it, else no evidence of a benefit."""
    verdicts = {comparison.verdict for comparison in comparisons}
    return "harm" if "harm" in verdicts else "benefit" if "benefit" in verdicts else "no evidence of a benefit"


def apply_holm_correction(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the chance of any false one stays below the level (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is below the one before, or above 1.
    Source: Scandinavian Journal of Statistics 6, 65 to 70.
    """
    order = np.argsort(p, kind="stable")
    cumulative = np.maximum.accumulate(np.asarray(p, dtype=np.float64)[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(cumulative, 1.0)
    return [float(value) for value in result]


def _compute_variance_components(values: Array) -> Array:
    """What seeds, subsets and their interaction each say of the variance of the mean: (S, T, R) to (3,), mean over R.

    Mean squares of the crossed analysis of variance over S T; 0 for a level of one.
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
