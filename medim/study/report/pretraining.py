"""Section of the study page with the health of the pretraining runs, compared with chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medim.files import write_json
from medim.migrations import read_checked_json
from medim.reports.content import CurveContent, HealthContent, PretrainContent, PretrainingContent
from medim.reports.figures import LossCurve, loss_curve, thin_curve
from medim.reports.page import NOT_REPORTED, Banner, FoldedFigures, ReportSection, ReportTable, format_value, pluralise
from medim.reports.runs import read_history
from medim.reports.training_curves import VERDICT_BANNERS
from medim.study.design import Arm
from medim.study.report.view import StudyView

PRETRAINING_FILE = "pretraining.json"
SUMMARY_KEYS = (
    "verdict",
    "steps",
    "objectives",
    "loss",
    "chance",
    "rankme",
    "feature_std",
    "input_shape",
    "config_hash",
)


def write_health(out: Path, arms: Sequence[Arm]) -> None:
    """Write `pretraining.json`: the recorded health of each run of each arm, or null if a run has no records."""
    health_by_arm = {arm.name: [_read_health(run) for run in arm.runs] for arm in arms if arm.runs}
    write_json(out / PRETRAINING_FILE, {"schema_version": 2, "arms": health_by_arm})


def build_health_section(study: StudyView) -> ReportSection:
    """Build the section: one table row and the loss curves of each pretraining run."""
    runs = [
        (f"{arm}, encoder {number}", run)
        for arm, arm_runs in _read_pretraining(study).items()
        for number, run in enumerate(arm_runs)
    ]
    recorded_runs = [(name, run) for name, run in runs if run is not None]
    exceptions = [f"{name}: {run['verdict']}" for name, run in recorded_runs if run["verdict"] != "learning"]
    is_any_unhealthy = any(run["verdict"] not in ("learning", "not-measured") for _, run in recorded_runs)
    head = (
        "Pretraining run",
        "Verdict",
        "Steps",
        "Objective: validation loss, chance",
        "Effective rank",
        "Feature spread",
    )
    if not recorded_runs:
        banner = Banner("care", NOT_REPORTED, "The encoders have no records of their pretraining.")
    elif exceptions:
        headline = "has not learnt" if is_any_unhealthy else "was not validated"
        banner = Banner("care", f"At least one encoder {headline}", "; ".join(exceptions) + ".")
    else:
        banner = Banner(
            "good", f"{pluralise(len(recorded_runs), 'pretraining run')}: learning", VERDICT_BANNERS["learning"].text
        )
    plots = [
        replace(figure, caption=f"{name}: {figure.caption}")
        for name, run in recorded_runs
        for curve in run["curves"]
        for figure in [loss_curve(_curve_from_dict(curve))]
    ]
    rows = [_build_health_row(name, run) for name, run in runs]
    return ReportSection(
        "health",
        "Pretraining runs",
        banner,
        tables=[ReportTable("Health of the pretraining runs", head, rows, wide=True, folded=True)] if rows else [],
        folded=[FoldedFigures("Loss curves", plots)] if plots else [],
    )


def unhealthy_pretraining(study: StudyView, arm: str) -> str:
    """Describe the pretraining runs of an arm that did not learn, and those without validation; empty if all learnt."""
    verdicts = [run["verdict"] for run in _read_pretraining(study).get(arm, []) if run is not None]
    unhealthy = [verdict for verdict in verdicts if verdict not in ("learning", "not-measured")]
    n_unmeasured = verdicts.count("not-measured")
    runs = f"{pluralise(len(verdicts), 'pretraining run')} of {arm}"
    return (f"Unhealthy runs among {runs}: {', '.join(unhealthy)}. " if unhealthy else "") + (
        f"Runs without a verdict among {runs}, because they have no validation losses: {n_unmeasured}. "
        if n_unmeasured
        else ""
    )


def _read_pretraining(study: StudyView) -> dict[str, list[HealthContent | None]]:
    """Read the recorded health of each pretraining run by arm; None for runs without records."""
    path = study.folder / PRETRAINING_FILE
    return read_checked_json(path, "pretraining", PretrainingContent)["arms"] if path.is_file() else {}


def _read_health(run: Path) -> dict[str, Any] | None:
    for folder in (run, run.parent):
        file = folder / "summary.json"
        summary: PretrainContent = read_checked_json(file, "run", PretrainContent) if file.is_file() else {}
        if summary.get("command") == "pretrain":
            curves = read_history(folder / "history.csv", [name for name in summary.get("loss", {}) if "/" not in name])
            return {
                **{key: summary.get(key) for key in SUMMARY_KEYS},
                "curves": [_curve_to_dict(curve) for curve in curves],
            }
    return None


def _curve_to_dict(curve: LossCurve) -> dict[str, Any]:
    finite = np.isfinite(curve.loss)
    steps, loss = thin_curve(curve.steps[finite], curve.loss[finite])
    points = [[float(f"{value:.6g}") for value in pair] for pair in zip(steps, loss, strict=True)]
    return {"name": curve.name, "points": points, "val": list(curve.val), "chance": curve.chance}


def _curve_from_dict(content: CurveContent) -> LossCurve:
    steps, loss = np.array(content["points"], dtype=np.float64).reshape(-1, 2).T
    return LossCurve(
        name=content["name"],
        steps=steps,
        loss=loss,
        val=[(int(step), value) for step, value in content["val"]],
        chance=content["chance"],
    )


def _build_health_row(name: str, run: HealthContent | None) -> tuple[str, ...]:
    if run is None:
        return (name, *[NOT_REPORTED] * 5)
    losses = "; ".join(
        f"{objective}: {format_value(loss.get('val'))}, {format_value(run['chance'].get(objective))}"
        for objective, loss in run["loss"].items()
        if "/" not in objective
    )
    return (
        name,
        format_value(run["verdict"]),
        format_value(run["steps"]),
        losses,
        format_value(run["rankme"]),
        format_value(run["feature_std"]),
    )
