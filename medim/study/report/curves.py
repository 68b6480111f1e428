"""Section of the study page with curves over labels, curves over steps, and calibration."""

from __future__ import annotations

import numpy as np

from medim.metrics.calibration import Calibration, compute_calibration
from medim.reports.page import Banner, ReportSection, metric_name, pluralise
from medim.reports.svg import Figure
from medim.study.design import SCRATCH
from medim.study.report import figures
from medim.study.report.view import StudyView, arm_title
from medim.study.results import RunKey
from medim.tasks.classification import TRUTH


def build_curves_section(study: StudyView) -> ReportSection:
    """Build the section: curves over labels per arm, curves over steps per arm and budget, calibration per budget."""
    others = [arm for arm in study.arms if arm != SCRATCH]
    plots = [figure for arm in others if (figure := _plot_over_labels(study, arm))]
    plots += [figure for b in study.budgets for arm in others if (figure := _plot_over_steps(study, arm, b))]
    plots += _plot_calibrations(study)
    return ReportSection(
        "curves",
        "Curves",
        Banner(
            "plain",
            pluralise(len(plots), "figure"),
            "Bands and bars are 95 % intervals; the axis of labels is logarithmic.",
        ),
        figures=plots,
    )


def _plot_over_labels(study: StudyView, arm: str) -> Figure | None:
    lines = {}
    for name in (arm, SCRATCH):
        points = [(float(n), study.get_interval(study.metric, name, b)) for b, n in study.budgets.items()]
        lines[arm_title(name)] = [(n, estimate) for n, estimate in points if estimate is not None]
    if not all(lines.values()):
        return None
    metric = _short_metric_name(study)
    return figures.plot_curves(lines, "labels", metric, f"{metric} over labels: {arm}", log=True)


def _plot_over_steps(study: StudyView, arm: str, budget: str) -> Figure | None:
    """Plot an arm and budget with intermediate evaluations over steps, and the final level of from scratch."""
    row, results = study.find_row(arm, budget), study.results
    if results is None or row is None or not row["time_to_scratch"]:
        return None
    lines = {}
    for name in (arm, SCRATCH):
        steps: list[int | None] = [*results.steps(name, budget), None]
        points = [(s or study.summary["steps"], study.get_interval(study.metric, name, budget, s)) for s in steps]
        lines[arm_title(name)] = [(float(step), estimate) for step, estimate in points if estimate is not None]
    if not all(lines.values()):
        return None
    metric, labels = _short_metric_name(study), pluralise(study.budgets[budget], "label")
    caption = f"{metric} over steps with {labels}: {arm}"
    return figures.plot_curves(lines, "steps", metric, caption, level=row["time_to_scratch"]["level"])


def _plot_calibrations(study: StudyView) -> list[Figure]:
    """Plot the calibration of the best-supported arm and of from scratch at each budget, pooled over all runs."""
    results = study.results
    if results is None or study.best is None or TRUTH not in next(iter(results.values.values())):
        return []
    plots = []
    for budget, labels in study.budgets.items():
        arms = [arm for arm in (study.best["arm"], SCRATCH) if results.seeds(arm, budget)]
        calibrations = {arm_title(arm): _compute_calibration(study, arm, budget) for arm in arms}
        lines = {name: calibration for name, calibration in calibrations.items() if calibration.ece is not None}
        if lines:
            caption = f"Calibration of the probabilities with {pluralise(labels, 'label')}"
            plots.append(figures.plot_reliability(lines, caption))
    return plots


def _compute_calibration(study: StudyView, arm: str, budget: str) -> Calibration:
    assert study.results is not None
    runs = [study.results.probabilities(RunKey(arm, budget, s, t)) for s, t in study.results.seeds(arm, budget)]
    probabilities, labels = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    return compute_calibration(probabilities, labels)


def _short_metric_name(study: StudyView) -> str:
    return metric_name(study.metric).removesuffix(", mean over classes")
