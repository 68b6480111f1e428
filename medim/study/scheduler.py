"""Which cell comes next, and what has become of the others."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medim.files import read_json, write_json
from medim.study.cell import Bench, score_of
from medim.study.design import Cell
from medim.study.lr_selection import best

log = logging.getLogger(__name__)
CHOICE = "chosen.json"


@dataclass
class Agenda:
    """The cells of a study that are left.

    Attributes:
        bench: what they share.
        cells: all of them, in the order in which they are begun.
        expected: seconds that a cell will take.
        deadline: of `time.monotonic`; no cell is begun that is expected to end after it.
        jobs: cells at once.
        failed: cells that could not be run, with what they said.
        stopped: no cell is to be begun any more.
    """

    bench: Bench
    cells: Sequence[Cell]
    expected: Callable[[Cell], float]
    deadline: float | None = None
    jobs: int = 1
    failed: dict[Cell, str] = field(default_factory=dict)
    stopped: bool = False

    def __post_init__(self) -> None:
        self._left = [cell for cell in self.cells if not self.bench.done(cell) and not self._settled(cell)]
        self._running: list[Cell] = []
        self._again: list[Cell] = []  # their process died; tried once more, alone

    @property
    def left(self) -> list[Cell]:
        """Cells that are neither done nor failed."""
        return [*self._running, *self._left, *self._again]

    def seconds_left(self) -> float:
        """Until all is done, as far as that can be told."""
        return sum(self.expected(cell) for cell in self.left) / self.jobs

    def take(self) -> tuple[Cell, float] | None:
        """The next cell and its learning rate's multiple; None where nothing can be begun now."""
        if self.stopped:
            return None
        for cell in self._left:
            if self._ready(cell) and self._in_time(cell):
                self._left.remove(cell)
                self._running.append(cell)
                return cell, self.multiple(cell)
        if self._again and not self._running and self._in_time(self._again[0]):
            cell = self._again.pop(0)
            self._running.append(cell)
            return cell, self.multiple(cell)
        return None

    def over(self, cell: Cell, failure: str | None = None) -> None:
        """A cell is done, or has failed for good."""
        self._running.remove(cell)
        if failure is not None:
            self.failed[cell] = failure
            log.warning("%s: failed: %s", cell, failure)
        count = len(self.cells) - len(self.left)
        log.info("cell %d of %d: %s; about %s left", count, len(self.cells), cell, duration(self.seconds_left()))

    def put_back(self, cell: Cell) -> None:
        """A cell was stopped, and can be taken up where it was."""
        self._running.remove(cell)
        self._left.insert(0, cell)

    def died(self, cell: Cell, reason: str, *, again: bool) -> None:
        """A cell brought its process down; with `again` it is tried once more, alone."""
        if not again:
            self.over(cell, reason)
            return
        self._running.remove(cell)
        self._again.append(cell)
        log.warning("%s: %s; it is tried once more, alone", cell, reason)

    def multiple(self, cell: Cell) -> float:
        """Of the preset's learning rate: a selection run's own, else what was chosen for arm and budget, for good."""
        if cell.multiple is not None:
            return cell.multiple
        trials = self.trials(cell)
        if not trials:
            return 1.0
        if not (file := self._choice(cell)).is_file():
            scores = {m: score_of(self.bench, t) if self.bench.done(t) else None for m, t in trials.items()}
            write_json(file, {"schema_version": 1, "multiple": best(scores)})
        return float(read_json(file)["multiple"])

    def _choice(self, cell: Cell) -> Path:
        """Where it stands what was chosen for a cell's arm and budget."""
        assert cell.budget is not None
        return self.bench.out / "selection" / cell.arm.name / cell.budget.name / CHOICE

    def _settled(self, cell: Cell) -> bool:
        """Whether a selection run would choose nothing any more: it failed, and the others have chosen."""
        return cell.kind == "selection" and self._choice(cell).is_file()

    def trials(self, cell: Cell) -> dict[float, Cell]:
        """The selection runs of a cell's arm and budget, by multiple."""
        same = (c for c in self.cells if c.multiple is not None and (c.arm, c.budget) == (cell.arm, cell.budget))
        return {trial.multiple: trial for trial in same if trial.multiple is not None}

    def _ready(self, cell: Cell) -> bool:
        return cell.multiple is not None or not any(trial in self.left for trial in self.trials(cell).values())

    def _in_time(self, cell: Cell) -> bool:
        return self.deadline is None or time.monotonic() + self.expected(cell) <= self.deadline


def duration(seconds: float) -> str:
    """For people: minutes, or hours."""
    return f"{math.ceil(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
