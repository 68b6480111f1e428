"""`medim study`: what pretraining is worth in labels, from the design to results that can be checked."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig
from medim.data.index.index import Index
from medim.evaluation.probing.label_budget import Budget
from medim.files import read_json
from medim.privacy import Scrubber, tokens
from medim.signals import StoppedError
from medim.study.audit.audit import write_audit
from medim.study.audit_study import audit_study
from medim.study.cell import Bench
from medim.study.design import Arm, Task
from medim.study.prepare import DESIGN, Options, prepare
from medim.study.report.report import gather, report
from medim.study.results_table import write_results
from medim.study.scheduler import Agenda, duration
from medim.study.summary import write_summary
from medim.study.time_estimate import Clock
from medim.study.worker_pool import work
from medim.training.tracking.tracking import log_results, track_study
from medim.types import UserError

log = logging.getLogger(__name__)


def study(
    task: Task,
    config: FinetuneConfig,
    index: Index,
    arms: tuple[Arm, ...],
    budgets: Sequence[Budget],
    out: Path,
    options: Options | None = None,
) -> dict[str, Any]:
    """Run every arm at every label budget, paired, and write what came out.

    Args:
        task: what is learnt.
        config: the schedule of all arms.
        index: the images.
        arms: from `medim.study.design.read_arms`, the scratch twin first.
        budgets: how many labels.
        out: the study's folder.
        options: how it is run.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: a refusal (`medim.study.checks`), another study in `out`, or cells that failed.
        UsageError: budgets or options that cannot be.
        StoppedError: cells are left, because of `max_hours` or a signal; what is done is written.
    """
    options = options or Options()
    began, earlier = time.monotonic(), _hours(out) if options.resume else 0.0
    ready = prepare(task, config, index, arms, budgets, out, options)
    cells = ready.bench.design.cells(ready.bench.subsets)
    with track_study(out, _parameters(ready.bench)) as tracker:
        bench = replace(ready.bench, parent_run=tracker.version)
        deadline = None if options.max_hours is None else began + 3600 * options.max_hours
        agenda = Agenda(bench, cells, Clock(bench, ready.costs, cells), deadline, options.jobs)
        log.info("%d of %d cells are left: about %s", len(agenda.left), len(cells), duration(agenda.seconds_left()))
        work(agenda)
        facts = {**ready.facts, "wall_hours": earlier + (time.monotonic() - began) / 3600}
        facts["rejected_cases"] = write_results(out / "results.parquet", bench, cells)
        facts["repeat"] = _repeat(options.command, bench)
        summary = write_summary(out, agenda, facts)
        write_audit(out, audit_study(bench, ready.groups))
        gather(bench)
        report(out)
        files = [out / "summary.json", out / DESIGN]
        log_results(tracker, {"cells": len(cells), "cells_left": len(agenda.left)}, files)
        _leave(agenda, out)
    return summary


def _parameters(bench: Bench) -> dict[str, Any]:
    design = bench.design
    names = {"arms": " ".join(arm.name for arm in design.arms), "budgets": " ".join(b.name for b in design.budgets)}
    return {"task": design.task, **names, "seeds": design.seeds, "index_hash": bench.cohort.index.hash}


def _hours(out: Path) -> float:
    """Of the calls before this one."""
    if not (out / "summary.json").is_file():
        return 0.0
    found = read_json(out / "summary.json")
    if found.get("command") != "study":
        raise UserError(f"{out}: --resume expected a study, got {found.get('command')}. Choose another --out.")
    return float(found["wall_hours"])


def _repeat(command: Sequence[str], bench: Bench) -> str:
    """The command that does it all again: with the steps that were timed here, and no identity in its paths."""
    scrub = Scrubber(tokens(bench.cohort.index.hidden))
    words = ["/".join(scrub.part(part) for part in word.split("/")) for word in command]
    pinned = [] if bench.config.measure_at is not None else ["--set", f"measure_at={list(bench.design.measure_at)}"]
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
