"""`medim study`: what pretraining is worth in labels, from the design to results that can be checked."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig, dump
from medim.data.identity import Scrubber, tokens
from medim.data.index import Index
from medim.data.splits import write_splits
from medim.evaluation.sample import Budget
from medim.files import fresh_folder, read_json, write_json, write_text
from medim.models.saved import find
from medim.study import checks
from medim.study.agenda import Agenda, duration
from medim.study.cells import Bench
from medim.study.choice import too_small
from medim.study.design import MULTIPLES, Arm, Design, Task
from medim.study.estimate import Clock, Costs, measure, on_the_way
from medim.study.report import gather, report
from medim.study.summary import write_summary
from medim.study.table import write_results
from medim.study.workers import work
from medim.training.finetune import open_labelled, rehearse
from medim.training.tracking import check_target, log_study, track_study
from medim.training.trainer import StoppedError
from medim.types import UserError

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
    if task == "classification":
        checks.check_labels(index)
    check_target()
    fresh_folder(out, resume=resume, overwrite=overwrite)
    cohort = open_labelled(config, index, split_seed=split_seed, store=store, jobs=jobs)
    checks.check_sides(cohort)
    checks.check_cases(task, cohort)
    seen = checks.count_seen(arms, cohort, strict=strict)
    ordered, subsets = checks.draw(task, cohort, budgets, seeds)
    fixed = {b.name: why for b in ordered if (why := too_small(task, subsets[b, 0]))}
    checks.check_selection(fixed if multiples else {})
    grid = tuple(MULTIPLES if multiples is None else multiples)
    chosen = frozenset((arm.name, b.name) for arm in arms for b in ordered if len(grid) > 1 and b.name not in fixed)
    design = Design(task, arms, ordered, seeds, split_seed, grid, chosen, config.measure_at)
    bench = Bench(out, design, config, cohort, subsets, None, accelerator, keep_models)
    log.info("timing a few steps and images on this machine")
    costs = measure(bench, jobs)
    bench = _settled(bench, costs)
    write_text(out / "config.yaml", dump(config))
    for seed in range(seeds):
        write_splits(out / "splits" / f"{seed}.csv", index, cohort.splits, cohort.records("train"), seed=seed)
    cells = bench.design.cells(subsets)
    facts = {
        "arms": [_told(arm) for arm in arms],
        "counts": checks.counts_of(task, cohort, subsets),
        "overlap": cohort.overlap,
        "seen": seen,
        "strict": strict,
        "too_small_to_choose": fixed,
        "jobs": jobs,
    }
    with track_study(out.resolve().name, _parameters(bench), run=_tracked(out)) as run:
        write_json(out / STATE, {"schema_version": 1, "run": run})
        bench = replace(bench, parent_run=run)
        deadline = None if max_hours is None else began + 3600 * max_hours
        agenda = Agenda(bench, cells, Clock(bench, costs, cells), deadline, jobs)
        log.info("%d of %d cells are left: about %s", len(agenda.left), len(cells), duration(agenda.seconds_left()))
        work(agenda)
        facts["wall_hours"] = (time.monotonic() - began) / 3600
        facts["rejected_cases"] = write_results(out / "results.parquet", bench, cells)
        facts["repeat"] = _repeat(command, bench)
        summary = write_summary(out, agenda, facts)
        gather(bench)
        report(out)
        log_study(run, {"cells": len(cells), "cells_left": len(agenda.left)}, [out / "summary.json", out / DESIGN])
        _leave(agenda, out)
    return summary


def _settled(bench: Bench, costs: Costs) -> Bench:
    """The bench with its design as `design.json` has it, which is written where there is none.

    Raises:
        UserError: the folder holds another study.
    """
    design, file = bench.design, bench.out / DESIGN
    content: dict[str, Any] = {
        "schema_version": 1,
        "task": design.task,
        "arms": [_told(arm) for arm in design.arms],
        "budgets": [budget.name for budget in design.budgets],
        "seeds": design.seeds,
        "split_seed": design.split_seed,
        "learning_rates": list(design.multiples),
        "index_hash": bench.cohort.index.hash,
        "config_hash": bench.config.hash,
        "measure_at": list(design.measure_at or on_the_way(bench, costs)),
    }
    if file.is_file():
        known = read_json(file)
        content["measure_at"] = known.get("measure_at")  # as it was timed when the study began
        other = [f"{key} {known.get(key)} (now {now})" for key, now in content.items() if known.get(key) != now]
        if other:
            raise UserError(
                f"{file}: --resume expected the same study, got another; it had {', '.join(other)}. "
                "Use --overwrite to start over, or another --out."
            )
    write_json(file, content)
    return replace(bench, design=replace(design, measure_at=tuple(content["measure_at"])))


def _told(arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "protocol": arm.protocol, "encoders": [find(run)[1]["sha256"] for run in arm.runs]}


def _parameters(bench: Bench) -> dict[str, Any]:
    design = bench.design
    names = {"arms": " ".join(arm.name for arm in design.arms), "budgets": " ".join(b.name for b in design.budgets)}
    return {"task": design.task, **names, "seeds": design.seeds, "index_hash": bench.cohort.index.hash}


def _tracked(out: Path) -> str | None:
    """MLflow's id of the study that is taken up."""
    return str(read_json(out / STATE)["run"]) if (out / STATE).is_file() else None


def _repeat(command: Sequence[str], bench: Bench) -> str:
    """The command that does it all again: with the steps that were timed here, and no identity in its paths."""
    scrub = Scrubber(tokens(bench.cohort.index.hidden))
    words = ["/".join(scrub.part(part) for part in word.split("/")) for word in command]
    pinned = [] if bench.config.measure_at else ["--set", f"measure_at={list(bench.design.measure_at)}"]
    return shlex.join([*words, *pinned]) if words else ""


def _leave(agenda: Agenda, out: Path) -> None:
    """Say what is left, by the exit code that a queue goes by."""
    if agenda.left:
        raise StoppedError(
            f"{out}: {len(agenda.left)} of {len(agenda.cells)} cells are left, about "
            f"{duration(agenda.seconds_left())}; what is done is in results.parquet, --resume continues."
        )
    if agenda.failed:
        told = "; ".join(f"{cell}: {reason}" for cell, reason in agenda.failed.items() if cell.kind != "selection")
        if told:
            raise UserError(f"{out}: the rest is done, but these cells failed: {told}. --resume tries them again.")
