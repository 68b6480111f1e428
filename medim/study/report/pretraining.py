"""Did the encoders of a study learn anything? What their pretraining runs said, against chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medim.files import read_json, write_json
from medim.reports.figures import Curve, loss_curve, thinned
from medim.reports.page import NOT_REPORTED, Banner, Section, Table, many, told
from medim.reports.runs import read_history
from medim.reports.training_curves import VERDICTS
from medim.study.design import Arm
from medim.study.report.view import Opened

PRETRAINING = "pretraining.json"
KEPT = ("verdict", "steps", "objectives", "loss", "chance", "rankme", "feature_std", "input_shape", "config_hash")


def write_health(out: Path, arms: Sequence[Arm]) -> None:
    """Write `pretraining.json`: for each run of each arm what it said of itself, or null where it came without."""
    found = {arm.name: [_health(run) for run in arm.runs] for arm in arms if arm.runs}
    write_json(out / PRETRAINING, {"schema_version": 1, "arms": found})


def health(study: Opened) -> Section:
    """A row and the loss curves of each pretraining run."""
    runs = [(f"{arm}, encoder {place}", run) for arm, found in _runs(study).items() for place, run in enumerate(found)]
    known = [(name, run) for name, run in runs if run is not None]
    bad = [f"{name}: {run['verdict']}" for name, run in known if run["verdict"] != "learning"]
    head = ("Pretraining run", "Verdict", "Steps", "Objective: held out, chance", "Effective rank", "Feature spread")
    if not known:
        banner = Banner("care", NOT_REPORTED, "The encoders came without the records of their pretraining.")
    elif bad:
        banner = Banner("care", "Not every encoder has learnt", "; ".join(bad) + ".")
    else:
        banner = Banner("good", f"{many(len(known), 'pretraining run')}: learning", VERDICTS["learning"].text)
    drawn = [
        replace(figure, caption=f"{name}: {figure.caption}")
        for name, run in known
        for curve in run["curves"]
        for figure in [loss_curve(_curve(curve))]
    ]
    rows = [_row(name, run) for name, run in runs]
    return Section(
        "health",
        "Health of the pretraining",
        banner,
        tables=[Table("Pretraining runs", head, rows, wide=True)] if rows else [],
        figures=drawn,
    )


def unwell(study: Opened, arm: str) -> str:
    """Which of an arm's pretraining runs did not learn, for the first page; nothing where all did, or none is known."""
    verdicts = [run["verdict"] for run in _runs(study).get(arm, []) if run is not None]
    bad = [verdict for verdict in verdicts if verdict != "learning"]
    if not bad:
        return ""
    return f"Of {many(len(verdicts), 'pretraining run')} of {arm}, by their own verdict: {', '.join(bad)}. "


def _runs(study: Opened) -> dict[str, list[Any]]:
    """By arm, what each pretraining run said of itself, or None."""
    path = study.folder / PRETRAINING
    arms: dict[str, list[Any]] = read_json(path)["arms"] if path.is_file() else {}
    return arms


def _health(run: Path) -> dict[str, Any] | None:
    for folder in (run, run.parent):
        summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
        if summary.get("command") == "pretrain":
            curves = read_history(folder / "history.csv", [name for name in summary.get("loss", {}) if "/" not in name])
            return {**{key: summary.get(key) for key in KEPT}, "curves": [_stored(curve) for curve in curves]}
    return None


def _stored(curve: Curve) -> dict[str, Any]:
    finite = np.isfinite(curve.loss)
    steps, loss = thinned(curve.steps[finite], curve.loss[finite])
    points = [[float(f"{value:.6g}") for value in pair] for pair in zip(steps, loss, strict=True)]
    return {"name": curve.name, "points": points, "held_out": list(curve.held_out), "chance": curve.chance}


def _curve(stored: dict[str, Any]) -> Curve:
    steps, loss = np.array(stored["points"], dtype=np.float64).reshape(-1, 2).T
    return Curve(stored["name"], steps, loss, [(step, value) for step, value in stored["held_out"]], stored["chance"])


def _row(name: str, run: dict[str, Any] | None) -> tuple[str, ...]:
    if run is None:
        return (name, *[NOT_REPORTED] * 5)
    losses = "; ".join(
        f"{objective}: {told(loss.get('held_out'))}, {told(run['chance'].get(objective))}"
        for objective, loss in run["loss"].items()
        if "/" not in objective
    )
    return (name, told(run["verdict"]), told(run["steps"]), losses, told(run["rankme"]), told(run["feature_std"]))
