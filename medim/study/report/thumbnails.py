"""Pictures of the worst cases of a study, rendered while its images are available and saved in `worst.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medim.evaluation.case_pictures import CasePicture, draw_case_picture, select_cases
from medim.evaluation.evaluate import open_network
from medim.files import write_json
from medim.inference.network import Predictor
from medim.study.cell import StudyContext
from medim.study.design import SCRATCH, Arm, Cell
from medim.study.report.view import StudyView
from medim.study.results import RunKey
from medim.tasks import find_task
from medim.types import Array

WORST_CASES_FILE = "worst.json"


def write_worst_cases(context: StudyContext, study: StudyView) -> None:
    """Write `worst.json`: pictures of the worst, typical and best cases of the saved model of the best arm.

    Args:
        context: context of the cells.
        study: the study, with written results.
    """
    cell = _select_cell(context, study)
    content: dict[str, Any] = {"schema_version": 1, "arm": None, "budget": None, "tiles": []}
    if cell is not None:
        content |= {"arm": cell.arm.name, "budget": cell.budget.name if cell.budget else None}
        content["tiles"] = _build_tiles(context, study, cell)
    write_json(context.out / WORST_CASES_FILE, content)


def case_scores(study: StudyView, run: RunKey) -> Array:
    """Dice of each case, or its probability of the true class: (N,)."""
    assert study.results is not None
    return study.results.task.study_case_scores(study.results.values[run], study.results.classes)


def _select_cell(context: StudyContext, study: StudyView) -> Cell | None:
    """Select the first cell with a saved model, by support of the arm, at the largest possible budget."""
    ranked = {row["arm"]: None for row in sorted(study.rows, key=lambda row: row is not study.best)}
    arms: Mapping[str, Arm] = {arm.name: arm for arm in context.design.arms if not context.design.is_probe_arm(arm)}
    for name in (*ranked, SCRATCH):
        for budget in reversed(context.design.budgets):
            cell = Cell(arms[name], 0, budget) if name in arms else None
            runs = study.results.values if study.results else {}
            if cell and RunKey(name, budget.name, 0, 0) in runs and (context.out / cell.folder / "model").is_dir():
                return cell
    return None


def _build_tiles(context: StudyContext, study: StudyView, cell: Cell) -> list[CasePicture]:
    assert study.results is not None
    assert cell.budget is not None
    run = RunKey(cell.arm.name, cell.budget.name, cell.pretrain_seed, cell.subset_seed)
    scores, cases = case_scores(study, run), study.results.cases
    records = {record.image: record for record in context.cohort.index.records}
    network = _open_cell_network(context.out / cell.folder) if find_task(context.design.task).dense else None
    return [
        draw_case_picture(
            context.cohort.index,
            records[cases[place]],
            network,
            title=title,
            description=_describe_case(study, run, place),
        )
        for title, place in select_cases(scores, cases)
    ]


def _open_cell_network(folder: Path) -> Predictor:
    return open_network(folder)[0]


def _describe_case(study: StudyView, run: RunKey, case_number: int) -> str:
    results = study.results
    assert results is not None
    return results.task.describe_study_case(results.values[run], results.classes, case_number)
