"""The curves of a study: over labels, over steps, and whether probabilities are right."""

from __future__ import annotations

import numpy as np

from medim.metrics.calibration import Calibration, calibration
from medim.reports.page import Banner, Section, many, metric_name
from medim.reports.svg import Figure
from medim.study.design import SCRATCH
from medim.study.report import figures
from medim.study.report.view import Opened, title_of
from medim.study.results import Run
from medim.study.results_table import TRUTH


def course(study: Opened) -> Section:
    """A figure an arm over labels, a figure an arm and budget over steps, calibration at each budget."""
    others = [arm for arm in study.arms if arm != SCRATCH]
    drawn = [figure for arm in others if (figure := _over_labels(study, arm))]
    drawn += [figure for b in study.budgets for arm in others if (figure := _over_steps(study, arm, b))]
    drawn += _calibrations(study)
    return Section(
        "curves",
        "Curves",
        Banner(
            "plain", many(len(drawn), "figure"), "Bands and bars are 95 % intervals; the axis of labels is logarithmic."
        ),
        figures=drawn,
    )


def _over_labels(study: Opened, arm: str) -> Figure | None:
    lines = {}
    for name in (arm, SCRATCH):
        found = [(float(n), study.interval(study.metric, name, b)) for b, n in study.budgets.items()]
        lines[title_of(name)] = [(n, one) for n, one in found if one is not None]
    if not all(lines.values()):
        return None
    metric = _short(study)
    return figures.curves(lines, "labels", metric, f"{metric} over labels: {arm}", log=True)


def _over_steps(study: Opened, arm: str, budget: str) -> Figure | None:
    """Of an arm and budget that was measured on the way, with the level that from scratch ends at."""
    row, results = study.row(arm, budget), study.results
    if results is None or row is None or not row["time_to_scratch"]:
        return None
    lines = {}
    for name in (arm, SCRATCH):
        steps: list[int | None] = [*results.steps(name, budget), None]
        found = [(s or study.summary["steps"], study.interval(study.metric, name, budget, s)) for s in steps]
        lines[title_of(name)] = [(float(step), one) for step, one in found if one is not None]
    if not all(lines.values()):
        return None
    metric, labels = _short(study), many(study.budgets[budget], "label")
    caption = f"{metric} over steps with {labels}: {arm}"
    return figures.curves(lines, "steps", metric, caption, level=row["time_to_scratch"]["level"])


def _calibrations(study: Opened) -> list[Figure]:
    """The best-supported arm and from scratch at each budget, all runs together."""
    results = study.results
    if results is None or study.best is None or TRUTH not in next(iter(results.values.values())):
        return []
    drawn = []
    for budget, labels in study.budgets.items():
        arms = [arm for arm in (study.best["arm"], SCRATCH) if results.seeds(arm, budget)]
        lines = {title_of(arm): _calibration(study, arm, budget) for arm in arms}
        drawn.append(figures.reliabilities(lines, f"Are its probabilities right, with {many(labels, 'label')}?"))
    return drawn


def _calibration(study: Opened, arm: str, budget: str) -> Calibration:
    assert study.results is not None
    runs = [study.results.probabilities(Run(arm, budget, s, t)) for s, t in study.results.seeds(arm, budget)]
    probabilities, labels = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    return calibration(probabilities, labels)


def _short(study: Opened) -> str:
    return metric_name(study.metric).removesuffix(", mean over classes")
