"""`medim study`: measure the value of pretraining in labels, from the design to the report."""

from __future__ import annotations

import logging
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.config import FinetuneConfig
from medim.data.index.index import Index
from medim.evaluation.probing.label_budget import Budget
from medim.migrations import read_checked_json
from medim.models.serialization import locate_weights
from medim.output_folder import output_folder
from medim.privacy import Scrubber, format_path, identity_tokens
from medim.signals import StoppedError
from medim.study.audit.audit import write_audit
from medim.study.audit_study import audit_study
from medim.study.cell import StudyContext, remove_leftovers
from medim.study.content import StudyFacts, StudySummary
from medim.study.design import Arm
from medim.study.prepare import DESIGN, StudyOptions, prepare_study
from medim.study.report.curves import build_curves_section
from medim.study.report.report import write_report_data, write_study_page
from medim.study.report.view import open_study
from medim.study.results_table import write_results
from medim.study.scheduler import Scheduler, format_remaining_time
from medim.study.summary import write_summary
from medim.study.time_estimate import DurationEstimator
from medim.study.worker_pool import run_all
from medim.tracking.lineage import Source, make_source
from medim.tracking.target import is_tracking_enabled
from medim.tracking.tracker import Tracker
from medim.tracking.tracking import log_results, name_run, track_study
from medim.training.run_folder import log_failure
from medim.types import UserError

log = logging.getLogger(__name__)
STUDY_FILES = (  # patterns of all files of a study
    *("config.yaml", "design.json", "pretraining.json", "audit.json", "summary.json", "results.parquet", "report.html"),
    *("worst.json", "mlflow.json", "mlflow.jsonl", "splits/*", "cells/*", "selection/*"),
)
STUDY_START_FILES = (  # files before the first cell
    *("config.yaml", "design.json", "pretraining.json", "mlflow.json", "mlflow.jsonl", "splits/*"),
)


def study(
    task: str,
    config: FinetuneConfig,
    index: Index,
    arms: tuple[Arm, ...],
    budgets: Sequence[Budget],
    out: Path,
    options: StudyOptions | None = None,
) -> StudySummary:
    """Run every arm at every label budget, paired, and write results, audit and report.

    Args:
        task: task of the fine-tuned models.
        config: configuration with the schedule of all arms.
        index: index of the images.
        arms: arms from `medim.study.design.read_arms`, beginning with scratch.
        budgets: label budgets.
        out: folder of the study.
        options: options of the study.

    Returns:
        Content of `summary.json`.

    Raises:
        UserError: a precondition is not met (`medim.study.checks`), `out` contains another study, or cells failed.
        UsageError: budgets or options are invalid.
        StoppedError: cells remain, because of `max_hours` or a signal; the completed ones are in the results.
    """
    options = options or StudyOptions()
    inputs = [index.root, *(run for arm in arms for run in arm.runs)]
    with output_folder(
        out,
        "study",
        overwrite=options.overwrite,
        resume=options.resume,
        inputs=[*inputs, *([options.groups] if options.groups else [])],
        direct_files=STUDY_FILES,
        start_files=STUDY_START_FILES,
    ) as folder:
        return _run_study(task, config, index, arms, budgets, folder, options, name=out.resolve().name)


def _run_study(
    task: str,
    config: FinetuneConfig,
    index: Index,
    arms: tuple[Arm, ...],
    budgets: Sequence[Budget],
    out: Path,
    options: StudyOptions,
    *,
    name: str,
) -> StudySummary:
    """Run the study in a prepared folder."""
    start, previous_hours = time.monotonic(), _read_previous_hours(out) if options.resume else 0.0
    setup = prepare_study(task, config, index, arms, budgets, out, options)
    cells = setup.context.design.list_cells(setup.context.subsets)
    parameters = _collect_study_parameters(setup.context)
    with track_study(out, name_run(out, f"{task}-study"), parameters, _list_sources(arms)) as tracker:
        context = replace(setup.context, parent_run=tracker.run_id)
        deadline = None if options.max_hours is None else start + 3600 * options.max_hours
        estimator = DurationEstimator(context, setup.costs, cells)
        scheduler = Scheduler(
            context=context, cells=cells, estimate_seconds=estimator, deadline=deadline, jobs=options.jobs
        )
        _log_remaining_cells(scheduler)
        remove_leftovers(context, cells)
        run_all(scheduler)
        facts: StudyFacts = {
            **setup.facts,
            "wall_hours": previous_hours + (time.monotonic() - start) / 3600,
            "rejected_cases": write_results(out / "results.parquet", context, cells),
            "command_line": _format_repeat_command(options.command, context),
        }
        summary = write_summary(out, scheduler, facts)
        write_audit(out, audit_study(context, setup.groups))
        write_report_data(context)
        write_study_page(out, name=name)
        with log_failure("records of the results for MLflow", "The study folder contains all results."):
            _log_study(tracker, summary, scheduler, out)
        _raise_if_incomplete(scheduler, out)
    return summary


def _log_remaining_cells(scheduler: Scheduler) -> None:
    remaining_time = format_remaining_time(scheduler.remaining_seconds())
    log.info("%d of %d cells are left: about %s", len(scheduler.remaining), len(scheduler.cells), remaining_time)


def _collect_study_parameters(context: StudyContext) -> dict[str, object]:
    design = context.design
    names = {"arms": " ".join(arm.name for arm in design.arms), "budgets": " ".join(b.name for b in design.budgets)}
    index = context.cohort.index
    return {
        "task": design.task,
        **names,
        "seeds": design.seeds,
        "where": index.public_where,
        "index_hash": index.hash,
    }


def _list_sources(arms: Sequence[Arm]) -> list[Source]:
    """List the encoders of all arms."""
    runs = dict.fromkeys(run for arm in arms for run in arm.runs)
    return [make_source("encoder", locate_weights(run)[1].sha256, run) for run in runs]


def _log_study(tracker: Tracker, summary: StudySummary, scheduler: Scheduler, out: Path) -> None:
    """Log the comparisons with their intervals, as metrics and as a table, and the files without images."""
    metrics: dict[str, float] = {"cells": len(scheduler.cells), "cells_left": len(scheduler.remaining)}
    rows = []
    for row in summary["comparisons"]["rows"] if summary["comparisons"] else []:
        difference, prefix = row["difference"], f"{row['arm']}/{row['budget']}/"
        values = {"scratch": row["scratch"], summary["metric"]: row["value"], "difference": difference["value"]}
        values |= {"difference_low": difference["low"], "difference_high": difference["high"]}
        metrics |= {f"{prefix}{name}": value for name, value in values.items()}
        rows.append(
            {"arm": row["arm"], "budget": row["budget"], **values, "p": row["p_corrected"], "verdict": row["verdict"]}
        )
    if rows:
        tracker.log_table("comparisons", rows)
    if is_tracking_enabled():
        for number, figure in enumerate(build_curves_section(open_study(out)).figures, start=1):
            tracker.log_text(f"figures/curve-{number}.svg", str(figure.svg))
    log_results(tracker, metrics, [out / "summary.json", out / DESIGN])


class _PreviousSummary(TypedDict):
    command: str
    wall_hours: NotRequired[float]


def _read_previous_hours(out: Path) -> float:
    """Read the duration of the earlier calls in hours."""
    if not (out / "summary.json").is_file():
        return 0.0
    summary = read_checked_json(out / "summary.json", "study", _PreviousSummary)
    if summary.get("command") != "study":
        raise UserError(f"{out}: --resume expected a study, got {summary.get('command')}. Use another --out.")
    return float(summary.get("wall_hours", 0.0))


def _format_repeat_command(command: Sequence[str], context: StudyContext) -> str:
    """Format the command that repeats the study, with the steps timed here and without identities in paths."""
    scrubber = Scrubber(identity_tokens(context.cohort.index.identity_parts))
    pieces = ([_format_command_piece(piece, scrubber) for piece in re.split(r"([=,])", word)] for word in command)
    words = _replace_condition(["".join(parts) for parts in pieces], context.cohort.index.where)
    overrides = (
        [] if context.config.eval_steps is not None else ["--set", f"eval_steps={list(context.design.eval_steps)}"]
    )
    return shlex.join([*words, *overrides]) if words else ""


def _replace_condition(words: Sequence[str], where: str | None) -> list[str]:
    """Replace the condition of `--where` by the recorded one, which has no names that the index hides."""
    return [
        (where or "") if previous == "--where" else f"--where={where or ''}" if word.startswith("--where=") else word
        for previous, word in zip(["", *words], words, strict=False)
    ]


def _format_command_piece(piece: str, scrubber: Scrubber) -> str:
    """Format a piece of a command line: a path as in messages, and all else unchanged."""
    is_path = "/" in piece or (piece not in ("", ".") and Path(piece).exists())
    return scrubber.scrub_path(PurePath(format_path(piece))) if is_path else piece


def _raise_if_incomplete(scheduler: Scheduler, out: Path) -> None:
    """Raise an error if cells remain or failed; its exit code is for job queues."""
    if scheduler.remaining:
        raise StoppedError(
            f"{out}: {len(scheduler.remaining)} of {len(scheduler.cells)} cells are left, about "
            f"{format_remaining_time(scheduler.remaining_seconds())}. The results so far are in results.parquet; "
            f"--resume continues the study."
        )
    if scheduler.failures:
        listing = "; ".join(
            f"{cell}: {reason}" for cell, reason in scheduler.failures.items() if cell.kind != "selection"
        )
        if listing:
            raise UserError(f"{out}: these cells failed: {listing}. The others are complete. --resume retries them.")
