"""Everything that tracks, for a process in which tracking is off."""

from __future__ import annotations

from pathlib import Path

from medim.tracking.results import TrackedResult, track_result
from medim.tracking.target import check_target
from medim.tracking.tracking import track_study


def track_everything(folder: Path) -> None:
    """Track a result and a study, and check the target."""
    check_target()
    out = folder / "result-e"
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    track_result(TrackedResult(command="evaluate", folder=out, name="e", start=0.0, parameters={}, metrics={}))
    with track_study(out, "study", {}) as tracker:
        tracker.log_metrics({"cells": 1.0})
