"""Section of the study page with the results table: every arm at every budget."""

from __future__ import annotations

import numpy as np

from medim.metrics import find_metric, higher_is_better
from medim.metrics.segmentation import METRIC_RULE, MISSED_NOTE
from medim.reports.page import (
    Banner,
    ReportSection,
    ReportTable,
    format_value,
    interval_cell,
    metric_name,
    pluralise,
)
from medim.study.design import PIXELS, SCRATCH, UNTRAINED
from medim.study.report.format import (
    format_difference,
    format_estimate,
    format_p_value,
    format_schedule_number,
    format_span,
)
from medim.study.report.view import StudyView, arm_title

PROTOCOL_LABELS = {"finetune": "fine-tuned", "frozen": "frozen"}
TABLE_HEAD = ("Arm", "Labels", "Value", "Difference to scratch", "p", "p, Holm", "Verdict")
SAVINGS_HEAD = ("Arm", "Labels", "Equivalent labels", "Saved", "Ratio", "Steps to scratch", "Of")


def build_outcome_section(study: StudyView) -> ReportSection:
    """Build the section: value, difference, p-values and verdict by arm and budget, anchors, and learning rates."""
    name, direction = metric_name(study.metric), "Higher" if higher_is_better(study.metric) else "Lower"
    rows = [
        _build_outcome_row(study, arm, budget)
        for budget in study.budgets
        for arm in study.arms
        if _has_results(study, arm, budget)
    ]
    runs = study.results.values if study.results else {}
    n_runs = sum(run.step is None for run in runs)
    note = (
        "95 % intervals over pretraining seeds, label subsets and subjects, if each was drawn more than once. "
        "Differences are paired by seed, subset and subject. The p-value of Holm is corrected for all comparisons of "
        "fine-tuned arms, or of frozen arms. An arm with fewer encoders or subsets is compared with the from-scratch "
        "runs of the same subsets, so its difference can deviate from the difference of the two values. "
        "Frozen arms train a probe or a decoder on the unchanged encoder; untrained and pixels are baselines."
    )
    return ReportSection(
        "outcome",
        "Results by arm and budget",
        Banner("plain", name, f"{pluralise(n_runs, 'run')}, {_format_case_count(study)}. {direction} is better."),
        tables=[
            ReportTable(f"{name}, by labels and arm", TABLE_HEAD, rows, note, wide=True),
            *_build_savings_tables(study),
            *_build_metric_tables(study),
            *_build_rate_tables(study),
        ],
    )


def _has_results(study: StudyView, arm: str, budget: str) -> bool:
    return study.results is not None and bool(study.results.seeds(arm, budget))


def _build_outcome_row(study: StudyView, arm: str, budget: str) -> tuple[str, ...]:
    name = arm_title(arm) if arm == SCRATCH else f"{arm}\n({PROTOCOL_LABELS[study.get_protocol(arm)]})"
    labels = f"{study.budgets[budget]:,}" + (f"\n({budget})" if "%" in budget else "")
    first = name, labels, interval_cell(format_estimate(study.get_interval(study.metric, arm, budget)))
    comparison = study.find_row(arm, budget)
    if comparison is None:
        anchor = "reference" if arm == SCRATCH else "baseline" if arm in (UNTRAINED, PIXELS) else "not compared"
        return (*first, anchor, "–", "–", "–")
    return (
        *first,
        interval_cell(format_difference(comparison)),
        format_p_value(comparison["p"]),
        format_p_value(comparison["p_corrected"]),
        comparison["verdict"],
    )


def _build_savings_tables(study: StudyView) -> list[ReportTable]:
    """Table of the labels and steps that an arm saves."""
    rows = []
    for comparison in study.rows:
        savings, step_savings = comparison["labels_saved"], comparison["time_to_scratch"]
        labels = (
            [format_span(savings[name]) for name in ("equivalent_labels", "saved")]
            + [format_span(savings["ratio"], ".1f")]
            if savings
            else ["–"] * 3
        )
        steps = (format_span(step_savings["steps"]), f"{study.summary['steps']:,}") if step_savings else ("–", "–")
        rows.append((comparison["arm"], f"{comparison['n_labelled']:,}", *map(interval_cell, (*labels, *steps))))
    note = (
        "Equivalent labels: number of labels that from scratch needs for the same metric. Steps to scratch: first "
        "evaluated step at which the arm reaches the final metric of from scratch. Values are not extrapolated; values "
        'outside the evaluated range are given as "more than", "fewer than" or "at most".'
    )
    return [ReportTable("Labels and steps saved", SAVINGS_HEAD, rows, note, wide=True, folded=True)] if rows else []


def _build_metric_tables(study: StudyView) -> list[ReportTable]:
    """Table of the other metrics, at the largest budget."""
    if study.results is None:
        return []
    largest = list(study.budgets)[-1]
    arms = [arm for arm in study.arms if _has_results(study, arm, largest)]
    rows = [
        (
            arm_title(arm),
            metric_name(metric),
            interval_cell(
                format_estimate(study.get_interval(metric, arm, largest))
                + _format_defined_cases(study, metric, arm, largest)
            ),
            better,
        )
        for metric in study.results.metrics
        for better in ["higher" if higher_is_better(metric) else "lower"]
        for arm in arms
    ]
    caption = f"All metrics with {pluralise(study.budgets[largest], 'label')}"
    notes = [
        "A metric is undefined if neither truth nor prediction contains the class, and a distance if the truth lacks "
        "it; such cases are excluded."
    ] * any("\ncases" in row[2] for row in rows)
    matches = [match for match in map(find_metric, study.results.metrics) if match]
    has_penalty = study.summary.get("metric_rule", 1) == METRIC_RULE
    notes += [MISSED_NOTE] * (has_penalty and any(metric.is_distance for metric, _ in matches))
    head = ("Arm", "Metric", "Value", "Better")
    return [ReportTable(caption, head, rows, " ".join(notes), wide=True, folded=True)]


def _format_defined_cases(study: StudyView, metric: str, arm: str, budget: str) -> str:
    """Number of cases with a defined value, for a metric that is not defined for all cases."""
    assert study.results is not None
    runs = study.results.values.items()
    columns = [
        run_columns[metric]
        for run, run_columns in runs
        if run[:2] == (arm, budget) and run.step is None and metric in run_columns
    ]
    n_finite, total = sum(int(np.isfinite(c).sum()) for c in columns), sum(map(len, columns))
    return f"\ncases: {n_finite:,} of {total:,}" if n_finite < total else ""


def _build_rate_tables(study: StudyView) -> list[ReportTable]:
    """Table of the learning rates, and the scores used to select them."""
    rows = []
    for arm, budget_rates in study.summary["learning_rates"].items():
        for budget, rate in budget_rates.items():
            scores = ", ".join(f"× {m}: {'failed' if s is None else f'{s:.3f}'}" for m, s in rate["scores"].items())
            rate_text = "not yet" if rate["lr"] is None else f"{rate['lr']:.3g}"
            reason = study.summary.get("no_lr_selection", {}).get(budget)
            rate_source = "selected" if rate["from"] == "selection" else f"fixed{f': {reason}' if reason else ''}"
            factor = "" if rate["multiple"] is None else f"\n(× {format_schedule_number(rate['multiple'])})"
            rows.append((arm_title(arm), budget, rate_text + factor, rate_source, scores or "–"))
    note = (
        "Selected once for each arm and budget, on its first subset: a fifth of its subjects is used for validation, "
        "so the labels used for selection are part of the budget. The evaluation split is not used."
    )
    head = ("Arm", "Budget", "Learning rate", "Selection", "Validation scores")
    return [ReportTable("Learning rates", head, rows, note, wide=True, folded=True)] if rows else []


def _format_case_count(study: StudyView) -> str:
    if study.results is None:
        return format_value(None)
    count = len(set(study.results.subjects))
    return f"{pluralise(len(study.results.cases), 'case')} of {pluralise(count, 'subject')}"
