"""What stands on both sides of the split, and what should not matter and yet tells: the audit on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from medim.study.design import SCRATCH
from medim.study.report.view import StudyView

GEOMETRY_FEATURES = ("size as seen", "padding")  # after preprocessing, where they should tell nothing
VISIBLE_FEATURES = (*GEOMETRY_FEATURES, "intensity as seen")  # what a network can see
RAW_SIZE_FEATURE = "size as read"
MAX_NAMED_PAIRS = 10  # look-alikes that are named
SHORTCUT_NOTE = (
    "A classifier is given these few numbers of each image and nothing else. As read: of the file; as seen: of what "
    "preprocessing makes of it, which is all that a network gets. Of the models the first run with the most labels."
)


def build_audit_section(study: StudyView) -> ReportSection:
    """Shortcuts beside the models, groups that features tell, metrics by group, and look-alikes."""
    audit = study.audit
    if audit is None:
        text = "This study was run before there was an audit; medim study --resume adds it."
        return ReportSection("leaks", "Leaks and shortcuts", Banner("plain", NOT_REPORTED, text))
    tables = [
        _build_shortcut_table(audit),
        _build_group_table(study, audit),
        _build_probe_table(audit),
        _build_duplicate_table(audit),
        _build_pair_table(audit),
    ]
    return ReportSection(
        "leaks",
        "Leaks and shortcuts",
        _build_audit_banner(audit),
        facts=[("Groups by", list_group_columns(study) or NOT_REPORTED)],
        tables=[table for table in tables if table is not None],
        figures=_plot_aurocs(audit),
        details=[("What was not looked at, and how", "\n".join(audit["notes"]))] if audit["notes"] else [],
    )


def alarming_shortcuts(study: StudyView) -> str:
    """The shortcuts that should tell nothing, or tell as much as the best model; empty where there is none."""
    alarm_text = _format_alarm(study.audit or {})
    return f"{alarm_text}: see Leaks and shortcuts. " if alarm_text else ""


def format_size_auroc(study: StudyView) -> str:
    """The AUROC of the image's size as its file has it, beside the best model's."""
    audit = study.audit or {}
    sizes = [one["told"]["auroc"] for one in audit.get("shortcuts", ()) if one["name"] == RAW_SIZE_FEATURE]
    best = _best_model_auroc(audit)
    best_text = "" if best is None else f"; the best model {format_metric(best)}"
    return format_metric(sizes[0]) + best_text if sizes else NOT_REPORTED


def list_group_columns(study: StudyView) -> str:
    """What metrics are told group by group for; empty where nothing is known."""
    return ", ".join(dict.fromkeys(one["column"] for one in (study.audit or {}).get("groups", ())))


def _format_alarm(audit: dict[str, Any]) -> str:
    names = [f"{one['name']} (AUROC {one['told']['auroc']['value']:.3f})" for one in _select_alarming(audit)]
    return f"The label can be told without looking, by {' and '.join(names)}" if names else ""


def _select_alarming(audit: dict[str, Any]) -> list[dict[str, Any]]:
    best = _best_model_auroc(audit)
    level = None if best is None else best["value"] if best["ci_low"] is None else best["ci_low"]
    return [
        one
        for one in audit.get("shortcuts", ())
        if one["name"] in VISIBLE_FEATURES
        and one["told"]["above_chance"]
        and (one["name"] in GEOMETRY_FEATURES or (level is not None and one["told"]["auroc"]["value"] >= level))
    ]


def _best_model_auroc(audit: dict[str, Any]) -> dict[str, Any] | None:
    """The AUROC of the best model that was measured."""
    aurocs = [metrics["auroc"] for metrics in audit.get("models", {}).values() if metrics.get("auroc")]
    return max((one for one in aurocs if one["value"] is not None), key=lambda one: one["value"], default=None)


def _build_audit_banner(audit: dict[str, Any]) -> Banner:
    near = pluralise(len(audit["duplicates"]["near"]), "pair")
    places_text = f"Look-alikes across the split: {near}. An audit that finds nothing has looked in these places only."
    if alarm_text := _format_alarm(audit):
        return Banner("care", alarm_text, f"What a model learnt may be no more than that. {places_text}")
    if not audit["shortcuts"]:
        return Banner("plain", "Groups and look-alikes", f"No shortcut was looked for. {places_text}")
    text = "Size and padding, as a network sees them, tell no more than chance"
    text += (
        f"; intensities tell less than the best model. {places_text}"
        if _best_model_auroc(audit)
        else f". {places_text}"
    )
    return Banner("good", "No shortcut found in these places", text)


def _build_shortcut_table(audit: dict[str, Any]) -> ReportTable | None:
    if not audit["shortcuts"]:
        return None
    head = ("Known of an image", "AUROC", "Balanced accuracy", "More than chance")
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
        values = (interval_cell(format_metric(one["told"][key])) for key in ("auroc", "balanced_accuracy"))
        rows.append(
            (
                one["name"],
                *values,
                _format_above_chance(one["told"]) if one["differs"] else "the same for all images",
            )
        )
    return ReportTable("What tells the label", head, rows, SHORTCUT_NOTE, wide=True)


def _plot_aurocs(audit: dict[str, Any]) -> Sequence[Figure]:
    auroc_entries = [
        (name, metrics["auroc"], False) for name, metrics in audit["models"].items() if metrics.get("auroc")
    ]
    auroc_entries += [(one["name"], one["told"]["auroc"], True) for one in audit["shortcuts"]]
    rows = [
        IntervalRow(n, m["value"], m["ci_low"], m["ci_high"], s) for n, m, s in auroc_entries if m["value"] is not None
    ]
    if not audit["shortcuts"] or not rows:
        return ()
    return (interval_plot(rows, "AUROC of the models, and of a few numbers of each image"),)


def _build_group_table(study: StudyView, audit: dict[str, Any]) -> ReportTable | None:
    """Of the best-supported arm and from scratch; `audit.json` has the others."""
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
    note = "Groups of fewer than five subjects are counted, not measured. One of twenty groups looks odd by chance."
    head = ("Group", "Model", "Images", "Subjects", metric_name(study.metric))
    return ReportTable("Is it as good for each group?", head, rows, note, wide=True) if rows else None


def _build_probe_table(audit: dict[str, Any]) -> ReportTable | None:
    rows = [
        (
            one["column"],
            "the pixels" if one["features"] == PIXELS else one["features"],
            ", ".join(one["values"]),
            interval_cell(format_metric(one["told"]["auroc"])),
            _format_above_chance(one["told"]),
        )
        for one in audit["probes"]
    ]
    note = (
        "Frozen features of each arm's first encoder, beside principal components of the pixels. Above chance is the "
        "rule: it matters where the group goes along with the label."
    )
    head = ("Group", "Features", "Told apart", "AUROC", "More than chance")
    return ReportTable("Which groups do features tell?", head, rows, note, wide=True) if rows else None


def _build_duplicate_table(audit: dict[str, Any]) -> ReportTable:
    duplicates = audit["duplicates"]
    rows = [
        ("Images compared", format_value(duplicates["images"])),
        ("Sets of images with the same pixels", format_value(len(duplicates["exact"]))),
        (
            f"Pairs that look alike (at most {duplicates['bits']} of 64 bits apart)",
            format_value(len(duplicates["near"])),
        ),
        ("Images without a hash of their looks", format_value(duplicates["unhashed"])),
    ]
    return ReportTable(
        "On both sides of the split", ("", "Number"), rows, "Some look-alikes are two people: look at them."
    )


def _build_pair_table(audit: dict[str, Any]) -> ReportTable | None:
    near = sorted(audit["duplicates"]["near"], key=lambda pair: (pair["bits"], pair["trained"], pair["held_out"]))
    rows = [(pair["trained"], pair["held_out"], format_value(pair["bits"])) for pair in near[:MAX_NAMED_PAIRS]]
    rest = f"And {len(near) - MAX_NAMED_PAIRS:,} more in audit.json." if len(near) > MAX_NAMED_PAIRS else ""
    return (
        ReportTable("Pairs that look alike", ("Training", "Held out", "Bits apart"), rows, rest, wide=True)
        if rows
        else None
    )


def _format_above_chance(prediction: dict[str, Any]) -> str:
    return "yes" if prediction["above_chance"] else "no"
