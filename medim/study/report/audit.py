"""What stands on both sides of the split, and what should not matter and yet tells: the audit on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medim.reports.figures import Interval, intervals
from medim.reports.page import (
    NOT_REPORTED,
    Banner,
    Section,
    Table,
    cell,
    many,
    metric_name,
    metric_text,
    told,
)
from medim.reports.svg import Figure
from medim.study.audit.audit import PIXELS
from medim.study.design import SCRATCH
from medim.study.report.view import Opened

GEOMETRY = ("size as seen", "padding")  # after preprocessing, where they should tell nothing
VISIBLE = (*GEOMETRY, "intensity as seen")  # what a network can see
SIZE = "size as read"
PAIRS = 10  # look-alikes that are named
NOTE = (
    "A classifier is given these few numbers of each image and nothing else. As read: of the file; as seen: of what "
    "preprocessing makes of it, which is all that a network gets. Of the models the first run with the most labels."
)


def leaks(study: Opened) -> Section:
    """Shortcuts beside the models, groups that features tell, metrics by group, and look-alikes."""
    found = study.audit
    if found is None:
        text = "This study was run before there was an audit; medim study --resume adds it."
        return Section("leaks", "Leaks and shortcuts", Banner("plain", NOT_REPORTED, text))
    tables = [_shortcuts(found), _groups(study, found), _probes(found), _duplicates(found), _pairs(found)]
    return Section(
        "leaks",
        "Leaks and shortcuts",
        _banner(found),
        facts=[("Groups by", columns(study) or NOT_REPORTED)],
        tables=[table for table in tables if table is not None],
        figures=_figures(found),
        details=[("What was not looked at, and how", "\n".join(found["notes"]))] if found["notes"] else [],
    )


def alarm(study: Opened) -> str:
    """The shortcuts that should tell nothing, or tell as much as the best model; empty where there is none."""
    said = _said(study.audit or {})
    return f"{said}: see Leaks and shortcuts. " if said else ""


def size_alone(study: Opened) -> str:
    """The AUROC of the image's size as its file has it, beside the best model's."""
    found = study.audit or {}
    sizes = [one["told"]["auroc"] for one in found.get("shortcuts", ()) if one["name"] == SIZE]
    best = _best(found)
    beside = "" if best is None else f"; the best model {metric_text(best)}"
    return metric_text(sizes[0]) + beside if sizes else NOT_REPORTED


def columns(study: Opened) -> str:
    """What metrics are told group by group for; empty where nothing is known."""
    return ", ".join(dict.fromkeys(one["column"] for one in (study.audit or {}).get("groups", ())))


def _said(found: dict[str, Any]) -> str:
    names = [f"{one['name']} (AUROC {one['told']['auroc']['value']:.3f})" for one in _alarming(found)]
    return f"The label can be told without looking, by {' and '.join(names)}" if names else ""


def _alarming(found: dict[str, Any]) -> list[dict[str, Any]]:
    best = _best(found)
    level = None if best is None else best["value"] if best["ci_low"] is None else best["ci_low"]
    return [
        one
        for one in found.get("shortcuts", ())
        if one["name"] in VISIBLE
        and one["told"]["above_chance"]
        and (one["name"] in GEOMETRY or (level is not None and one["told"]["auroc"]["value"] >= level))
    ]


def _best(found: dict[str, Any]) -> dict[str, Any] | None:
    """The AUROC of the best model that was measured."""
    known = [metrics["auroc"] for metrics in found.get("models", {}).values() if metrics.get("auroc")]
    return max((one for one in known if one["value"] is not None), key=lambda one: one["value"], default=None)


def _banner(found: dict[str, Any]) -> Banner:
    near = many(len(found["duplicates"]["near"]), "pair")
    places = f"Look-alikes across the split: {near}. An audit that finds nothing has looked in these places only."
    if said := _said(found):
        return Banner("care", said, f"What a model learnt may be no more than that. {places}")
    if not found["shortcuts"]:
        return Banner("plain", "Groups and look-alikes", f"No shortcut was looked for. {places}")
    text = "Size and padding, as a network sees them, tell no more than chance"
    text += f"; intensities tell less than the best model. {places}" if _best(found) else f". {places}"
    return Banner("good", "No shortcut found in these places", text)


def _shortcuts(found: dict[str, Any]) -> Table | None:
    if not found["shortcuts"]:
        return None
    head = ("Known of an image", "AUROC", "Balanced accuracy", "More than chance")
    rows = [
        (name, cell(metric_text(metrics["auroc"])), cell(metric_text(metrics["balanced_accuracy"])), "the model")
        for name, metrics in found["models"].items()
    ]
    for one in found["shortcuts"]:
        values = (cell(metric_text(one["told"][key])) for key in ("auroc", "balanced_accuracy"))
        rows.append((one["name"], *values, _above(one["told"]) if one["differs"] else "the same for all images"))
    return Table("What tells the label", head, rows, NOTE, wide=True)


def _figures(found: dict[str, Any]) -> Sequence[Figure]:
    named = [(name, metrics["auroc"], False) for name, metrics in found["models"].items() if metrics.get("auroc")]
    named += [(one["name"], one["told"]["auroc"], True) for one in found["shortcuts"]]
    rows = [Interval(n, m["value"], m["ci_low"], m["ci_high"], s) for n, m, s in named if m["value"] is not None]
    if not found["shortcuts"] or not rows:
        return ()
    return (intervals(rows, "AUROC of the models, and of a few numbers of each image"),)


def _groups(study: Opened, found: dict[str, Any]) -> Table | None:
    """Of the best-supported arm and from scratch; `audit.json` has the others."""
    shown = {SCRATCH, study.best["arm"] if study.best else SCRATCH}
    rows = [
        (
            f"{one['column']}: {one['value']}",
            one["model"],
            told(one["images"]),
            told(one["subjects"]),
            "too few subjects" if one["metrics"] is None else cell(metric_text(one["metrics"][study.metric])),
        )
        for one in found["groups"]
        if one["model"].rpartition(", ")[0] in shown
    ]
    note = "Groups of fewer than five subjects are counted, not measured. One of twenty groups looks odd by chance."
    head = ("Group", "Model", "Images", "Subjects", metric_name(study.metric))
    return Table("Is it as good for each group?", head, rows, note, wide=True) if rows else None


def _probes(found: dict[str, Any]) -> Table | None:
    rows = [
        (
            one["column"],
            "the pixels" if one["features"] == PIXELS else one["features"],
            ", ".join(one["values"]),
            cell(metric_text(one["told"]["auroc"])),
            _above(one["told"]),
        )
        for one in found["probes"]
    ]
    note = (
        "Frozen features of each arm's first encoder, beside principal components of the pixels. Above chance is the "
        "rule: it matters where the group goes along with the label."
    )
    head = ("Group", "Features", "Told apart", "AUROC", "More than chance")
    return Table("Which groups do features tell?", head, rows, note, wide=True) if rows else None


def _duplicates(found: dict[str, Any]) -> Table:
    both = found["duplicates"]
    rows = [
        ("Images compared", told(both["images"])),
        ("Sets of images with the same pixels", told(len(both["exact"]))),
        (f"Pairs that look alike (at most {both['bits']} of 64 bits apart)", told(len(both["near"]))),
        ("Images without a hash of their looks", told(both["unhashed"])),
    ]
    return Table("On both sides of the split", ("", "Number"), rows, "Some look-alikes are two people: look at them.")


def _pairs(found: dict[str, Any]) -> Table | None:
    near = sorted(found["duplicates"]["near"], key=lambda pair: (pair["bits"], pair["trained"], pair["held_out"]))
    rows = [(pair["trained"], pair["held_out"], told(pair["bits"])) for pair in near[:PAIRS]]
    rest = f"And {len(near) - PAIRS:,} more in audit.json." if len(near) > PAIRS else ""
    return (
        Table("Pairs that look alike", ("Training", "Held out", "Bits apart"), rows, rest, wide=True) if rows else None
    )


def _above(told: dict[str, Any]) -> str:
    return "yes" if told["above_chance"] else "no"
