"""Prepare a study before its first cell: check its inputs, draw label subsets and write its design."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig, dump_config
from medim.data.index.index import Index
from medim.data.index.records import write_rejections
from medim.data.loading.splits import write_splits
from medim.evaluation.probing.label_budget import Budget
from medim.files import read_json, write_json, write_text
from medim.models.serialization import locate_weights
from medim.output_folder import REJECTIONS_FILE
from medim.renamed_keys import translate_config
from medim.study import checks
from medim.study.audit.groups import Groups, read_groups
from medim.study.cell import StudyContext
from medim.study.content import ArmEntry, PreparationFacts
from medim.study.design import LR_MULTIPLIERS, Arm, Design
from medim.study.lr_selection import describe_subset_shortage
from medim.study.time_estimate import Costs, intermediate_eval_steps, measure_costs
from medim.tasks import find_task
from medim.tracking.target import check_target
from medim.training.engine.launch import find_device
from medim.training.finetune.config import dry_run_finetuning
from medim.training.finetune.run import open_labelled_cohort
from medim.training.finetune.targets import check_class_weights
from medim.training.run_folder import read_run_config
from medim.types import UserError

DESIGN = "design.json"
CONFIG = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a study.

    Attributes:
        seeds: number of label subsets per budget.
        probe_seeds: number of label subsets per budget of frozen arms; None for the same number.
        metric: metric that is compared and that selects the learning rate; None for the primary metric of the task.
        lr_multipliers: factors on the learning rate to select from; empty disables selection; None uses a small grid
            for budgets that are large enough.
        split_seed: random seed of the split by subject, if the source defines no split.
        jobs: number of cells at the same time; with 2 or more, each runs in a persistent worker process.
        fail_on_contamination: whether to reject encoders that were trained on images of the evaluation split.
        max_hours: time limit; no cell is started that is expected to end later.
        keep_models: whether to keep the weights of every cell.
        resume: whether to continue the study in the folder.
        overwrite: whether to empty the folder first.
        accelerator: device kind, in the terms of Lightning.
        store: folder of preprocessed images; None is the cache of the user.
        groups: table of groups for the audit; see `medim.study.audit.groups.read_groups`.
        command: command line, for the record.
    """

    seeds: int = 1
    probe_seeds: int | None = None
    metric: str | None = None
    lr_multipliers: Sequence[float] | None = None
    split_seed: int = 0
    jobs: int = 1
    fail_on_contamination: bool = False
    max_hours: float | None = None
    keep_models: bool = False
    resume: bool = False
    overwrite: bool = False
    accelerator: str = "auto"
    store: Path | None = None
    groups: Path | None = None
    command: Sequence[str] = ()


@dataclass(frozen=True)
class StudySetup:
    """Prepared study.

    Attributes:
        context: data shared by the cells.
        costs: function that returns the duration of steps and images on this machine, timed at the first call.
        groups: groups from the table of the user.
        facts: entries for `summary.json`.
    """

    context: StudyContext
    costs: Callable[[], Costs]
    groups: Groups
    facts: PreparationFacts


def prepare_study(
    task: str,
    config: FinetuneConfig,
    index: Index,
    arms: tuple[Arm, ...],
    budgets: Sequence[Budget],
    out: Path,
    options: StudyOptions,
) -> StudySetup:
    """Check the inputs, draw label subsets, time a few steps, and write design, configuration and splits.

    Raises:
        UserError: the device is not available, a precondition is not met (`medim.study.checks`), the table of groups
            is invalid, or `out` contains another study.
        UsageError: budgets or options are invalid.
    """
    dry_run_finetuning(config)
    check_class_weights(config, index)
    find_device(options.accelerator)
    checks.check_networks(arms)
    metric = checks.check_metric(task, options.metric, index)
    if find_task(task).has_class_labels:
        checks.check_one_class_per_image(index)
    groups = read_groups(options.groups, index.records) if options.groups else {}
    check_target(out if options.resume else None)
    cohort = open_labelled_cohort(config, index, split_seed=options.split_seed, store=options.store, jobs=options.jobs)
    checks.check_disjoint_splits(cohort)
    checks.check_evaluation_split(task, cohort)
    contamination = checks.count_contamination(arms, cohort, fail_on_contamination=options.fail_on_contamination)
    selection_labels = checks.count_selection_labels(arms)
    budgets_by_size, subsets = checks.draw_label_subsets(task, cohort, budgets, options.seeds)
    shortages = {b.name: reason for b in budgets_by_size if (reason := describe_subset_shortage(task, subsets[b, 0]))}
    checks.check_selection_budgets(shortages if options.lr_multipliers else {})
    design = _build_design(task, metric, config, arms, budgets_by_size, shortages, options)
    context = StudyContext(
        out=out,
        design=design,
        config=config,
        cohort=cohort,
        subsets=subsets,
        accelerator=options.accelerator,
        keep_models=options.keep_models,
    )
    costs = cache(partial(measure_costs, context, options.jobs))
    context = _fix_design(context, costs)
    write_text(out / CONFIG, dump_config(config))
    write_rejections(out / REJECTIONS_FILE, (*index.rejected, *cohort.rejections))
    for seed in range(options.seeds):
        write_splits(out / "splits" / f"{seed}.csv", index, cohort.splits, cohort.records("train"), seed=seed)
    facts: PreparationFacts = {
        "arms": [_describe_arm(arm) for arm in arms],
        "counts": checks.count_cohort(task, cohort, subsets),
        "train_val_duplicates": cohort.overlap,
        "contamination": contamination,
        "n_selection_labels": selection_labels,
        "strict": options.fail_on_contamination,
        "no_lr_selection": shortages,
        "jobs": options.jobs,
    }
    return StudySetup(context, costs, groups, facts)


def _build_design(
    task: str,
    metric: str,
    config: FinetuneConfig,
    arms: tuple[Arm, ...],
    budgets: tuple[Budget, ...],
    shortages: Mapping[str, str],
    options: StudyOptions,
) -> Design:
    """Build the design; budgets with a shortage of labels have no selection of the learning rate."""
    lr_multipliers = tuple(LR_MULTIPLIERS if options.lr_multipliers is None else options.lr_multipliers)
    selection_budgets = [b.name for b in budgets if len(lr_multipliers) > 1 and b.name not in shortages]
    return Design(
        task=task,
        arms=arms,
        budgets=budgets,
        seeds=options.seeds,
        split_seed=options.split_seed,
        lr_multipliers=lr_multipliers,
        lr_selections=frozenset((arm.name, name) for arm in arms for name in selection_budgets),
        eval_steps=config.eval_steps or (),
        probe_seeds=options.probe_seeds,
        metric=metric,
    )


def _fix_design(context: StudyContext, costs: Callable[[], Costs]) -> StudyContext:
    """Replace the design by that of `design.json`, which is written if it does not exist.

    Raises:
        UserError: the folder contains another study.
    """
    design, file = context.design, context.out / DESIGN
    content: dict[str, Any] = {
        "schema_version": 1,
        "task": design.task,
        "metric": design.primary_metric,
        "arms": [_describe_arm(arm) for arm in design.arms],
        "budgets": [budget.name for budget in design.budgets],
        "seeds": design.seeds,
        "probe_seeds": design.probe_seeds,
        "split_seed": design.split_seed,
        "learning_rates": list(design.lr_multipliers),
        "where": context.cohort.index.where,
        "index_hash": context.cohort.index.hash,
        "config_hash": context.config.hash,
    }
    if file.is_file():
        previous = translate_config(read_json(file), warn=False)
        previous.setdefault("metric", find_task(design.task).metric)  # the only metric of earlier versions
        previous.setdefault("where", content["where"])  # of earlier versions, whose index_hash decides alone
        content["eval_steps"] = previous.get("eval_steps")  # as timed at the start of the study
        recorded = read_run_config(context.out / CONFIG, FinetuneConfig)
        if recorded and recorded.hash == content["config_hash"]:  # earlier versions hashed the old names of keys
            previous["config_hash"] = recorded.hash
        differences = [
            f"{key} {previous.get(key)} (now {value})" for key, value in content.items() if previous.get(key) != value
        ]
        if differences:
            raise UserError(
                f"{file}: --resume needs the same study; the one in the folder had {', '.join(differences)}. "
                "Use --overwrite to start over, or another --out."
            )
    else:
        needs_timing = context.config.eval_steps is None
        content["eval_steps"] = list(intermediate_eval_steps(context, costs()) if needs_timing else design.eval_steps)
    write_json(file, content)
    return replace(context, design=replace(design, eval_steps=tuple(content["eval_steps"])))


def _describe_arm(arm: Arm) -> ArmEntry:
    return {
        "name": arm.name,
        "protocol": arm.protocol,
        "encoders": [locate_weights(run)[1].sha256 for run in arm.runs],
    }
