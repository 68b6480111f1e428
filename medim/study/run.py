"""`medim study`: what pretraining is worth in labels, from the design to results that can be checked."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig
from medim.data.index import Index
from medim.data.splits import write_splits
from medim.evaluation.sample import Budget
from medim.files import fresh_folder, hash_of, read_json, write_json
from medim.models.saved import find
from medim.study import checks
from medim.study.agenda import Agenda
from medim.study.cells import Bench
from medim.study.choice import too_small
from medim.study.design import MULTIPLES, Arm, Design, Task
from medim.study.estimate import Clock, measure, on_the_way
from medim.study.summary import write_summary
from medim.study.table import write_results
from medim.study.workers import work
from medim.training.cohort import Cohort
from medim.training.finetune import open_labelled, rehearse
from medim.training.tracking import check_target, log_study, track_study
from medim.training.trainer import StoppedError
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)
DESIGN = "design.json"
STATE = "tracking.json"


def study(
    task: Task,
    config: FinetuneConfig,
    index: Index,
    arms: tuple[Arm, ...],
    budgets: Sequence[Budget],
    out: Path,
    *,
    seeds: int = 1,
    multiples: Sequence[float] | None = None,
    split_seed: int = 0,
    jobs: int = 1,
    strict: bool = False,
    max_hours: float | None = None,
    keep_models: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str = "auto",
    store: Path | None = None,
    command: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run every arm at every label budget, paired, and write what came out.

    Args:
        task: what is learnt.
        config: the schedule of all arms.
        index: the images.
        arms: from `medim.study.design.read_arms`, the scratch twin first.
        budgets: how many labels.
        out: the study's folder.
        seeds: label subsets a budget.
        multiples: of the learning rate, to choose from; empty: nothing is chosen; None: a small grid where the budget
            can pay for it.
        split_seed: of the split by subject where the source defines none.
        jobs: cells at once; with 2 or more, each in a process of its own that stays warm.
        strict: refuse encoders that have seen any of the evaluation split.
        max_hours: begin no cell that is expected to end later.
        keep_models: keep the weights of every cell.
        resume: go on with what is in `out`.
        overwrite: empty `out` first.
        accelerator: Lightning's name of the device kind.
        store: folder of preprocessed images; None is the user's cache.
        command: what was typed, for the record.
        progress: called with the number of cells that are over, and of all.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: a refusal (`medim.study.checks`), another study in `out`, or cells that failed.
        UsageError: budgets or options that cannot be.
        StoppedError: cells are left, because of `max_hours` or a signal; what is done is written.
    """
    began = time.monotonic()
    rehearse(config)
    checks.check_networks(arms)
    check_target()
    fresh_folder(out, resume=resume, overwrite=overwrite)
    cohort = open_labelled(config, index, split_seed=split_seed, store=store, jobs=jobs)
    bench, facts = _bench(task, config, cohort, arms, budgets, out, seeds, multiples, split_seed, strict)
    bench = replace(bench, accelerator=accelerator, keep_models=keep_models)
    log.info("timing a few steps and images")
    costs = measure(bench, jobs)
    bench = _pinned(bench, on_the_way(bench, costs) if not config.measure_at else config.measure_at)
    for seed in range(seeds):
        write_splits(out / "splits" / f"{seed}.csv", index, cohort.splits, cohort.records("train"), seed=seed)
    cells = bench.design.cells(bench.subsets)
    clock = Clock(bench, costs, cells)
    deadline = None if max_hours is None else began + 3600 * max_hours
    with track_study(out.resolve().name, _parameters(bench), run=_tracked(out)) as run:
        write_json(out / STATE, {"schema_version": 1, "run": run})
        bench = replace(bench, parent_run=run)
        agenda = Agenda(bench, cells, clock, deadline, jobs, progress=progress)
        log.info("%d of %d cells are left: about %.1f h", len(agenda.left), len(cells), agenda.seconds_left() / 3600)
        work(agenda)
        facts |= {"command": list(command), "jobs": jobs, "wall_hours": (time.monotonic() - began) / 3600}
        facts["rejected_cases"] = write_results(out / "results.parquet", bench, cells)
        summary = write_summary(out, agenda, facts)
        log_study(run, {"cells": len(cells), "left": len(agenda.left)}, [out / "summary.json", out / DESIGN])
        _leave(agenda, max_hours, out)
    return summary
