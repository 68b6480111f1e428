"""Write `summary.json` of a study, its last file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from medim.files import write_json
from medim.metrics.segmentation import METRIC_RULE
from medim.study.cell import StudyContext, read_cell_summary, read_selection_score
from medim.study.comparisons import build_comparisons
from medim.study.content import LearningRateEntry, LostClassEntry, StudyFacts, StudySummary
from medim.study.design import Arm, Cell
from medim.study.scheduler import Scheduler
from medim.version import collect_versions

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2


def write_summary(out: Path, scheduler: Scheduler, facts: StudyFacts) -> StudySummary:
    """Write `summary.json`.

    Args:
        out: folder of the study, with `results.parquet`.
        scheduler: scheduler with the state of the cells.
        facts: facts recorded before the first cell, and options of the study.

    Returns:
        Content of `summary.json`.
    """
    context, cells = scheduler.context, scheduler.cells
    design, complete_cells = context.design, [cell for cell in cells if context.is_complete(cell)]
    summaries = [read_cell_summary(context, cell) for cell in complete_cells if cell.kind != "probe"]
    summary: StudySummary = {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "task": design.task,
        "complete": not scheduler.remaining
        and all(context.is_complete(cell) for cell in cells if cell.kind != "selection"),
        "metric": design.primary_metric,
        "metric_rule": METRIC_RULE,
        "budgets": {budget.name: len(context.subsets[budget, 0]) for budget in design.budgets},
        "seeds": design.seeds,
        "probe_seeds": design.probe_seeds,
        "split_seed": design.split_seed,
        "eval_steps": list(design.eval_steps),
        "steps": context.config.max_steps,
        **facts,
        "learning_rates": _summarise_learning_rates(scheduler),
        "cells": {
            "all": len(cells),
            "done": len(complete_cells),
            "left": [str(cell) for cell in scheduler.remaining],
            "failed": [{"cell": str(cell), "reason": reason} for cell, reason in scheduler.failures.items()],
        },
        "lost_classes": _list_lost_classes(context, complete_cells),
        "cell_hours": sum(cell_summary["seconds"] for cell_summary in summaries) / 3600,
        "n_resumed_cells": sum(bool(cell_summary["resumed_from_steps"]) for cell_summary in summaries),
        "peak_memory_bytes": max((cell_summary["peak_memory_bytes"] for cell_summary in summaries), default=None),
        "device": summaries[0]["device"] if summaries else None,
        "config_hash": context.config.hash,
        "index_hash": context.cohort.index.hash,
        "where": context.cohort.index.where,
        "versions": collect_versions(),
        "comparisons": None,
    }
    summary["comparisons"] = build_comparisons(out, summary)
    write_json(out / "summary.json", summary)
    if lost := summary["lost_classes"]:
        log.warning(
            "%d of %d fine-tuned cells do not find some class (first: %s: %s). They were probably not trained long "
            "enough: increase max_steps (now %d)",
            len(lost),
            sum(cell.kind == "finetune" for cell in complete_cells),
            lost[0]["cell"],
            ", ".join(lost[0]["classes"]),
            context.config.max_steps,
        )
    return summary


def _list_lost_classes(context: StudyContext, cells: Sequence[Cell]) -> list[LostClassEntry]:
    """List the fine-tuned cells whose model does not find some class; cells of earlier versions have no record."""
    entries: list[LostClassEntry] = []
    for cell in cells:
        lost = read_cell_summary(context, cell).get("lost_classes") if cell.kind == "finetune" else None
        if lost:
            entries.append({"cell": str(cell), "classes": lost})
    return entries


def _summarise_learning_rates(scheduler: Scheduler) -> dict[str, dict[str, LearningRateEntry]]:
    """Summarise the selected learning rate by arm and budget, with the scores of all factors."""
    context = scheduler.context
    rates: dict[str, dict[str, LearningRateEntry]] = {}
    for arm in _list_finetune_arms(scheduler):
        rows = rates[arm.name] = {}
        for cell in scheduler.cells:
            if cell.arm != arm or cell.kind != "finetune" or (cell.pretrain_seed, cell.subset_seed) != (0, 0):
                continue
            assert cell.budget is not None
            trials = scheduler.trials(cell)
            is_open = any(trial in scheduler.remaining for trial in trials.values())
            lr_multiplier = None if is_open else scheduler.lr_multiplier(cell)
            scores = {
                f"{m:g}": read_selection_score(context, t) if context.is_complete(t) else None
                for m, t in trials.items()
            }
            rows[cell.budget.name] = {
                "lr": None if lr_multiplier is None else context.config.lr * lr_multiplier,
                "multiple": lr_multiplier,
                "from": "selection" if trials else "fixed",
                "scores": scores,
            }
    return rates


def _list_finetune_arms(scheduler: Scheduler) -> Sequence[Arm]:
    design = scheduler.context.design
    return [arm for arm in design.arms if not design.is_probe_arm(arm)]
