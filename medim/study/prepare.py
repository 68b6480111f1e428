"""Everything before the first cell of a study: what is refused, what is drawn, and what its folder says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig, dump
from medim.data.index.index import Index
from medim.data.loading.splits import write_splits
from medim.evaluation.probing.label_budget import Budget
from medim.files import fresh_folder, read_json, write_json, write_text
from medim.models.serialization import find
from medim.study import checks
from medim.study.audit.groups import Groups, read_groups
from medim.study.cell import Bench
from medim.study.design import MULTIPLES, Arm, Design, Task
from medim.study.lr_selection import too_small
from medim.study.time_estimate import Costs, measure, on_the_way
from medim.training.finetune.run import open_labelled, rehearse
from medim.training.tracking.tracking import check_target
from medim.types import UserError

DESIGN = "design.json"


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Attributes:
        seeds: label subsets a budget.
        probe_seeds: the same, of arms that stay frozen; None: as many.
        multiples: of the learning rate, to choose from; empty: nothing is chosen; None: a small grid where the budget
            can pay for it.
        split_seed: of the split by subject where the source defines none.
        jobs: cells at once; with 2 or more, each in a process of its own that stays warm.
        strict: refuse encoders that have seen any of the evaluation split.
        max_hours: begin no cell that is expected to end later.
        keep_models: keep the weights of every cell.
        resume: go on with what is in the folder.
        overwrite: empty the folder first.
        accelerator: Lightning's name of the device kind.
        store: folder of preprocessed images; None is the user's cache.
        groups: table of groups for the audit; see `medim.study.audit.groups.read_groups`.
        command: what was typed, for the record.
    """

    seeds: int = 1
    probe_seeds: int | None = None
    multiples: Sequence[float] | None = None
    split_seed: int = 0
    jobs: int = 1
    strict: bool = False
    max_hours: float | None = None
    keep_models: bool = False
    resume: bool = False
    overwrite: bool = False
    accelerator: str = "auto"
    store: Path | None = None
    groups: Path | None = None
    command: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """A study that may begin.

    Attributes:
        bench: what its cells share.
        costs: of steps and images on this machine, timed when they are first asked for.
        groups: of the user's table.
        facts: what `summary.json` says of it.
    """

    bench: Bench
    costs: Callable[[], Costs]
    groups: Groups
    facts: dict[str, Any]


def prepare(
    task: Task,
    config: FinetuneConfig,
    index: Index,
    arms: tuple[Arm, ...],
    budgets: Sequence[Budget],
    out: Path,
    options: Options,
) -> Prepared:
    """Refuse what cannot be a study, draw its labels, time a few steps, and write design, configuration and splits.

    Raises:
        UserError: a refusal (`medim.study.checks`), a table of groups that is none, or another study in `out`.
        UsageError: budgets or options that cannot be.
    """
    rehearse(config)
    checks.check_networks(arms)
    if task == "classification":
        checks.check_labels(index)
    groups = read_groups(options.groups, index.records) if options.groups else {}
    check_target(out if options.resume else None)
    fresh_folder(out, resume=options.resume, overwrite=options.overwrite)
    cohort = open_labelled(config, index, split_seed=options.split_seed, store=options.store, jobs=options.jobs)
    checks.check_sides(cohort)
    checks.check_cases(task, cohort)
    seen = checks.count_seen(arms, cohort, strict=options.strict)
    chosen_with = checks.count_chosen(arms)
    ordered, subsets = checks.draw(task, cohort, budgets, options.seeds)
    fixed = {b.name: why for b in ordered if (why := too_small(task, subsets[b, 0]))}
    checks.check_selection(fixed if options.multiples else {})
    grid = tuple(MULTIPLES if options.multiples is None else options.multiples)
    chosen = frozenset((arm.name, b.name) for arm in arms for b in ordered if len(grid) > 1 and b.name not in fixed)
    seeds = options.seeds, options.split_seed
    design = Design(task, arms, ordered, *seeds, grid, chosen, config.measure_at or (), options.probe_seeds)
    bench = Bench(out, design, config, cohort, subsets, None, options.accelerator, options.keep_models)
    costs = cache(partial(measure, bench, options.jobs))
    bench = _settled(bench, costs)
    write_text(out / "config.yaml", dump(config))
    for seed in range(options.seeds):
        write_splits(out / "splits" / f"{seed}.csv", index, cohort.splits, cohort.records("train"), seed=seed)
    facts = {
        "arms": [_told(arm) for arm in arms],
        "counts": checks.counts_of(task, cohort, subsets),
        "overlap": cohort.overlap,
        "seen": seen,
        "chosen_with_labels": chosen_with,
        "strict": options.strict,
        "too_small_to_choose": fixed,
        "jobs": options.jobs,
    }
    return Prepared(bench, costs, groups, facts)


def _settled(bench: Bench, costs: Callable[[], Costs]) -> Bench:
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
        "probe_seeds": design.probe_seeds,
        "split_seed": design.split_seed,
        "learning_rates": list(design.multiples),
        "index_hash": bench.cohort.index.hash,
        "config_hash": bench.config.hash,
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
    else:
        timed = bench.config.measure_at is None
        content["measure_at"] = list(on_the_way(bench, costs()) if timed else design.measure_at)
    write_json(file, content)
    return replace(bench, design=replace(design, measure_at=tuple(content["measure_at"])))


def _told(arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "protocol": arm.protocol, "encoders": [find(run)[1]["sha256"] for run in arm.runs]}
