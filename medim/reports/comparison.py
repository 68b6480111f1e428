"""Report section that compares pretrained with from-scratch: both arms, and their difference on the same images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medim.evaluation.cases import read_cases
from medim.metrics import higher_is_better
from medim.metrics.bootstrap import MetricEstimate
from medim.metrics.segmentation import MISSED_NOTE
from medim.migrations import read_checked_json
from medim.reports import figures
from medim.reports.content import ComparedContent
from medim.reports.page import (
    INTERVALS_NOTE,
    Banner,
    ReportSection,
    ReportTable,
    describe_metric_rule,
    format_metric,
    interval_cell,
    metric_name,
    unit_interval_metrics,
)
from medim.tasks import find_task_of_rows
from medim.tasks.task import CaseRow
from medim.types import UserError

ARM_NAMES = ("pretrained", "scratch")
ONE_RUN_NOTE = (
    "Each arm is one run, so the difference includes the random effects of one seed and one label subset. "
    "Use medim study to measure these effects."
)


RunSummary = tuple[Path, ComparedContent]  # folder and summary


def build_comparison_section(folders: Mapping[str, Path], kinds: Mapping[str, str]) -> ReportSection | None:
    """Build the section if the folders contain both arms of one task, on the same images.

    Evaluations are compared if two of them measured the same images; otherwise fine-tuning runs on one index.

    Args:
        folders: name to folder.
        kinds: name to kind (a key of `SECTION_BUILDERS`).
    """
    for kind in ("evaluate", "finetune"):
        paths = [path for name, path in folders.items() if kinds[name] == kind]
        runs = [(path, read_checked_json(path / "summary.json", "run", ComparedContent)) for path in paths]
        arms = [[run for run in runs if run[1].get("init") == arm] for arm in ARM_NAMES]
        for pair in itertools.product(*arms):
            if pair[0][1].get("task") != pair[1][1].get("task"):
                continue
            gaps = _pair_differences(pair) if kind == "evaluate" else {}
            if gaps or (kind == "finetune" and pair[0][1].get("index_hash") == pair[1][1].get("index_hash")):
                return _render_comparison(pair, gaps)
    return None


def compute_differences(
    one: Sequence[CaseRow], two: Sequence[CaseRow], classes: Sequence[str], *, seed: int = 0
) -> dict[str, MetricEstimate]:
    """Differences of one minus two, paired by image, with intervals over subjects; empty if the images differ.

    Args:
        one: rows of an evaluation.
        two: rows of another evaluation.
        classes: class names of both.
        seed: seed of the bootstrap.
    """
    pair = [[row for row in rows if not row.get("rejected")] for rows in (one, two)]
    keys = [[(row["image"], row["class"]) for row in rows] for rows in pair]
    if keys[0] != keys[1] or not keys[0]:
        return {}
    return find_task_of_rows(pair[0]).compare_cases(pair[0], pair[1], classes, seed=seed)


def _pair_differences(pair: Sequence[RunSummary]) -> dict[str, MetricEstimate]:
    one, two = (read_cases(folder / "cases.parquet") for folder, _ in pair)
    classes = [summary["classes"] for _, summary in pair]
    if classes[0] != classes[1]:
        return {}
    try:
        return compute_differences(one, two, classes[0])
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(
            f"{pair[0][0] / 'cases.parquet'}, {pair[1][0] / 'cases.parquet'}: expected the cases of metrics.json beside"
            f" them, got others ({type(error).__name__}). Run `medim evaluate` again."
        ) from error


def _render_comparison(arms: Sequence[RunSummary], gaps: Mapping[str, MetricEstimate]) -> ReportSection:
    metrics = [_get_metrics(summary) for _, summary in arms]
    table = []
    for key in (key for key in metrics[0] if key in metrics[1]):
        sides = [metric[key] for metric in metrics]
        gap = interval_cell(_format_gap(key, gaps.get(key), sides))
        table.append((metric_name(key), *(interval_cell(format_metric(side)) for side in sides), gap))
    first_key = next(iter(metrics[0]), "")
    split_text = "the same images" if gaps else "the validation split"
    labelled = [summary.get("n_labelled") for _, summary in arms]
    budget = f" with {labelled[0]} labelled images each" if labelled[0] and labelled[0] == labelled[1] else ""
    rules = [describe_metric_rule(summary.get("task"), summary.get("val") or summary) for _, summary in arms]
    notes = " ".join([ONE_RUN_NOTE, *filter(None, dict.fromkeys(rules))])
    headline = (
        f"{metric_name(first_key)}: {_format_gap(first_key, gaps.get(first_key), [m.get(first_key) for m in metrics])}"
    )
    scores = [*unit_interval_metrics(metrics[0]), *unit_interval_metrics(metrics[1], second=True)]
    return ReportSection(
        anchor="comparison",
        title="Pretrained against scratch",
        banner=Banner("plain", headline, f"Pretrained minus scratch, on {split_text}{budget}. {notes}"),
        tables=[
            ReportTable(
                "Both arms",
                ("Metric", "Pretrained", "Scratch", "Difference"),
                table,
                _format_note(gaps, metrics),
                wide=True,
            )
        ],
        figures=[figures.interval_plot(scores, "Both arms, with their intervals", arms=ARM_NAMES)] if scores else [],
    )


def _format_note(gaps: Mapping[str, MetricEstimate], sides: Sequence[Mapping[str, Any]]) -> str:
    paired = ", paired by image" if gaps else ""
    is_missed = any(isinstance(metric, Mapping) and metric.get("missed") for side in sides for metric in side.values())
    notes = [f"Difference: pretrained minus scratch{paired}. {INTERVALS_NOTE}", *[MISSED_NOTE] * is_missed]
    return " ".join(notes)


def _get_metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    content = summary.get("metrics") or summary.get("val") or {}
    return dict(content.get("metrics", content))


def _format_gap(key: str, gap: MetricEstimate | None, sides: Sequence[Any]) -> str:
    """Format pretrained minus scratch; if the paired interval excludes zero, name the better arm."""
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
    better = "pretrained better" if (value > 0) == higher_is_better(key) else "scratch better"
    numbers = f"{value:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    return f"{numbers}, {better if low > 0 or high < 0 else 'no clear difference'}"
