"""The audit of a study: its images, and what the first model of each arm answered."""

from __future__ import annotations

from collections.abc import Iterator

from medim.evaluation.cases import Row, read_cases
from medim.study.audit.audit import Audit, audit
from medim.study.audit.groups import Groups
from medim.study.cell import Bench
from medim.study.design import Arm, Cell
from medim.study.results_table import probed


def audit_study(bench: Bench, groups: Groups) -> Audit:
    """Look for leaks and shortcuts in a study, whole or stopped.

    Args:
        bench: what its cells share.
        groups: of the user's table; those of headers are joined.

    Returns:
        What was found; models are called `arm, budget labels`.
    """
    design, index = bench.design, bench.cohort.index
    segments = design.task == "segmentation"
    return audit(
        bench.cohort,
        kind="segmenter" if segments else "classifier",
        classes=index.classes if segments else index.labels,
        encoders={arm.name: arm.runs[0] for arm in design.arms if arm.runs},
        cases=dict(found for arm in design.arms for found in _answered(bench, arm)),
        window=bench.config.views.shape,
        groups=groups,
    )


def _answered(bench: Bench, arm: Arm) -> Iterator[tuple[str, list[Row]]]:
    """Name and cases of an arm's first run at the largest budget that is done; nothing where none is."""
    for budget in reversed(bench.design.budgets):
        cell = Cell(arm, 0) if bench.design.probed(arm) else Cell(arm, 0, budget)
        if not bench.done(cell):
            continue
        folder, name = bench.out / cell.folder, f"{arm.name}, {budget.name} labels"
        if cell.kind == "probe":
            runs = ((keys, rows) for keys, rows in probed(bench, cell, folder) if keys["init"] == arm.name)
            yield from (
                (name, rows) for keys, rows in runs if (keys["budget"], keys["subset_seed"]) == (budget.name, 0)
            )
        else:
            yield name, read_cases(folder / "cases.parquet")
        return
