"""From the files of a run or an evaluation to a section of the report."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.contamination import describe
from medim.evaluation.cases import class_arrays, finding_arrays, read_cases
from medim.files import read_json
from medim.reports import figures
from medim.reports.page import (
    INTERVALS,
    Banner,
    Section,
    Table,
    counted,
    many,
    metric_name,
    metric_table,
    metric_text,
    shares,
    size,
    told,
)
from medim.reports.svg import Figure
from medim.reports.training_curves import VERDICTS, health
from medim.types import Array, UserError

Row = Mapping[str, Any]


def pretraining(folder: Path, anchor: str) -> Section:
    """A pretraining run: verdict, every loss against its chance level, health of the features."""
    summary = read_json(folder / "summary.json")
    losses, chance = summary.get("loss", {}), summary.get("chance", {})
    weights = summary.get("objectives", {})
    rows = [
        (
            name,
            told(weights.get(name)),
            *(told(loss.get(part)) for part in ("first", "last", "held_out")),
            _chance(chance.get(name)),
        )
        for name, loss in losses.items()
    ]
    verdict = str(summary.get("verdict"))
    facts = [
        ("Steps", told(summary.get("steps"))),
        ("Input", told(summary.get("input_shape"))),
        ("Effective rank (RankMe)", told(summary.get("rankme"))),
        ("Feature spread (1 even, 0 collapsed)", told(summary.get("feature_std"))),
        ("Probe on held-out subjects", _probe(summary.get("probe"))),
        ("Encoder of step", _selected(summary.get("selected"))),
        ("What to try", told(summary.get("what_to_try") or None)),
        ("Seconds a step", told(summary.get("seconds_per_step"))),
        ("Waiting for data", _share(summary.get("data_wait_fraction"))),
        *_machine(summary),
    ]
    curves = read_history(folder / "history.csv", [name for name in losses if "/" not in name])
    return Section(
        anchor=anchor,
        title=f"Pretraining: {folder.name}",
        banner=VERDICTS.get(verdict, Banner("plain", verdict, "This report does not know the verdict.")),
        facts=facts,
        tables=[Table("Losses", ("Objective", "Weight", "First", "Last", "Held out", "Chance level"), rows, wide=True)],
        figures=[*(figures.loss_curve(curve) for curve in curves), *health(folder / "history.csv")],
        details=[*_config(folder), _everything(summary)],
    )


def finetuning(folder: Path, anchor: str) -> Section:
    """A fine-tuning run: its start, its label budget and its validation metrics."""
    summary = read_json(folder / "summary.json")
    validation = summary.get("val") or {}
    metrics = validation.get("metrics", validation)
    start = {"pretrained": "pretrained weights", "scratch": "fresh weights (from scratch)"}.get(
        str(summary.get("init"))
    )
    facts = [
        ("Task", told(summary.get("task"))),
        ("Started from", told(start)),
        ("Labelled images used", told(summary.get("labelled"))),
        ("Images without a label, left out", told(summary.get("unlabelled_left_out"))),
        ("Validation images", _measured(validation)),
        *_seen(summary),
        ("Steps", told(summary.get("steps"))),
        *_machine(summary),
    ]
    drawn = [figures.loss_curve(curve) for curve in read_history(folder / "history.csv", ["loss"])]
    scores = shares(metrics)
    if scores:
        drawn.append(figures.intervals(scores, "Validation split"))
    return Section(
        anchor=anchor,
        title=f"Fine-tuning: {folder.name}",
        banner=_headline(metrics, f"on the validation split, from {told(start)}"),
        facts=facts,
        tables=[metric_table(metrics, "Validation split", INTERVALS)] if metrics else [],
        figures=drawn,
        details=[*_config(folder), _everything(summary)],
    )


def evaluation(folder: Path, anchor: str) -> Section:
    """An evaluation: its metrics, who was left out, and the cases behind the numbers."""
    summary = read_json(folder / "metrics.json")
    rows = read_cases(folder / "cases.parquet")
    metrics, classes = summary["metrics"], summary["classes"]
    used = [row for row in rows if not row.get("rejected")]
    split = {"all": "all labelled images", "val": "the validation split", "train": "the training split"}.get(
        summary["split"], f"the {summary['split']} split"
    )
    facts = [
        ("Task", told(summary.get("task"))),
        ("Images", _measured(summary)),
        ("Which", split),
        ("Subjects left out: the model was trained on them", told(summary.get("excluded_seen"))),
        *_seen(summary),
        ("Images that could not be used", told(summary.get("rejected"))),
        ("Model started from", told(summary.get("init"))),
    ]
    drawn, after = _DETAILS.get(str(summary.get("task")), _classification)(used, classes, metrics)
    refused = Counter(str(row["rejected"]) for row in rows if row.get("rejected"))
    if refused:
        after.append(counted("Images that could not be used", "Reason", refused))
    return Section(
        anchor=anchor,
        title=f"Evaluation: {folder.name}",
        banner=_headline(metrics, f"on {split}, {_measured(summary)}"),
        facts=facts,
        tables=[metric_table(metrics, "Metrics, in each image's own space", INTERVALS)],
        figures=drawn,
        after=after,
        details=[_everything({key: value for key, value in summary.items() if key != "metrics"})],
    )


def unfinished(folder: Path, anchor: str) -> Section:
    """A run that has written no summary."""
    text = "There is no summary.json: the run is still going, or it was stopped. Continue it with --resume."
    return Section(anchor, f"Unfinished: {folder.name}", Banner("bad", "Not finished", text))


def read_history(path: Path, names: Sequence[str]) -> list[figures.Curve]:
    """Curves of `history.csv`, in the order of `names`.

    Its columns are step, name, loss, chance, held_out; a row holds a training or a held-out loss; the rest is empty.
    """
    if not path.is_file():
        return []
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"step", "name", "loss", "chance", "held_out"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path}: expected columns step, name, loss, chance, held_out; got {reader.fieldnames}.")
        for row in reader:
            if row["name"] in rows:
                rows[row["name"]].append(row)
    return [_curve(name, found) for name, found in rows.items() if any(row["loss"] for row in found)]


def _curve(name: str, rows: Sequence[Mapping[str, str]]) -> figures.Curve:
    trained = [row for row in rows if row["loss"]]
    levels = [float(row["chance"]) for row in rows if row["chance"]]
    return figures.Curve(
        name=name,
        steps=np.array([int(row["step"]) for row in trained]),
        loss=np.array([float(row["loss"]) for row in trained]),
        held_out=[(int(row["step"]), float(row["held_out"])) for row in rows if row["held_out"]],
        chance=levels[-1] if levels else None,
    )


def _segmentation(
    rows: Sequence[Row], classes: Sequence[str], metrics: Mapping[str, Any]
) -> tuple[list[Figure], list[Table]]:
    columns = {name: [row for row in rows if row["class"] == name] for name in classes}
    drawn = [
        figures.intervals(shares(metrics), "Metrics with their intervals"),
        figures.strips(
            {name: [row["dice"] for row in found] for name, found in columns.items()}, "Dice", "Dice by class"
        ),
    ]
    if all(row["truth_ml"] is not None for row in rows):
        sides = [{n: [r[side] for r in found] for n, found in columns.items()} for side in ("truth_ml", "predicted_ml")]
        drawn.append(figures.agreement(sides[0], sides[1], "Volumes against the truth"))
    images: dict[str, list[Row]] = {}
    for row in rows:
        images.setdefault(row["image"], []).append(row)
    worst = sorted(images.items(), key=lambda item: np.mean([row["dice"] for row in item[1]]))[:5]
    cells = [(image, *(f"{row['dice']:.3f}" for row in found)) for image, found in worst]
    return drawn, [Table("The five images with the lowest Dice", ("Image", *classes), cells)]


def _classification(
    rows: Sequence[Row], classes: Sequence[str], metrics: Mapping[str, Any]
) -> tuple[list[Figure], list[Table]]:
    probabilities, labels = class_arrays(list(map(dict, rows)), classes)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    hit = predicted == labels
    drawn = [
        figures.intervals(shares(metrics), "Metrics with their intervals"),
        figures.reliability(confidence, hit, metrics.get("ece", {}).get("value"), "Are its probabilities right?"),
    ]
    counts = [[int(((labels == t) & (predicted == p)).sum()) for p in range(len(classes))] for t in range(len(classes))]
    table = Table(
        "Truth against prediction, images",
        ("True class", *(f"called {name}" for name in classes)),
        [(name, *map(told, row)) for name, row in zip(classes, counts, strict=True)],
    )
    images = [row["image"] for row in rows[:: len(classes)]]
    surest = sorted(np.flatnonzero(~hit), key=lambda place: -confidence[place])[:5]
    wrong = [(images[i], classes[labels[i]], classes[predicted[i]], f"{confidence[i]:.3f}") for i in surest]
    tables = [table]
    if wrong:
        head = ("Image", "True class", "Called", "Probability")
        tables.append(Table("The five surest mistakes", head, wrong))
    return drawn, tables


def _headline(metrics: Mapping[str, Any], where: str) -> Banner:
    first = next(iter(metrics), None)
    if first is None:
        return Banner("care", "No metrics", "This run has measured nothing.")
    return Banner("plain", f"{metric_name(first)}: {metric_text(metrics[first])}", f"Measured {where}.")


def _seen(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the weights had seen of the images measured on."""
    return [(name.capitalize(), text) for name, text in describe(summary.get("seen")).items()]


def _measured(counts: Mapping[str, Any]) -> str:
    return f"{many(counts.get('n'), 'image')} of {many(counts.get('subjects'), 'subject')}"


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Peak memory", size(summary.get("peak_memory_bytes"))),
        ("Device", told(summary.get("device"))),
        ("Config", str(summary.get("config_hash"))[:12]),
        ("Index", str(summary.get("index_hash"))[:12]),
    ]


def _chance(level: float | None) -> str:
    return "none" if level is None else told(level)


def _share(value: float | None) -> str:
    return told(None) if value is None else f"{100 * value:.0f} %"


def _probe(probe: Mapping[str, Any] | None) -> str:
    return told(None) if not probe else f"{probe['value']:.3f} {probe['metric']}, {probe['protocol']}"


def _selected(selected: Mapping[str, Any] | None) -> str:
    return told(None) if not selected else f"{selected['step']}: {selected['why']}"


def _config(folder: Path) -> list[tuple[str, str]]:
    path = folder / "config.yaml"
    return [("Configuration", path.read_text())] if path.is_file() else []


def _everything(summary: Mapping[str, Any]) -> tuple[str, str]:
    lines = [f"{key}: {told(value)}" for key, value in summary.items()]
    return "All recorded values", "\n".join(lines)


def _findings(
    rows: Sequence[Row], classes: Sequence[str], metrics: Mapping[str, Any]
) -> tuple[list[Figure], list[Table]]:
    _, labels = finding_arrays(list(map(dict, rows)), classes)
    counts = [(name, *(told(int(n)) for n in _sides(labels[:, k]))) for k, name in enumerate(classes)]
    table = Table("What was known, images", ("Finding", "present", "absent", "unknown"), counts)
    return [figures.intervals(shares(metrics), "Metrics with their intervals")], [table]


def _sides(column: Array) -> tuple[int, int, int]:
    return int((column == 1).sum()), int((column == 0).sum()), int(np.isnan(column).sum())


_DETAILS = {"segmentation": _segmentation, "multi-label classification": _findings}
