"""Pretrained against scratch: the two arms side by side, and their difference where the same images were measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medim.evaluation.cases import Row, class_arrays, finding_arrays, read_cases
from medim.files import read_json
from medim.metrics.bootstrap import Metric, bootstrap, mean_over_subjects
from medim.metrics.classification import classification_statistics
from medim.metrics.multi_label import RANKINGS, mean_ranking
from medim.metrics.ranking import Statistic
from medim.reports import figures
from medim.reports.page import (
    INTERVALS,
    Banner,
    Section,
    Table,
    cell,
    lower_is_better,
    metric_name,
    metric_text,
    shares,
)

ARMS = ("pretrained", "scratch")
ONE_RUN = "One run each: the difference holds the luck of one seed and one choice of labels. medim study measures that."


Arm = tuple[Path, dict[str, Any]]  # folder and summary


def compare(folders: Mapping[str, Path], kinds: Mapping[str, str]) -> Section | None:
    """A section where both arms of one task are among the folders, on the same images.

    Evaluations are taken where two of them measured the same images; else fine-tuning runs on one index.

    Args:
        folders: name to folder.
        kinds: name to kind (see `SECTIONS`).
    """
    for kind in ("evaluate", "finetune"):
        runs = [(path, read_json(path / "summary.json")) for name, path in folders.items() if kinds[name] == kind]
        arms = [[run for run in runs if run[1].get("init") == arm] for arm in ARMS]
        for pair in itertools.product(*arms):
            if pair[0][1].get("task") != pair[1][1].get("task"):
                continue
            gaps = _paired(pair) if kind == "evaluate" else {}
            if gaps or (kind == "finetune" and pair[0][1].get("index_hash") == pair[1][1].get("index_hash")):
                return _section(pair, gaps)
    return None


def differences(one: Sequence[Row], two: Sequence[Row], classes: Sequence[str], *, seed: int = 0) -> dict[str, Metric]:
    """One minus two, paired by image, with intervals over subjects; empty where the images are not the same.

    Args:
        one: rows of an evaluation.
        two: rows of another.
        classes: of both.
        seed: of the bootstrap.
    """
    pair = [[row for row in rows if not row.get("rejected")] for rows in (one, two)]
    keys = [[(row["image"], row["class"]) for row in rows] for rows in pair]
    if keys[0] != keys[1] or not keys[0]:
        return {}
    subjects = [row["subject"] for row in pair[0][:: len(classes)]]
    if "probability" not in pair[0][0]:
        found = {}
        for metric in ("dice", "hd95", "surface_dice"):
            for place, name in enumerate(classes):
                sides = ([row[metric] for row in rows[place :: len(classes)]] for rows in pair)
                gaps = [None if a is None or b is None else a - b for a, b in zip(*sides, strict=True)]
                found[f"{metric}_{name}"] = mean_over_subjects(gaps, subjects, seed=seed)
        means = [
            np.mean([[r["dice"] for r in rows[k :: len(classes)]] for k in range(len(classes))], axis=0)
            for rows in pair
        ]
        return {"dice": mean_over_subjects(list(means[0] - means[1]), subjects, seed=seed), **found}
    statistics = [_statistics(rows, classes) for rows in pair]
    return {
        name: bootstrap(lambda w, a=first, b=statistics[1][name]: a(w) - b(w), subjects, seed=seed)  # type: ignore[misc]
        for name, first in statistics[0].items()
    }


def _statistics(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, Statistic]:
    if "prediction" in rows[0]:
        return classification_statistics(*class_arrays(rows, classes))
    told = finding_arrays(rows, classes)
    return {name: mean_ranking(ranking, *told) for name, ranking in RANKINGS.items()}


def _paired(pair: Sequence[Arm]) -> dict[str, Metric]:
    one, two = (read_cases(folder / "cases.parquet") for folder, _ in pair)
    classes = [summary["classes"] for _, summary in pair]
    return differences(one, two, classes[0]) if classes[0] == classes[1] else {}


def _section(arms: Sequence[Arm], gaps: Mapping[str, Metric]) -> Section:
    metrics = [_metrics(summary) for _, summary in arms]
    table = []
    for key in (key for key in metrics[0] if key in metrics[1]):
        sides = [metric[key] for metric in metrics]
        gap = cell(_gap(key, gaps.get(key), sides))
        table.append((metric_name(key), *(cell(metric_text(side)) for side in sides), gap))
    first = next(iter(metrics[0]), "")
    where = "the same images" if gaps else "the validation split"
    labelled = [summary.get("labelled") for _, summary in arms]
    budget = f" with {labelled[0]} labelled images each" if labelled[0] and labelled[0] == labelled[1] else ""
    headline = f"{metric_name(first)}: {_gap(first, gaps.get(first), [m.get(first) for m in metrics])}"
    return Section(
        anchor="comparison",
        title="Pretrained against scratch",
        banner=Banner("plain", headline, f"Pretrained minus scratch, on {where}{budget}. {ONE_RUN}"),
        tables=[
            Table(
                "Both arms",
                ("Metric", "Pretrained", "Scratch", "Difference"),
                table,
                _note(gaps),
                wide=True,
            )
        ],
        figures=[
            figures.intervals(
                [*shares(metrics[0]), *shares(metrics[1], second=True)], "Both arms, with their intervals", arms=ARMS
            )
        ],
    )


def _note(gaps: Mapping[str, Metric]) -> str:
    paired = ", paired by image" if gaps else ""
    return f"Difference: pretrained minus scratch{paired}. {INTERVALS}"


def _metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    content = summary.get("metrics") or summary.get("val") or {}
    return dict(content.get("metrics", content))


def _gap(key: str, gap: Metric | None, sides: Sequence[Any]) -> str:
    """Pretrained minus scratch, and whom a paired interval without zero favours."""
    values = [side.get("value") if isinstance(side, Mapping) else side for side in sides]
    if gap is None:
        return (
            "not defined"
            if None in values
            else f"{float(values[0] or 0.0) - float(values[1] or 0.0):+.3f}".replace("-", "−")
        )
    value, low, high = gap["value"], gap["ci_low"], gap["ci_high"]
    if value is None:
        return "not defined"
    if low is None or high is None:
        return f"{value:+.3f}".replace("-", "−")
    better = "pretrained better" if (value < 0) == lower_is_better(key) else "scratch better"
    numbers = f"{value:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    return f"{numbers}, {better if low > 0 or high < 0 else 'no clear difference'}"
