"""Report sections of a run or an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medim.config import read_yaml_mapping
from medim.data.contamination import describe_counts
from medim.evaluation.case_pictures import PICTURES_FILE
from medim.evaluation.cases import read_cases
from medim.migrations import read_checked_json
from medim.parsing import MAX_YAML_BYTES, read_text
from medim.renamed_keys import translate_config
from medim.reports import figures
from medim.reports.content import EvaluationContent, FinetuneContent, PicturesContent, PretrainContent
from medim.reports.history_rows import LossRecord, read_history_rows
from medim.reports.methods import describe_finetuning, describe_pretraining
from medim.reports.page import (
    INTERVALS_NOTE,
    MODALITY_TEXTS,
    NOT_REPORTED,
    Banner,
    ContactSheet,
    ReportSection,
    ReportTable,
    Tile,
    count_table,
    describe_metric_rule,
    format_bytes,
    format_metric,
    format_recall,
    format_value,
    metric_name,
    metric_table,
    pluralise,
    unit_interval_metrics,
)
from medim.reports.svg import Figure
from medim.reports.training_curves import VERDICT_BANNERS, plot_health
from medim.tasks import find_task_by_title
from medim.tasks.task import AgreementPlot, Plot, RocPlot, StripPlot
from medim.types import UserError


def build_pretraining_section(folder: Path, anchor: str) -> ReportSection:
    """Build the section of a pretraining run: verdict, losses with their chance levels, health of the features."""
    summary = read_checked_json(folder / "summary.json", "run", PretrainContent)
    losses, chance = summary.get("loss", {}), summary.get("chance", {})
    weights = summary.get("objectives", {})
    rows = [
        (
            name,
            format_value(weights.get(name)),
            *(format_value(loss.get(part)) for part in ("first", "last", "val")),
            _format_chance(chance.get(name)),
        )
        for name, loss in losses.items()
    ]
    verdict, selection = str(summary.get("verdict")), summary.get("checkpoint_selection")
    facts = [
        ("Steps", format_value(summary.get("steps"))),
        ("Input", format_value(summary.get("input_shape"))),
        ("Effective rank (RankMe)", format_value(summary.get("rankme"))),
        ("Feature spread (1: even, 0: collapsed)", format_value(summary.get("feature_std"))),
        ("Probe on validation subjects", _format_probe_result(summary.get("probe"))),
        ("Encoder saved from step", format_value(selection and selection["step"])),
        ("Seconds per step", format_value(summary.get("seconds_per_step"))),
        ("Time spent waiting for data", _format_percent(summary.get("dataloader_wait_fraction"))),
        *_machine_facts(summary),
    ]
    curves = read_history(folder / "history.csv", [name for name in losses if "/" not in name])
    return ReportSection(
        anchor=anchor,
        title=f"Pretraining: {folder.name}",
        banner=VERDICT_BANNERS.get(verdict, Banner("plain", verdict, "Unknown verdict.")),
        data=_describe_data(folder, summary.get("index_hash")),
        facts=facts,
        paragraphs=[*_selection_paragraphs(selection), *_advice_paragraphs(summary)],
        tables=[
            ReportTable(
                "Losses", ("Objective", "Weight", "First", "Last", "Validation", "Chance level"), rows, wide=True
            )
        ],
        figures=[*(figures.loss_curve(curve) for curve in curves), *plot_health(folder / "history.csv")],
        details=[
            *_methods_details(_describe_run(describe_pretraining, folder, summary)),
            *_config_details(folder),
            _list_values(summary),
        ],
    )


def build_finetuning_section(folder: Path, anchor: str) -> ReportSection:
    """Build the section of a fine-tuning run: initial weights, label budget and validation metrics."""
    summary = read_checked_json(folder / "summary.json", "run", FinetuneContent)
    validation = summary.get("val") or {}
    metrics = validation.get("metrics", validation)
    start = {"pretrained": "pretrained weights", "scratch": "fresh weights (from scratch)"}.get(
        str(summary.get("init"))
    )
    facts = [
        ("Task", format_value(summary.get("task"))),
        ("Started from", format_value(start)),
        ("Labelled images used", format_value(summary.get("n_labelled"))),
        *_selection_label_facts(summary),
        ("Images excluded (no label)", format_value(summary.get("n_unlabelled"))),
        ("Validation images", _format_image_counts(validation)),
        *_metric_rule_facts(summary.get("task"), validation),
        *_lost_class_facts(summary),
        *_contamination_facts(summary),
        ("Steps", format_value(summary.get("steps"))),
        *_machine_facts(summary),
    ]
    plots = [figures.loss_curve(curve) for curve in read_history(folder / "history.csv", ["loss"])]
    scores = unit_interval_metrics(metrics)
    if scores:
        plots.append(figures.interval_plot(scores, "Validation split"))
    return ReportSection(
        anchor=anchor,
        title=f"Fine-tuning: {folder.name}",
        banner=_add_lost_classes(
            _build_headline(metrics, f"on the validation split, from {format_value(start)}"), summary
        ),
        data=_describe_data(
            folder,
            summary.get("index_hash"),
            f"{pluralise(summary.get('n_labelled'), 'labelled image')} for training, "
            f"{_format_image_counts(validation)} for validation",
        ),
        facts=facts,
        tables=[metric_table(metrics, "Validation split", INTERVALS_NOTE)] if metrics else [],
        figures=plots,
        details=[
            *_methods_details(_describe_run(describe_finetuning, folder, summary)),
            *_config_details(folder),
            _list_values(summary),
        ],
    )


def build_evaluation_section(folder: Path, anchor: str) -> ReportSection:
    """Build the section of an evaluation: metrics, excluded subjects, and results per case."""
    summary = read_checked_json(folder / "metrics.json", "run", EvaluationContent)
    rows = read_cases(folder / "cases.parquet")
    metrics, classes = summary["metrics"], summary["classes"]
    valid_rows = [row for row in rows if not row.get("rejected")]
    split = {"all": "all labelled images", "val": "the validation split", "train": "the training split"}.get(
        summary["split"], f"the {summary['split']} split"
    )
    facts = [
        ("Task", format_value(summary.get("task"))),
        ("Images", _format_image_counts(summary)),
        ("Split", split),
        ("Subjects excluded (in the training data)", format_value(summary.get("n_excluded_subjects"))),
        *_contamination_facts(summary),
        *_selection_label_facts(summary),
        ("Rejected images", format_value(summary.get("rejected"))),
        *_metric_rule_facts(summary.get("task"), summary),
        ("Model started from", format_value(summary.get("init"))),
    ]
    task = find_task_by_title(str(summary.get("task")))
    try:
        details = task.describe_evaluation(valid_rows, classes)
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / 'cases.parquet'}: expected the cases of metrics.json beside it, got others "
            f"({type(error).__name__}). Run `medim evaluate` again."
        ) from error
    scores = unit_interval_metrics(metrics)
    plots = [figures.interval_plot(scores, "Metrics with their intervals")] if scores else []
    plots += [draw_plot(plot, metrics) for plot in details.plots]
    after = [ReportTable(table.caption, table.head, table.rows) for table in details.tables]
    rejections = Counter(str(row["rejected"]) for row in rows if row.get("rejected"))
    if rejections:
        after.append(count_table("Rejected images", "Reason", rejections))
    return ReportSection(
        anchor=anchor,
        title=f"Evaluation: {folder.name}",
        banner=_build_headline(metrics, f"on {split}, {_format_image_counts(summary)}"),
        data=_describe_data(folder, summary.get("index_hash"), f"{_format_image_counts(summary)}, {split}"),
        facts=facts,
        tables=[metric_table(metrics, "Metrics, in each image's own space", INTERVALS_NOTE)],
        figures=plots,
        sheet=_build_case_sheet(folder, is_dense=task.dense),
        after=after,
        details=[_list_values({key: value for key, value in summary.items() if key != "metrics"})],
    )


def _build_case_sheet(folder: Path, *, is_dense: bool) -> ContactSheet | None:
    """Build the sheet of the worst, typical and best cases; None for an evaluation without pictures."""
    path = folder / PICTURES_FILE
    if not path.is_file():
        return None
    pictures = read_checked_json(path, None, PicturesContent)["pictures"]
    tiles = [Tile(picture["caption"], picture["alt"], picture["source"]) for picture in pictures]
    return ContactSheet("Worst, typical and best cases", describe_pictures(is_dense=is_dense), tiles, large=True)


def describe_pictures(*, is_dense: bool) -> str:
    """Describe the pictures of cases: slices, contours, and that they are patient images."""
    contours = "Slices through the largest area of the label; above the label, below the prediction. "
    return (
        f"{contours if is_dense else ''}The patient's right is on the left; in a sagittal slice the front is on the "
        "left. This page contains patient images: do not send it outside your site."
    )


def build_unfinished_section(folder: Path, anchor: str) -> ReportSection:
    """Build the section of a run without a summary."""
    text = "There is no summary.json: the run is still in progress, or it was stopped. Continue it with --resume."
    return ReportSection(anchor, f"Unfinished: {folder.name}", Banner("bad", "Not finished", text))


def read_history(path: Path, names: Sequence[str]) -> list[figures.LossCurve]:
    """Read the curves of `history.csv`, in the order of `names`.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return []
    rows: dict[str, list[LossRecord]] = {name: [] for name in names}
    for row in read_history_rows(path):
        if row.name in rows:
            rows[row.name].append(row)
    return [
        _build_curve(name, name_rows)
        for name, name_rows in rows.items()
        if any(row.loss is not None for row in name_rows)
    ]


def _build_curve(name: str, rows: Sequence[LossRecord]) -> figures.LossCurve:
    losses = [(row.step, row.loss) for row in rows if row.loss is not None]
    levels = [row.chance for row in rows if row.chance is not None]
    return figures.LossCurve(
        name=name,
        steps=np.array([step for step, _ in losses]),
        loss=np.array([loss for _, loss in losses]),
        val=[(row.step, row.val) for row in rows if row.val is not None],
        chance=levels[-1] if levels else None,
    )


def draw_plot(plot: Plot, metrics: Mapping[str, Any]) -> Figure:
    """Draw a plot of an evaluation."""
    if isinstance(plot, StripPlot):
        return figures.strip_plot(plot.values, plot.label, plot.title)
    if isinstance(plot, RocPlot):
        return figures.roc_curve(plot.curves, plot.title)
    if isinstance(plot, AgreementPlot):
        return figures.volume_scatter(plot.truth, plot.predicted, plot.title, plot.quantity)
    ece = metrics.get("ece", {}).get("value")
    return figures.reliability_diagram(plot.confidence, plot.is_correct, ece, plot.title)


def _build_headline(metrics: Mapping[str, Any], split_text: str) -> Banner:
    first_key = next(iter(metrics), None)
    if first_key is None:
        return Banner("care", "No metrics", "This run has no metrics.")
    return Banner("plain", f"{metric_name(first_key)}: {format_metric(metrics[first_key])}", f"Measured {split_text}.")


def _add_lost_classes(banner: Banner, summary: Mapping[str, Any]) -> Banner:
    """Add the classes that a model does not find to its headline."""
    lost = summary.get("lost_classes")
    if not lost:
        return banner
    text = f"{banner.text} The model finds hardly anything of: {', '.join(lost)}. It probably needs more steps."
    return replace(banner, state="care", text=text)


def _metric_rule_facts(task: object, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metric rule, if it is that of an earlier version."""
    text = describe_metric_rule(task, summary)
    return [("Metric rule", text)] if text else []


def _lost_class_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Classes that the model does not find, with the fraction of their labels; nothing for results of old versions."""
    if "lost_classes" not in summary:
        return []
    lost = [f"{name} ({format_recall(recall)} of its labels)" for name, recall in summary["lost_classes"].items()]
    return [("Classes that the model does not find", ", ".join(lost) or "none")]


def _contamination_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts of evaluated images that were part of the training data."""
    return [(name.capitalize(), text) for name, text in describe_counts(summary.get("contamination")).items()]


def _selection_label_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Number of labels that selected the step of the encoder; nothing for fresh weights and results of old versions."""
    if summary.get("init") != "pretrained" or "n_selection_labels" not in summary:
        return []
    return [("Labels that selected the encoder's step", format_value(summary["n_selection_labels"]))]


def _format_image_counts(counts: Mapping[str, Any]) -> str:
    return f"{pluralise(counts.get('n'), 'image')} of {pluralise(counts.get('subjects'), 'subject')}"


def _machine_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Peak memory", format_bytes(summary.get("peak_memory_bytes"))),
        ("Device", format_value(summary.get("device"))),
        ("Config", str(summary.get("config_hash"))[:12]),
        ("Condition (--where)", str(summary.get("where") or "none")),
        ("Index", str(summary.get("index_hash"))[:12]),
    ]


def _format_chance(level: float | None) -> str:
    return "none" if level is None else format_value(level)


def _format_percent(value: float | None) -> str:
    return format_value(None) if value is None else f"{100 * value:.0f} %"


def _format_probe_result(probe: Mapping[str, Any] | None) -> str:
    return format_value(None) if not probe else f"{probe['value']:.3f} {probe['metric']}, {probe['protocol']}"


def _selection_paragraphs(selection: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [("Choice of the saved step", str(selection["reason"]))] if selection else []


def _advice_paragraphs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("Advice", str(summary["advice"]))] if summary.get("advice") else []


def _describe_data(folder: Path, index_hash: object, counts: str = "") -> str:
    """Describe the images of a run or evaluation: modality, counts and index."""
    modality = MODALITY_TEXTS.get(str(_read_config(folder).get("modality")), "")
    index = f"index {index_hash[:12]}" if isinstance(index_hash, str) else ""
    return "; ".join(filter(None, (modality, counts, index))) or NOT_REPORTED


def _describe_run(
    describe: Callable[[Mapping[str, Any], Mapping[str, Any]], str], folder: Path, summary: Mapping[str, Any]
) -> str:
    """Describe the methods of a run, and the condition that selected its images.

    Raises:
        UserError: the configuration is damaged.
    """
    try:
        text = describe(_read_config(folder), summary)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.yaml'}: expected the configuration of a run, got other values. Copy it again."
        ) from error
    where = summary.get("where")
    return f"{text} Images were selected by the condition {where} (--where)." if text and where else text


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.yaml"
    return translate_config(read_yaml_mapping(path), warn=False) if path.is_file() else {}


def _methods_details(text: str) -> list[tuple[str, str]]:
    return [("Methods paragraph for a paper", text)] if text else []


def _config_details(folder: Path) -> list[tuple[str, str]]:
    path = folder / "config.yaml"
    return [("Configuration", read_text(path, MAX_YAML_BYTES))] if path.is_file() else []


def _list_values(summary: Mapping[str, Any]) -> tuple[str, str]:
    lines = [f"{key}: {format_value(value)}" for key, value in summary.items()]
    return "All recorded values", "\n".join(lines)
