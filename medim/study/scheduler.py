"""Scheduler of the cells of a study: selects the next cell and tracks the state of the others."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.files import write_json
from medim.metrics import higher_is_better
from medim.migrations import read_checked_json
from medim.study.cell import StudyContext, read_selection_score
from medim.study.design import Cell
from medim.study.lr_selection import best_multiplier

log = logging.getLogger(__name__)
SELECTION_FILE = "chosen.json"


class _LrSelectionContent(TypedDict):
    multiple: float


@dataclass(kw_only=True)
class Scheduler:
    """Scheduler of the remaining cells of a study.

    Attributes:
        context: data shared by the cells.
        cells: all cells, in their order of execution.
        estimate_seconds: function that estimates the duration of a cell in seconds.
        deadline: time of `time.monotonic`; no cell is started that is expected to end later.
        jobs: number of cells that run at the same time.
        failures: failed cells with the reason.
        stopped: whether no further cell is to be started.
    """

    context: StudyContext
    cells: Sequence[Cell]
    estimate_seconds: Callable[[Cell], float]
    deadline: float | None = None
    jobs: int = 1
    failures: dict[Cell, str] = field(default_factory=dict)
    stopped: bool = False

    def __post_init__(self) -> None:
        self._pending = [
            cell for cell in self.cells if not self.context.is_complete(cell) and not self._selection_closed(cell)
        ]
        self._running: list[Cell] = []
        self._retries: list[Cell] = []  # cells of crashed processes; retried once, without other cells

    @property
    def remaining(self) -> list[Cell]:
        """Cells that are neither complete nor failed."""
        return [*self._running, *self._pending, *self._retries]

    def remaining_seconds(self) -> float:
        """Estimate the seconds until all cells are complete."""
        return sum(self.estimate_seconds(cell) for cell in self.remaining) / self.jobs

    def next_cell(self) -> tuple[Cell, float] | None:
        """Select the next cell and its learning-rate factor; None if no cell can be started now."""
        if self.stopped:
            return None
        for cell in self._pending:
            if self._is_ready(cell) and self._fits_deadline(cell):
                self._pending.remove(cell)
                self._running.append(cell)
                return cell, self.lr_multiplier(cell)
        if self._retries and not self._running and self._fits_deadline(self._retries[0]):
            cell = self._retries.pop(0)
            self._running.append(cell)
            return cell, self.lr_multiplier(cell)
        return None

    def finish(self, cell: Cell, failure: str | None = None) -> None:
        """Record that a cell is complete, or has failed permanently."""
        self._running.remove(cell)
        if failure is not None:
            self.failures[cell] = failure
            log.warning("%s: failed: %s", cell, failure)
        count = len(self.cells) - len(self.remaining)
        log.info(
            "cell %d of %d: %s; about %s left",
            count,
            len(self.cells),
            cell,
            format_remaining_time(self.remaining_seconds()),
        )

    def requeue(self, cell: Cell) -> None:
        """Put a stopped cell back into the queue; it will be resumed."""
        self._running.remove(cell)
        self._pending.insert(0, cell)

    def retry_or_fail(self, cell: Cell, reason: str, *, retry: bool) -> None:
        """Handle a crash of the process of a cell; with `retry` the cell is run once more, without other cells."""
        if not retry:
            self.finish(cell, reason)
            return
        self._running.remove(cell)
        self._retries.append(cell)
        log.warning("%s: %s; it will be retried once, without other cells", cell, reason)

    def lr_multiplier(self, cell: Cell) -> float:
        """Get the learning-rate factor of a cell: its own in a selection run, else that selected for arm and budget."""
        if cell.lr_multiplier is not None:
            return cell.lr_multiplier
        trials = self.trials(cell)
        if not trials:
            return 1.0
        if not (file := self._selection_file(cell)).is_file():
            scores = {
                m: read_selection_score(self.context, t) if self.context.is_complete(t) else None
                for m, t in trials.items()
            }
            is_higher_better = higher_is_better(self.context.design.primary_metric)
            best = best_multiplier(scores, higher_is_better=is_higher_better)
            write_json(file, {"schema_version": 1, "multiple": best})
        return float(read_checked_json(file, None, _LrSelectionContent)["multiple"])

    def _selection_file(self, cell: Cell) -> Path:
        """Path of the file with the selected factor for the arm and budget of a cell."""
        assert cell.budget is not None
        return self.context.out / "selection" / cell.arm.name / cell.budget.name / SELECTION_FILE

    def _selection_closed(self, cell: Cell) -> bool:
        """Whether a selection run is no longer needed: it failed, and the selection was made from the others."""
        return cell.kind == "selection" and self._selection_file(cell).is_file()

    def trials(self, cell: Cell) -> dict[float, Cell]:
        """Map the learning-rate factors of the selection runs of an arm and budget to the runs."""
        siblings = (
            c for c in self.cells if c.lr_multiplier is not None and (c.arm, c.budget) == (cell.arm, cell.budget)
        )
        return {trial.lr_multiplier: trial for trial in siblings if trial.lr_multiplier is not None}

    def _is_ready(self, cell: Cell) -> bool:
        return cell.lr_multiplier is not None or not any(
            trial in self.remaining for trial in self.trials(cell).values()
        )

    def _fits_deadline(self, cell: Cell) -> bool:
        return self.deadline is None or time.monotonic() + self.estimate_seconds(cell) <= self.deadline


def format_remaining_time(seconds: float) -> str:
    """Format a duration in minutes or hours."""
    return f"{math.ceil(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
