"""Calls that must not import MLflow, for a process in which tracking is off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from medim.cli.tracking import start_tracking, track_prediction
from medim.tracking.results import TrackedResult, track_result
from medim.tracking.target import SWITCH, check_target
from medim.tracking.tracking import track_study


def run_untracked(folder: Path) -> None:
    """Track a result and a study while tracking is off, and a prediction without a target."""
    check_target()
    out = folder / "result-e"
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    result = TrackedResult(command="evaluate", folder=out, name="e", start=0.0, parameters={}, metrics={})
    track_result("evaluate", lambda: result)
    with track_study(out, "study", {}) as tracker:
        tracker.log_metrics({"cells": 1.0})
    del os.environ[SWITCH], os.environ["MLFLOW_TRACKING_URI"]
    package: Any = None  # is not read
    track_prediction(package, out, "nifti", start_tracking())
