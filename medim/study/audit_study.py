"""Audit of a study: its images, and the predictions of the first model of each arm."""

from __future__ import annotations

from collections.abc import Iterator

from medim.evaluation.cases import read_cases
from medim.study.audit.audit import Audit, audit
from medim.study.audit.groups import Groups
from medim.study.cell import StudyContext
from medim.study.design import Arm, Cell
from medim.study.results_table import read_probe_cases
from medim.tasks import find_task
from medim.tasks.task import CaseRow


def audit_study(context: StudyContext, groups: Groups) -> Audit:
    """Search for leakage and shortcuts in a study, complete or stopped.

    Args:
        context: data shared by the cells of the study.
        groups: groups from the table of the user, added to those of the headers.

    Returns:
        The audit; models are named `arm, budget labels`.
    """
    design, index = context.design, context.cohort.index
    task = find_task(design.task)
    return audit(
        context.cohort,
        kind=task.kind,
        classes=task.class_names(index),
        encoders={arm.name: arm.runs[0] for arm in design.arms if arm.runs},
        cases=dict(named_cases for arm in design.arms for named_cases in _read_arm_cases(context, arm)),
        window=context.config.views.shape,
        groups=groups,
    )


def _read_arm_cases(context: StudyContext, arm: Arm) -> Iterator[tuple[str, list[CaseRow]]]:
    """Yield name and cases of the first run of an arm at the largest complete budget, if there is one."""
    for budget in reversed(context.design.budgets):
        cell = Cell(arm, 0) if context.design.is_probe_arm(arm) else Cell(arm, 0, budget)
        if not context.is_complete(cell):
            continue
        folder, name = context.out / cell.folder, f"{arm.name}, {budget.name} labels"
        if cell.kind == "probe":
            runs = ((keys, rows) for keys, rows in read_probe_cases(context, cell, folder) if keys["arm"] == arm.name)
            yield from (
                (name, rows) for keys, rows in runs if (keys["budget"], keys["subset_seed"]) == (budget.name, 0)
            )
        else:
            yield name, read_cases(folder / "cases.parquet")
        return
