"""Comparisons of every arm with the scratch arm at every budget, by `medim.study.statistics.intervals`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import cast

from medim.metrics import higher_is_better
from medim.metrics.bootstrap import Resamples, Scores, compute_scores, draw_resamples
from medim.study.content import (
    CensoredIntervalEntry,
    ComparisonRow,
    ComparisonTable,
    DifferenceEntry,
    LabelsSavedEntry,
    StudySummary,
    TimeToScratchEntry,
)
from medim.study.design import PIXELS, SCRATCH, UNTRAINED
from medim.study.results import StudyResults, find_largest_grid, open_results
from medim.study.statistics.intervals import (
    Comparison,
    ConfidenceInterval,
    combine_verdicts,
    compare_to_scratch,
    get_metric_limits,
)
from medim.study.statistics.labels_saved import (
    CensoredInterval,
    LabelsSaved,
    labels_saved,
    summary_sentence,
    time_to_level,
)
from medim.tasks.classification import TRUTH
from medim.types import UserError

ScorePairs = dict[tuple[str, str], tuple[Scores, Scores]]


def build_comparisons(folder: Path, summary: StudySummary) -> ComparisonTable | None:
    """Build the comparisons of a study from the available results; None if nothing can be compared yet.

    Args:
        folder: folder with `results.parquet`.
        summary: summary of the study; `metric` is the compared metric.

    Returns:
        `metric`, `resamples`, `overall` (verdict by arm) and `rows`: `arm`, `budget`, `n_labelled`, `value`, `scratch`,
            `difference` (value, low, high, scope), `p`, `p_corrected`, `verdict` and, if they can be computed,
            `labels_saved` and `time_to_scratch`.
    """
    try:
        results = open_results(folder, summary)
        metric = str(summary["metric"])
        resamples = _draw_study_resamples(results)
    except UserError:
        return None
    pairs: ScorePairs = {}
    for arm in (arm for arm in results.arms if arm not in (SCRATCH, UNTRAINED, PIXELS)):
        for budget in results.labelled:
            grids = results.paired_grids(metric, arm, budget)
            if grids[0]:
                pairs[arm, budget] = compute_scores(grids[0], resamples), compute_scores(grids[1], resamples)
    if not pairs:
        return None
    arm_comparisons = _compare_families(pairs, summary)
    savings = _compute_labels_saved(pairs, arm_comparisons, results, metric)
    rows: list[ComparisonRow] = []
    for comparison in arm_comparisons:
        ours, scratch = pairs[comparison.arm, comparison.budget]
        rows.append(
            {
                "arm": comparison.arm,
                "budget": comparison.budget,
                "n_labelled": results.labelled[comparison.budget],
                "value": _mean_score(ours),
                "scratch": _mean_score(scratch),
                "difference": _dump_difference(comparison.difference),
                "p": comparison.p,
                "p_corrected": comparison.p_corrected,
                "verdict": comparison.verdict,
                "labels_saved": savings.get((comparison.arm, comparison.budget)),
                "time_to_scratch": _compute_time_to_scratch(results, comparison, resamples, metric),
            }
        )
    arms = dict.fromkeys(comparison.arm for comparison in arm_comparisons)
    verdicts = {
        arm: combine_verdicts([comparison for comparison in arm_comparisons if comparison.arm == arm]) for arm in arms
    }
    return {"metric": metric, "resamples": len(resamples.counts) - 1, "overall": verdicts, "rows": rows}


def _dump_difference(difference: ConfidenceInterval) -> DifferenceEntry:
    sources = list(difference.variance_sources)
    content = {**asdict(difference), "variance_sources": sources, "scope": difference.scope_text}
    return cast(DifferenceEntry, content)


def _compare_families(pairs: ScorePairs, summary: StudySummary) -> list[Comparison]:
    metric = str(summary["metric"])
    limits, is_higher_better = get_metric_limits(metric, difference=True), higher_is_better(metric)
    families = _group_families(pairs, summary)
    return [one for f in families for one in compare_to_scratch(f, limits, higher_is_better=is_higher_better)]


def _group_families(pairs: ScorePairs, summary: StudySummary) -> list[ScorePairs]:
    """Group the comparisons that are corrected together: those of fine-tuned arms, and those of frozen arms."""
    frozen_arms = {arm["name"] for arm in summary["arms"] if arm["protocol"] == "frozen"}
    families = [
        {key: pairs[key] for key in pairs if (key[0] in frozen_arms) == is_frozen} for is_frozen in (False, True)
    ]
    return [family for family in families if family]


def _draw_study_resamples(results: StudyResults) -> Resamples:
    columns = next(iter(results.values.values()))
    return draw_resamples(results.subjects, list(columns[TRUTH]) if TRUTH in columns else None)


def _compute_labels_saved(
    pairs: ScorePairs, arm_comparisons: list[Comparison], results: StudyResults, metric: str
) -> dict[tuple[str, str], LabelsSavedEntry]:
    """Compute the labels saved by arm and budget, for arms that were measured at two or more budgets."""
    rows = {}
    for arm in dict.fromkeys(comparison.arm for comparison in arm_comparisons):
        own_comparisons = [comparison for comparison in arm_comparisons if comparison.arm == arm]
        ours, scratch = zip(*(pairs[arm, comparison.budget] for comparison in own_comparisons), strict=True)
        if not higher_is_better(metric):
            ours, scratch = (tuple(-scores for scores in side) for side in (ours, scratch))
        if len(own_comparisons) < 2 or not _has_same_runs(
            results, arm, [comparison.budget for comparison in own_comparisons]
        ):
            continue
        budgets = [float(results.labelled[comparison.budget]) for comparison in own_comparisons]
        for comparison, result in zip(own_comparisons, labels_saved(budgets, ours, scratch), strict=True):
            rows[arm, comparison.budget] = _dump_labels_saved(result, comparison)
    return rows


def _has_same_runs(results: StudyResults, arm: str, budgets: list[str]) -> bool:
    """Whether all budgets have the same seeds and subsets, except a budget of all labels; a stopped study may not."""
    subset_counts = Counter(key.rpartition("/")[0] for key in results.summary["counts"]["labels"])
    runs = {budget: results.shared_seeds(arm, budget) for budget in budgets}
    seeds = {frozenset(s for s, _ in pairs) for pairs in runs.values()}
    subsets = {frozenset(t for _, t in pairs) for budget, pairs in runs.items() if subset_counts[budget] > 1}
    return len(seeds) == 1 and len(subsets) <= 1


def _dump_labels_saved(result: LabelsSaved, comparison: Comparison) -> LabelsSavedEntry:
    return {
        "equivalent_labels": _dump_interval(result.equivalent_labels),
        "saved": _dump_interval(result.savings),
        "ratio": _dump_interval(result.ratio),
        "variance_sources": list(result.variance_sources),
        "sentence": summary_sentence(result, comparison.verdict),
    }


def _compute_time_to_scratch(
    results: StudyResults, comparison: Comparison, resamples: Resamples, metric: str
) -> TimeToScratchEntry | None:
    """Compute the steps to the final level of scratch; None without intermediate evaluations."""
    steps = results.steps(comparison.arm, comparison.budget)
    shared_seeds = find_largest_grid(
        sorted(set(results.seeds(comparison.arm, comparison.budget)) & set(results.seeds(SCRATCH, comparison.budget)))
    )
    if not steps:
        return None
    ours = [
        compute_scores(
            results.grid(metric, comparison.arm, comparison.budget, step=step, seeds=shared_seeds), resamples
        )
        for step in steps
    ]
    ours.append(compute_scores(results.grid(metric, comparison.arm, comparison.budget, seeds=shared_seeds), resamples))
    final = compute_scores(results.grid(metric, SCRATCH, comparison.budget, seeds=shared_seeds), resamples)
    level = _mean_score(final)
    if not higher_is_better(metric):
        ours, final = [-scores for scores in ours], -final
    result = time_to_level([*steps, int(results.summary["steps"])], ours, final)
    return {
        "level": level,
        "steps": _dump_interval(result.steps),
        "variance_sources": list(result.variance_sources),
    }


def _dump_interval(estimate: CensoredInterval) -> CensoredIntervalEntry:
    return cast(CensoredIntervalEntry, asdict(estimate))


def _mean_score(scores: Scores) -> float:
    return float(scores.values[..., 0].mean())
