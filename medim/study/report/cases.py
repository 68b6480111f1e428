"""Section of the study page with pictures of the worst cases, and the metric by subject."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from medim.migrations import read_checked_json
from medim.reports.content import WorstCasesContent
from medim.reports.figures import strip_plot
from medim.reports.page import Banner, ContactSheet, ReportSection, ReportTable, Tile, format_value, pluralise
from medim.reports.runs import describe_pictures
from medim.study.design import SCRATCH
from medim.study.report.thumbnails import WORST_CASES_FILE, case_scores
from medim.study.report.view import StudyView, arm_title
from medim.study.results import RunKey
from medim.tasks import find_task

MAX_TABLE_SUBJECTS = 10  # rows of the table


def build_cases_section(study: StudyView) -> ReportSection:
    """Build the section: pictures of the worst cases, the metric by subject, and a table of the worst subjects."""
    path = study.folder / WORST_CASES_FILE
    worst: WorstCasesContent = {"arm": None, "budget": None, "tiles": []}
    if path.is_file():
        worst = read_checked_json(path, None, WorstCasesContent)
    tiles = [Tile(tile["caption"], tile["alt"], tile["source"]) for tile in worst["tiles"]]
    task = find_task(study.summary["task"])
    metric_label, lowest_text = task.case_label, task.worst_case_text
    sheet = None
    if tiles and worst["arm"] and worst["budget"] in study.budgets:
        note = (
            f"Evaluation cases of {arm_title(worst['arm'])} with "
            f"{pluralise(study.budgets[worst['budget']], 'label')}, encoder 0, subset 0: the three {lowest_text}, "
            f"two typical ones and the best one. {describe_pictures(is_dense=task.dense)}"
        )
        sheet = ContactSheet("Worst, typical and best cases", note, tiles, large=True)
    means = _mean_by_subject(study)
    figures, tables = [], []
    if means:
        values = {arm: list(subject_means.values()) for arm, subject_means in means.items()}
        figures.append(strip_plot(values, metric_label.split(" of")[0], f"{metric_label}, by subject", dot="subject"))
        first = next(iter(means))
        order = sorted(means[first], key=lambda subject: (means[first][subject], subject))[:MAX_TABLE_SUBJECTS]
        rows = [
            (s, format_value(_count_cases(study, s)), *(f"{subject_means[s]:.3f}" for subject_means in means.values()))
            for s in order
        ]
        tables.append(
            ReportTable(f"The {pluralise(len(rows), 'subject')} {lowest_text}", ("Subject", "Cases", *means), rows)
        )
    return ReportSection(
        "cases",
        "Worst cases",
        Banner("care" if tiles else "plain", *_format_headline(study, len(tiles))),
        figures=figures,
        sheet=sheet,
        after=tables,
    )


def _format_headline(study: StudyView, count: int) -> tuple[str, str]:
    if not count:
        return "No pictures", "There is no finished model yet."
    return (
        f"{pluralise(count, 'case')} to review",
        "Review the worst cases for systematic errors. This page contains patient images: do not send it outside your "
        "site.",
    )


def _mean_by_subject(study: StudyView) -> dict[str, dict[str, float]]:
    """Mean by arm and subject, over its cases and all runs with the most labels; the best arm comes first."""
    results, means_by_arm = study.results, {}
    if results is None:
        return {}
    largest = list(study.budgets)[-1]
    best = study.best["arm"] if study.best else None
    for arm in (best, SCRATCH):
        runs = [RunKey(arm, largest, s, t) for s, t in results.seeds(arm, largest)] if arm else []
        if arm and runs:
            means = np.mean([case_scores(study, run) for run in runs], axis=0)
            scores_by_subject: dict[str, list[float]] = defaultdict(list)
            for subject, mean in zip(results.subjects, means, strict=True):
                scores_by_subject[subject].append(float(mean))
            means_by_arm[arm_title(arm)] = {
                subject: float(np.mean(scores)) for subject, scores in scores_by_subject.items()
            }
    return means_by_arm


def _count_cases(study: StudyView, subject: str) -> int:
    assert study.results is not None
    return study.results.subjects.count(subject)
