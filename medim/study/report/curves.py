"""Section of the study page with curves over labels, curves over steps, and calibration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medim.metrics.calibration import Calibration, compute_calibration
from medim.reports.page import Banner, FoldedFigures, ReportSection, metric_name, pluralise
from medim.reports.svg import Figure
from medim.study.design import SCRATCH
from medim.study.report import figures
from medim.study.report.view import StudyView, arm_title
from medim.study.results import RunKey
from medim.tasks.classification import TRUTH

CALIBRATION = "Calibration of the probabilities"


def build_curves_section(study: StudyView) -> ReportSection:
    """Build the section: curves over steps and calibration per budget; of several arms, each over labels (folded)."""
    others = _list_other_arms(study)
    plots = [figure for budget in study.budgets if (figure := _plot_over_steps(study, budget))]
    plots += _plot_calibrations(study)
    single_plots = [figure for arm in others if (figure := plot_over_labels(study, [arm]))] if len(others) > 1 else []
    text = "Bands and bars are 95 % intervals."
    if any(figure.caption.startswith(CALIBRATION) for figure in plots):
        text += " Calibration: Wilson intervals, in which each case counts once; the numbers count predictions."
    return ReportSection(
        "curves",
        "Curves",
        Banner("plain", pluralise(len(plots) + len(single_plots), "figure"), text),
        figures=plots,
        folded=[FoldedFigures("Each arm over labels", single_plots)] if single_plots else [],
    )


def plot_over_labels(study: StudyView, arms: Sequence[str] | None = None) -> Figure | None:
    """Plot the metric of arms and of from scratch over the number of labels.

    Args:
        study: view of the study.
        arms: names of the arms; None for all.

    Returns:
        The figure; None without results of an arm and of from scratch.
    """
    lines = {}
    for name in (*(_list_other_arms(study) if arms is None else arms), SCRATCH):
        points = [(float(n), study.get_interval(study.metric, name, b)) for b, n in study.budgets.items()]
        if measured_points := [(n, estimate) for n, estimate in points if estimate is not None]:
            lines[arm_title(name)] = measured_points
    if len(lines) < 2 or arm_title(SCRATCH) not in lines:
        return None
    metric = _short_metric_name(study)
    caption = f"{metric} over labels: {'all arms' if arms is None else ', '.join(arms)}"
    return figures.plot_curves(lines, "labels", metric, caption, log=True)


def _list_other_arms(study: StudyView) -> list[str]:
    return [arm for arm in study.arms if arm != SCRATCH]


def _plot_over_steps(study: StudyView, budget: str) -> Figure | None:
    """Plot the arms with intermediate evaluations over steps, and the final level of from scratch."""
    results, rows = study.results, [study.find_row(arm, budget) for arm in _list_other_arms(study)]
    arms = [row["arm"] for row in rows if row is not None and row["time_to_scratch"]]
    if results is None or not arms:
        return None
    lines = {}
    for name in (*arms, SCRATCH):
        steps: list[int | None] = [*results.steps(name, budget), None]
        points = [(s or study.summary["steps"], study.get_interval(study.metric, name, budget, s)) for s in steps]
        if measured_points := [(float(step), estimate) for step, estimate in points if estimate is not None]:
            lines[arm_title(name)] = measured_points
    if len(lines) < 2 or arm_title(SCRATCH) not in lines:
        return None
    metric, labels = _short_metric_name(study), pluralise(study.budgets[budget], "label")
    final_level = lines[arm_title(SCRATCH)][-1][1].value
    return figures.plot_curves(lines, "steps", metric, f"{metric} over steps with {labels}", level=final_level)


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
            caption = f"{CALIBRATION} with {pluralise(labels, 'label')}"
            runs = {arm_title(arm): len(results.seeds(arm, budget)) for arm in arms}
            plots.append(figures.plot_reliability(lines, caption, runs))
    return plots


def _compute_calibration(study: StudyView, arm: str, budget: str) -> Calibration:
    assert study.results is not None
    runs = [study.results.probabilities(RunKey(arm, budget, s, t)) for s, t in study.results.seeds(arm, budget)]
    probabilities, labels = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    return compute_calibration(probabilities, labels)


def _short_metric_name(study: StudyView) -> str:
    return metric_name(study.metric).removesuffix(", mean over classes")
