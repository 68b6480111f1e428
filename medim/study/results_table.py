"""Write `results.parquet` from the cells of a study: one row per case and metric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from medim.evaluation.cases import read_cases, write_parquet
from medim.study.cell import StudyContext
from medim.study.design import PIXELS, UNTRAINED, Cell
from medim.tasks import find_task
from medim.tasks.task import CaseRow

BASELINE_ARMS = {"random": UNTRAINED, "pixels": PIXELS}  # names of the baseline arms, by features of the probe
SCHEMA_VERSION = 2
_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {
        "arm": _TEXT,
        "protocol": _TEXT,
        "pretrain_seed": pa.int32(),
        "budget": _TEXT,  # as in the options
        "n_labelled": pa.int32(),  # images
        "subset_seed": pa.int32(),
        "step": pa.int32(),  # None for the end of the run
        "subject": _TEXT,
        "case": _TEXT,
        "metric": _TEXT,
        "value": pa.float64(),  # None if not defined
    }
)
RowKeys = dict[str, str | int | None]  # key columns of a run
LongRows = list[tuple[str, str, str, float | None]]  # subject, case, metric, value


def write_results(path: Path, context: StudyContext, cells: Sequence[Cell]) -> int:
    """Write the results of all complete cells, in the order of the design.

    Returns:
        Number of cases that were rejected in any cell (unreadable, or not suitable for the network).
    """
    tables, rejections = [SCHEMA.empty_table()], set()
    for cell in cells:
        if cell.kind == "selection" or not context.is_complete(cell):
            continue
        folder = context.out / cell.folder
        runs = (
            read_probe_cases(context, cell, folder)
            if cell.kind == "probe"
            else _read_finetune_cases(context, cell, folder)
        )
        for keys, rows in runs:
            rejections |= {row["image"] for row in rows if row.get("rejected")}
            tables.append(
                _build_results_table(
                    keys, _to_long_rows([row for row in rows if not row.get("rejected")], context.design.task)
                )
            )
    write_parquet(path, pa.concat_tables(tables).unify_dictionaries(), schema_version=SCHEMA_VERSION)
    return len(rejections)


def _read_finetune_cases(context: StudyContext, cell: Cell, folder: Path) -> Iterator[tuple[RowKeys, list[CaseRow]]]:
    """Yield keys and cases of a fine-tuned cell, of the intermediate evaluations and the final one."""
    assert cell.budget is not None
    keys = _build_row_keys(context, cell, cell.arm.name, cell.budget.name, cell.subset_seed)
    steps = [int(m[1]) for p in folder.glob("cases-*.parquet") if (m := re.fullmatch(r"cases-(\d+)", p.stem))]
    for step in sorted(set(steps) & set(context.design.eval_steps)):
        yield {**keys, "step": step}, read_cases(folder / f"cases-{step}.parquet")
    yield keys, read_cases(folder / "cases.parquet")


def read_probe_cases(context: StudyContext, cell: Cell, folder: Path) -> Iterator[tuple[RowKeys, list[CaseRow]]]:
    """Yield keys and cases of a probe by classifier, in the form of those of a fine-tuned cell."""
    wide_rows = pq.read_table(folder / "cases.parquet").to_pylist()
    task = find_task(context.design.task)
    groups: dict[tuple[str, str, int], list[CaseRow]] = {}
    for row in wide_rows:
        groups.setdefault((row["features"], row["budget"], row["seed"]), []).extend(task.from_probe_columns(row))
    for (features, budget, seed), rows in groups.items():
        yield _build_row_keys(context, cell, BASELINE_ARMS.get(features, cell.arm.name), budget, seed), rows


def _build_row_keys(context: StudyContext, cell: Cell, arm: str, budget: str, subset_seed: int) -> RowKeys:
    n_labelled = next(len(r) for (b, t), r in context.subsets.items() if (b.name, t) == (budget, subset_seed))
    seeds = {"pretrain_seed": cell.pretrain_seed, "subset_seed": subset_seed, "step": None}
    return {"arm": arm, "protocol": cell.arm.protocol, "budget": budget, "n_labelled": n_labelled, **seeds}


def _to_long_rows(rows: Sequence[CaseRow], task: str) -> LongRows:
    """Convert one row per case and class to one row per case and metric."""
    cases: dict[str, list[CaseRow]] = {}
    for row in rows:
        cases.setdefault(row["image"], []).append(row)
    long_rows: LongRows = []
    for image, case_rows in cases.items():
        keys = case_rows[0]["subject"], image
        long_rows += [(*keys, metric, value) for metric, value in find_task(task).to_study_rows(case_rows)]
    return long_rows


def _build_results_table(keys: RowKeys, rows: LongRows) -> pa.Table:
    columns: dict[str, list[object]] = {name: [value] * len(rows) for name, value in keys.items()}
    columns |= {
        name: [row[position] for row in rows] for position, name in enumerate(("subject", "case", "metric", "value"))
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}, SCHEMA)
