"""What a study says of itself: `summary.json`, written last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medim.files import write_json
from medim.study.cell import score_of, summary_of
from medim.study.comparisons import comparisons
from medim.study.design import Arm
from medim.study.lr_selection import METRIC
from medim.study.scheduler import Agenda
from medim.version import versions

SCHEMA_VERSION = 1


def write_summary(out: Path, agenda: Agenda, facts: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json`.

    Args:
        out: the study's folder, with its `results.parquet`.
        agenda: what has become of the cells.
        facts: what was found before the first cell, and how it was run.

    Returns:
        Its content.
    """
    bench, cells = agenda.bench, agenda.cells
    design, done = bench.design, [cell for cell in cells if bench.done(cell)]
    trained = [summary_of(bench, cell) for cell in done if cell.kind != "probe"]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "task": design.task,
        "complete": not agenda.left and all(bench.done(cell) for cell in cells if cell.kind != "selection"),
        "metric": METRIC[design.task],
        "budgets": {budget.name: len(bench.subsets[budget, 0]) for budget in design.budgets},
        "seeds": design.seeds,
        "probe_seeds": design.probe_seeds,
        "split_seed": design.split_seed,
        "measure_at": list(design.measure_at),
        "steps": bench.config.max_steps,
        **facts,
        "learning_rates": _learning_rates(agenda),
        "cells": {
            "all": len(cells),
            "done": len(done),
            "left": [str(cell) for cell in agenda.left],
            "failed": [{"cell": str(cell), "reason": reason} for cell, reason in agenda.failed.items()],
        },
        "cell_hours": sum(found["seconds"] for found in trained) / 3600,
        "resumed_cells": sum(bool(found["resumed_from_steps"]) for found in trained),
        "peak_memory_bytes": max((found["peak_memory_bytes"] for found in trained), default=None),
        "device": trained[0]["device"] if trained else None,
        "config_hash": bench.config.hash,
        "index_hash": bench.cohort.index.hash,
        "versions": versions(),
    }
    summary["comparisons"] = comparisons(out, summary)
    write_json(out / "summary.json", summary)
    return summary


def _learning_rates(agenda: Agenda) -> dict[str, dict[str, Any]]:
    """For each arm and budget the rate that was chosen, from what, and the whole grid's scores."""
    bench = agenda.bench
    found: dict[str, dict[str, Any]] = {}
    for arm in _trained(agenda):
        rows = found[arm.name] = {}
        for cell in agenda.cells:
            if cell.arm != arm or cell.kind != "finetune" or (cell.pretrain_seed, cell.subset_seed) != (0, 0):
                continue
            assert cell.budget is not None
            trials = agenda.trials(cell)
            open_ = any(trial in agenda.left for trial in trials.values())
            multiple = None if open_ else agenda.multiple(cell)
            scores = {f"{m:g}": score_of(bench, t) if bench.done(t) else None for m, t in trials.items()}
            rows[cell.budget.name] = {
                "lr": None if multiple is None else bench.config.lr * multiple,
                "multiple": multiple,
                "from": "selection" if trials else "fixed",
                "scores": scores,
            }
    return found


def _trained(agenda: Agenda) -> Sequence[Arm]:
    design = agenda.bench.design
    return [arm for arm in design.arms if not design.probed(arm)]
