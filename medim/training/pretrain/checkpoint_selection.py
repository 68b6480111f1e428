"""Checkpoint selection by the one-standard-error rule: the latest step with a score close to the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from medim.migrations import rename_keys

Criterion = Literal["probe", "val_loss", "last_step"]


class CheckpointSelection:
    """Selection of the weights of one validated step; saved in checkpoints, so that resuming does not change it.

    A step with collapsed summaries or non-finite metrics is never selected. The best score is the highest of the run so
    far. A later step replaces the selected one if its score is within one standard error of the best, so that noise has
    little effect and later steps are preferred.

    Attributes:
        step: selected step, -1 if there is none.
        best_step: step with the best score.
        metrics: metrics of the selected step.
    """

    def __init__(self, criterion: Criterion = "val_loss") -> None:
        self._criterion = criterion
        self.step = self.best_step = -1
        self.metrics: dict[str, float] = {}
        self._best = -math.inf
        self._error = 0.0
        self._weights: dict[str, torch.Tensor] = {}

    def update(self, step: int, score: float, error: float, metrics: Mapping[str, float], module: nn.Module) -> None:
        """Select the weights of this step if its score is the best, or within one standard error of the best.

        Args:
            step: number of steps done.
            score: score, higher is better; NaN excludes the step.
            error: standard error of the score.
            metrics: metrics of the step, for the summary.
            module: module with the weights.
        """
        if not math.isfinite(score):
            return
        if score >= self._best:
            self._best, self._error, self.best_step = score, error if math.isfinite(error) else 0.0, step
        if score >= self._best - self._error:
            self.step, self.metrics = step, dict(metrics)
            self._weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def restore(self, module: nn.Module, last_step: int) -> None:
        """Load the selected weights into the module if they are not those of the last step."""
        if self.step not in (-1, last_step):
            module.load_state_dict(self._weights)

    def summary(self, last_step: int) -> dict[str, Any]:
        """Summarise for `summary.json` and `encoder.json`: step, criterion, reason and metrics of the selection."""
        criterion: Criterion = self._criterion if self.step >= 0 else "last_step"
        return {
            "step": self.step if self.step >= 0 else last_step,
            "criterion": criterion,
            "best_step": self.best_step if self.step >= 0 else None,
            "last_step": last_step,
            "reason": _REASONS[criterion],
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Build the state for checkpoints."""
        return {
            "step": self.step,
            "best_step": self.best_step,
            "metrics": self.metrics,
            "best": self._best,
            "error": self._error,
            "weights": self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        state = rename_keys(state, "checkpoint_selection_state")
        self.step, self.best_step, self.metrics = state["step"], state["best_step"], dict(state["metrics"])
        self._best, self._error, self._weights = state["best"], state["error"], state["weights"]


_REASONS: dict[Criterion, str] = {
    "probe": "the latest validated step whose probe of labelled training subjects is within one standard error of the "
    "best",
    "val_loss": "selected by validation loss: the latest validated step without collapse whose validation loss is "
    "within one standard error of the lowest",
    "last_step": "no validated step without collapse; the last step is saved",
}
