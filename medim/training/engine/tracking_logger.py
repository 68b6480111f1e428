"""Lightning logger that writes the records of a run to its tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from medim.tracking.tracker import Tracker


class TrackingLogger(Logger):
    """Lightning logger of a tracked run.

    Args:
        tracker: tracker of the run.
    """

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    @property
    def name(self) -> str:
        """Name of the kind of logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """Run id of MLflow; empty until MLflow has created the run."""
        return self._tracker.run_id

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Log a nested mapping as flat parameters."""
        self._tracker.log_parameters(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step; steps that a resumed run repeats are left out."""
        self._tracker.log_metrics(metrics, step)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._tracker.add({"tags": {name: value}})


def set_tag(logger: Any, name: str, value: str) -> None:
    """Set a tag of the current run; other loggers are ignored."""
    if isinstance(logger, TrackingLogger):
        logger.set_tag(name, value)
