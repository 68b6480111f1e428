"""Audit section of the study page: duplicates across the split, and shortcuts that predict the label."""

from __future__ import annotations

from collections.abc import Sequence

from medim.metrics.bootstrap import MetricEstimate
from medim.reports.figures import IntervalRow, interval_plot
from medim.reports.page import (
    NOT_REPORTED,
    Banner,
    ReportSection,
    ReportTable,
    format_metric,
    format_value,
    interval_cell,
    metric_name,
    pluralise,
)
from medim.reports.svg import Figure
from medim.study.audit.audit import PIXELS
from medim.study.content import AuditContent, DuplicatePair, PredictionEntry, ShortcutEntry
from medim.study.design import SCRATCH
from medim.study.report.view import StudyView

GEOMETRY_FEATURES = ("input size", "padding")  # after preprocessing, where they should not predict the label
VISIBLE_FEATURES = (*GEOMETRY_FEATURES, "input intensity")  # accessible to a network
RAW_SIZE_FEATURE = "raw size"
MAX_NAMED_PAIRS = 10  # near-duplicates listed by name
SHORTCUT_NOTE = (
    "A classifier is given only these few numbers per image. Raw: measured on the file. Input: measured after "
    "preprocessing, on the input of the network. Models: the first run with the most labels."
)


def build_audit_section(study: StudyView) -> ReportSection:
    """Build the section: shortcuts and models, prediction of groups from features, metrics by group, duplicates."""
    audit = study.audit
    if audit is None:
        text = "This study was run by a version without the audit. Run medim study --resume to add it."
        return ReportSection("leaks", "Leakage and shortcuts", Banner("plain", NOT_REPORTED, text))
    tables = [
        _build_shortcut_table(audit),
        _build_group_table(study, audit),
        _build_probe_table(audit),
        _build_duplicate_table(audit),
        _build_pair_table(audit),
    ]
    return ReportSection(
        "leaks",
        "Leakage and shortcuts",
        _build_audit_banner(audit),
        facts=[("Groups by", list_group_columns(study) or NOT_REPORTED)],
        tables=[table for table in tables if table is not None],
        figures=_plot_aurocs(audit),
        details=[("Checks that were skipped, and notes", "\n".join(audit["notes"]))] if audit["notes"] else [],
    )


def alarming_shortcuts(study: StudyView) -> str:
    """Describe shortcuts that should not predict the label, or predict it as well as the best model; empty if none."""
    alarm_text = _format_alarm(study.audit) if study.audit else ""
    return f"{alarm_text}: see Leakage and shortcuts. " if alarm_text else ""


def format_size_auroc(study: StudyView) -> str:
    """Format the AUROC of the image size in the file, with that of the best model."""
    audit = study.audit
    if audit is None:
        return NOT_REPORTED
    sizes = [one["prediction"]["auroc"] for one in audit["shortcuts"] if one["name"] == RAW_SIZE_FEATURE]
    best = _best_model_auroc(audit)
    best_text = "" if best is None else f"; the best model {format_metric(best)}"
    return format_metric(sizes[0]) + best_text if sizes else NOT_REPORTED


def list_group_columns(study: StudyView) -> str:
    """List the columns by which metrics are grouped; empty if there are no groups."""
    return ", ".join(dict.fromkeys(one["column"] for one in (study.audit["groups"] if study.audit else ())))


def _format_alarm(audit: AuditContent) -> str:
    names = _join_predictors(_select_alarming(audit))
    return f"The label can be predicted without the image content, from {names}" if names else ""


def _join_predictors(shortcuts: Sequence[ShortcutEntry]) -> str:
    return " and ".join(f"{one['name']} (AUROC {one['prediction']['auroc']['value']:.3f})" for one in shortcuts)


def _select_hidden(audit: AuditContent) -> list[ShortcutEntry]:
    """Select the values of the files that the network does not see, but that predict the label as well as a model."""
    level = _best_model_level(audit)
    return [
        one
        for one in audit["shortcuts"]
        if one["name"] not in VISIBLE_FEATURES
        and one["prediction"]["above_chance"]
        and _reaches_level(one["prediction"]["auroc"]["value"], level)
    ]


def _best_model_level(audit: AuditContent) -> float | None:
    """Lower end of the interval of the AUROC of the best model."""
    best = _best_model_auroc(audit)
    return None if best is None else best["value"] if best["ci_low"] is None else best["ci_low"]


def _select_alarming(audit: AuditContent) -> list[ShortcutEntry]:
    level = _best_model_level(audit)
    visible = [one for one in audit["shortcuts"] if one["name"] in VISIBLE_FEATURES]
    return [
        one
        for one in visible
        if one["prediction"]["above_chance"]
        and (one["name"] in GEOMETRY_FEATURES or _reaches_level(one["prediction"]["auroc"]["value"], level))
    ]


def _reaches_level(value: float | None, level: float | None) -> bool:
    return value is not None and level is not None and value >= level


def _best_model_auroc(audit: AuditContent) -> MetricEstimate | None:
    """Find the AUROC of the best measured model."""
    aurocs = [metrics["auroc"] for metrics in audit["models"].values() if metrics.get("auroc")]
    return max((one for one in aurocs if one["value"] is not None), key=lambda one: one["value"] or 0.0, default=None)


def _build_audit_banner(audit: AuditContent) -> Banner:
    near = pluralise(len(audit["duplicates"]["near"]), "pair")
    places_text = f"Near-duplicates across the split: {near}. The audit covers only the checks listed here."
    if alarm_text := _format_alarm(audit):
        return Banner("care", alarm_text, f"The models may have learnt only this shortcut. {places_text}")
    if not audit["shortcuts"]:
        return Banner("plain", "Groups and near-duplicates", f"Shortcuts were not tested. {places_text}")
    if file_text := _join_predictors(_select_hidden(audit)):
        best = _best_model_auroc(audit)
        assert best is not None
        text = f"The best model has {format_metric(best)}. The network does not see these values: those of its input "
        text += f"predict the label less well. They show how the classes were collected. {places_text}"
        return Banner("care", f"The files predict the label as well as the best model, by {file_text}", text)
    text = "Size and padding of the network input do not predict the label better than chance"
    text += (
        f"; intensities, of the file and of the network input, predict it less well than the best model. {places_text}"
        if _best_model_auroc(audit)
        else f". {places_text}"
    )
    return Banner("good", "No shortcut found by these checks", text)


def _build_shortcut_table(audit: AuditContent) -> ReportTable | None:
    if not audit["shortcuts"]:
        return None
    head = ("Predictor", "AUROC", "Balanced accuracy", "Above chance")
    rows = [
        (
            name,
            interval_cell(format_metric(metrics["auroc"])),
            interval_cell(format_metric(metrics["balanced_accuracy"])),
            "the model",
        )
        for name, metrics in audit["models"].items()
    ]
    for one in audit["shortcuts"]:
        prediction = one["prediction"]
        rows.append(
            (
                one["name"],
                interval_cell(format_metric(prediction["auroc"])),
                interval_cell(format_metric(prediction["balanced_accuracy"])),
                _format_above_chance(prediction) if one["varies"] else "the same for all images",
            )
        )
    return ReportTable("Prediction of the label", head, rows, SHORTCUT_NOTE, wide=True)


def _plot_aurocs(audit: AuditContent) -> Sequence[Figure]:
    auroc_entries = [
        (name, metrics["auroc"], False) for name, metrics in audit["models"].items() if metrics.get("auroc")
    ]
    auroc_entries += [(one["name"], one["prediction"]["auroc"], True) for one in audit["shortcuts"]]
    rows = [
        IntervalRow(name=n, value=m["value"], low=m["ci_low"], high=m["ci_high"], second=s)
        for n, m, s in auroc_entries
        if m["value"] is not None
    ]
    if not audit["shortcuts"] or not rows:
        return ()
    return (interval_plot(rows, "AUROC of the models, and of shortcuts"),)


def _build_group_table(study: StudyView, audit: AuditContent) -> ReportTable | None:
    """Table of metrics by group, for the best-supported arm and from scratch; `audit.json` contains the other arms."""
    arm_names = {SCRATCH, study.best["arm"] if study.best else SCRATCH}
    rows = [
        (
            f"{one['column']}: {one['value']}",
            one["model"],
            format_value(one["images"]),
            format_value(one["subjects"]),
            "too few subjects"
            if one["metrics"] is None
            else interval_cell(format_metric(one["metrics"][study.metric])),
        )
        for one in audit["groups"]
        if one["model"].rpartition(", ")[0] in arm_names
    ]
    note = "Groups of fewer than five subjects are not evaluated. About one of twenty groups differs by chance."
    head = ("Group", "Model", "Images", "Subjects", metric_name(study.metric))
    return ReportTable("Metric by group", head, rows, note, wide=True) if rows else None


def _build_probe_table(audit: AuditContent) -> ReportTable | None:
    rows = [
        (
            one["column"],
            "the pixels" if one["features"] == PIXELS else one["features"],
            ", ".join(one["values"]),
            interval_cell(format_metric(one["prediction"]["auroc"])),
            _format_above_chance(one["prediction"]),
        )
        for one in audit["probes"]
    ]
    note = (
        "Frozen features of the first encoder of each arm, and principal components of the pixels. Values above chance "
        "are common; they matter if group and label are correlated."
    )
    head = ("Group", "Features", "Values", "AUROC", "Above chance")
    return ReportTable("Prediction of groups from features", head, rows, note, wide=True) if rows else None


def _build_duplicate_table(audit: AuditContent) -> ReportTable:
    duplicates = audit["duplicates"]
    rows = [
        ("Images compared", format_value(duplicates["images"])),
        ("Sets of images with the same pixels", format_value(len(duplicates["exact"]))),
        (
            f"Near-duplicate pairs (at most {duplicates['max_hamming_distance']} of 64 bits of the image hash differ)",
            format_value(len(duplicates["near"])),
        ),
        ("Images without an image hash", format_value(duplicates["n_unhashed"])),
    ]
    return ReportTable(
        "Duplicates across the split", ("", "Number"), rows, "Check the pairs: near-duplicates can be two persons."
    )


def _build_pair_table(audit: AuditContent) -> ReportTable | None:
    near = sorted(audit["duplicates"]["near"], key=_pair_sort_key)
    rows = [
        (pair["train_image"], pair["other_image"], format_value(pair["hamming_distance"]))
        for pair in near[:MAX_NAMED_PAIRS]
    ]
    rest = f"And {len(near) - MAX_NAMED_PAIRS:,} more in audit.json." if len(near) > MAX_NAMED_PAIRS else ""
    return (
        ReportTable("Near-duplicate pairs", ("Training", "Evaluation", "Differing bits"), rows, rest, wide=True)
        if rows
        else None
    )


def _pair_sort_key(pair: DuplicatePair) -> tuple[int, str, str]:
    return pair["hamming_distance"], pair["train_image"], pair["other_image"]


def _format_above_chance(prediction: PredictionEntry) -> str:
    return "yes" if prediction["above_chance"] else "no"
