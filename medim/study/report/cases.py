"""The worst cases of a study with pictures, and its metric by subject."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from medim.files import read_json
from medim.reports.figures import strips
from medim.reports.page import Banner, Section, Sheet, Table, Tile, many, told
from medim.study.design import SCRATCH
from medim.study.report.thumbnails import CONTOURS, WORST, case_scores
from medim.study.report.view import Opened, title_of
from medim.study.results import Run

MOST = 10  # subjects in the table


def cases(study: Opened) -> Section:
    """Pictures of the worst cases, a dot a subject, and the worst subjects."""
    path = study.folder / WORST
    worst = read_json(path) if path.is_file() else {"arm": None, "budget": None, "tiles": []}
    tiles = [Tile(tile["caption"], tile["alt"], tile["source"]) for tile in worst["tiles"]]
    name = "Dice" if study.summary["task"] == "segmentation" else "Probability of the true class"
    lowest = "with the lowest Dice" if name == "Dice" else "whose true class got the lowest probability"
    sheet = None
    if tiles:
        parts = [
            f"The {many(len(tiles), 'evaluation case')} {lowest}, of {title_of(worst['arm'])} with "
            f"{many(study.budgets[worst['budget']], 'label')}, encoder 0, subset 0.",
            f"{CONTOURS.capitalize()}." if name == "Dice" else "",
            "Volumes by an axial slice, of masks the largest; the patient's right is on the left.",
            "Patient images: they stay on site.",
        ]
        note = " ".join(filter(None, parts))
        sheet = Sheet("Worst cases", note, tiles)
    means = _by_subject(study)
    figures, tables = [], []
    if means:
        values = {arm: list(found.values()) for arm, found in means.items()}
        figures.append(strips(values, name.split(" of")[0], f"{name}, by subject", dot="subject"))
        first = next(iter(means))
        order = sorted(means[first], key=lambda subject: (means[first][subject], subject))[:MOST]
        rows = [(s, told(_count(study, s)), *(f"{found[s]:.3f}" for found in means.values())) for s in order]
        tables.append(Table(f"The {many(len(rows), 'subject')} {lowest}", ("Subject", "Cases", *means), rows))
    return Section(
        "cases",
        "Worst cases",
        Banner("care" if tiles else "plain", *_said(study, len(tiles))),
        figures=figures,
        sheet=sheet,
        after=tables,
    )


def _said(study: Opened, count: int) -> tuple[str, str]:
    if not count:
        return "No pictures", "No model whose cases could be shown is done yet."
    return (
        f"{many(count, 'case')} to look at",
        "What a model does worst says more of it than its mean. This page holds images of patients: it stays on site.",
    )


def _by_subject(study: Opened) -> dict[str, dict[str, float]]:
    """Arm to subject to the mean over its cases and all runs with the most labels; the best arm first."""
    results, found = study.results, {}
    if results is None:
        return {}
    largest = list(study.budgets)[-1]
    best = study.best["arm"] if study.best else None
    for arm in (best, SCRATCH):
        runs = [Run(arm, largest, s, t) for s, t in results.seeds(arm, largest)] if arm else []
        if arm and runs:
            means = np.mean([case_scores(study, run) for run in runs], axis=0)
            of: dict[str, list[float]] = defaultdict(list)
            for subject, mean in zip(results.subjects, means, strict=True):
                of[subject].append(float(mean))
            found[title_of(arm)] = {subject: float(np.mean(own)) for subject, own in of.items()}
    return found


def _count(study: Opened, subject: str) -> int:
    assert study.results is not None
    return study.results.subjects.count(subject)
