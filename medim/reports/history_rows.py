"""Rows of `history.csv`: training and validation losses by step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medim.migrations import read_migrated_csv
from medim.types import UserError

_COLUMNS = ("step", "name", "loss", "chance", "val")


@dataclass(frozen=True)
class LossRecord:
    """One row, with a training or a validation loss; None for an empty cell.

    Attributes:
        step: number of the step.
        name: name of the term or measure.
        loss: training loss.
        chance: chance level of the term.
        val: validation loss.
    """

    step: int
    name: str
    loss: float | None
    chance: float | None
    val: float | None


def read_history_rows(path: Path) -> list[LossRecord]:
    """Read `history.csv`.

    Raises:
        UserError: the file is damaged, lacks a column, or has a cell that is not a number.
    """
    content = read_migrated_csv(path, "history")
    content.require_columns(path, _COLUMNS)
    rows = []
    for line, row in zip(content.lines, content, strict=True):
        try:
            numbers = {name: float(row[name]) if row[name] else None for name in ("loss", "chance", "val")}
            rows.append(LossRecord(step=int(row["step"]), name=row["name"], **numbers))
        except ValueError as error:
            raise UserError(f"{path}, line {line}: expected numbers ({error}). Copy the file again.") from None
    return rows
