"""Commands that measure and report: `evaluate`, `probe`, `study`, `report`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medim.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    FailOnContaminationOption,
    ImageColumnOption,
    KeepNamesOption,
    LabelColumnOption,
    LabelsOption,
    OutOption,
    OverwriteOption,
    PublicKeyOption,
    ResumeOption,
    SetOption,
    SplitSeedOption,
    SubjectColumnOption,
    SubjectsOption,
    WhereOption,
)
from medim.cli.sources import read_source
from medim.cli.terminal import format_averages, format_intervals, format_or_dash, print_result
from medim.cli.tracking import start_tracking, track_evaluation, track_probe
from medim.console.progress import show_progress
from medim.tasks import STUDY_TASKS
from medim.types import UsageError

if TYPE_CHECKING:
    from medim.study.content import StudySummary

PER_CALL_OPTIONS = ("--resume", "--overwrite", "--quiet", "--debug")  # of the command to repeat a study


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Command-line arguments of `medim evaluate`."""

    model: Annotated[Path, typer.Argument(help="A fine-tuning run or a package.")]
    out: OutOption
    data: DataOption = None
    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        typer.Option(
            help="Split to measure on. Default: test if the source has one; val for the source of the fine-tuning; "
            "otherwise all."
        ),
    ] = None
    include_training_subjects: Annotated[
        bool,
        typer.Option("--include-training-subjects", help="Measure also on images and subjects of the training data."),
    ] = False
    fail_on_contamination: FailOnContaminationOption = False
    labels: LabelsOption = None
    image_column: ImageColumnOption = None
    label_column: LabelColumnOption = None
    subject_column: SubjectColumnOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    public_key: PublicKeyOption = None
    overwrite: OverwriteOption = False
    device: DeviceOption = "auto"


def evaluate(arguments: EvaluateArguments) -> None:
    """Evaluate a model on labelled images.

    Each metric has a 95 % interval over subjects.
    """
    from medim.data.contamination import describe_counts
    from medim.evaluation.evaluate import EvaluateOptions
    from medim.evaluation.evaluate import evaluate as run
    from medim.integrity import require_signature
    from medim.models.serialization import locate_weights

    start = start_tracking()
    require_signature(arguments.model, arguments.public_key)
    spec = locate_weights(arguments.model)[1]
    image_index, _ = read_source(arguments, spec.modality, out=arguments.out)
    options = EvaluateOptions(
        split=arguments.split,
        include_training_subjects=arguments.include_training_subjects,
        fail_on_contamination=arguments.fail_on_contamination,
        overwrite=arguments.overwrite,
        device=arguments.device,
    )
    metrics = run(arguments.model, image_index, arguments.out, options, progress=show_progress("measured"))
    counts = {
        "cases": f"{metrics['n']}, split {metrics['split']}",
        "excluded subjects": metrics["n_excluded_subjects"],
        **describe_counts(metrics["contamination"]),
    }
    print_result("evaluate", {**counts, **format_intervals(metrics), "written to": arguments.out})
    track_evaluation(arguments.model, spec, arguments.out, metrics, start)


@dataclass(frozen=True, kw_only=True)
class ProbeArguments:
    """Command-line arguments of `medim probe`."""

    encoder: Annotated[Path, typer.Argument(help="A pretraining run or its package.")]
    data: DataOption = None
    protocol: Annotated[
        str,
        typer.Option(
            metavar="PROTOCOL",
            help="Probe: linear (logistic regression) or knn (nearest neighbours) for classes; ridge (ridge "
            "regression) for numbers.",
        ),
    ] = "linear"
    label_fraction: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FRACTION",
            help="Label budget as a fraction of the labelled training images. May be repeated. Default: 1.0.",
        ),
    ] = None
    labelled: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Label budget in images. May be repeated.")
    ] = None
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Number of label subsets per budget, drawn with seeds 0 to N - 1.", min=1)
    ] = 1
    levels: Annotated[
        list[int] | None,
        typer.Option(
            "--levels",
            metavar="N",
            help="Level of a feature map (0 is the finest) to add to the summary as mean and maximum. May be repeated. "
            "Default: all levels.",
        ),
    ] = None
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="Measure an untrained encoder and a PCA of the pixels too."),
    ] = True
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Output folder. Default: <RUN>-probe-<protocol>.")
    ] = None
    labels: LabelsOption = None
    image_column: ImageColumnOption = None
    label_column: LabelColumnOption = None
    subject_column: SubjectColumnOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    split_seed: SplitSeedOption = 0
    fail_on_contamination: FailOnContaminationOption = False
    public_key: PublicKeyOption = None
    overwrite: OverwriteOption = False
    device: DeviceOption = "auto"


def probe(arguments: ProbeArguments) -> None:
    """Evaluate a frozen encoder.

    A simple classifier or regression is fitted to its features.
    """
    from medim.data.contamination import describe_counts
    from medim.evaluation.probing.label_budget import Budget
    from medim.evaluation.probing.probe import ProbeOptions
    from medim.evaluation.probing.probe import probe as run
    from medim.integrity import require_signature
    from medim.models.serialization import locate_weights

    start = start_tracking()
    require_signature(arguments.encoder, arguments.public_key)
    spec = locate_weights(arguments.encoder)[1]
    budgets = [Budget(fraction=f) for f in arguments.label_fraction or ([] if arguments.labelled else [1.0])]
    budgets += [Budget(labelled=n) for n in arguments.labelled or []]
    encoder_name = arguments.encoder.resolve().name
    folder = arguments.out or arguments.encoder.with_name(f"{encoder_name}-probe-{arguments.protocol}")
    image_index, store = read_source(arguments, spec.modality, out=folder)
    options = ProbeOptions(
        protocol=arguments.protocol,
        budgets=budgets,
        seeds=range(arguments.seeds),
        levels=arguments.levels,
        split_seed=arguments.split_seed,
        baselines=arguments.baselines,
        overwrite=arguments.overwrite,
        store=store,
        fail_on_contamination=arguments.fail_on_contamination,
        device=arguments.device,
    )
    result = run(arguments.encoder, image_index, folder, options)
    counts = {"validation images": result["n"], **describe_counts(result["contamination"])}
    print_result("probe", {**format_averages(result["summary"]), **counts, "written to": folder})
    track_probe(arguments.encoder, spec, folder, result, start)


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Command-line arguments of `medim study`."""

    task: Annotated[str, typer.Option(help="Prediction task.", metavar=f"[{'|'.join(STUDY_TASKS)}]")]
    out: OutOption
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RUN[,RUN2,...]",
            help="An arm: one pretraining run or package per seed. May be repeated.",
        ),
    ] = None
    frozen: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RUN[,RUN2,...]", help="An arm with a frozen encoder. May be repeated."),
    ] = None
    data: DataOption = None
    labelled: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Label budget in images. May be repeated.")
    ] = None
    label_fraction: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FRACTION",
            help="Label budget as a fraction of the labelled training images. May be repeated. Default: 1.0.",
        ),
    ] = None
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Number of label subsets per budget, drawn with seeds 0 to N - 1.", min=1)
    ] = 1
    probe_seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of label subsets per budget for frozen arms. Default: --seeds.", min=1),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Metric that is compared and that selects the learning rate. Default: auroc for classification, dice "
            "for segmentation, r2 for regression.",
        ),
    ] = None
    lr_multipliers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Candidate multiples of the preset's learning rate, such as 0.3,1,3; or fixed. Default: 0.3,1,3 if "
            "the budget is large enough.",
        ),
    ] = None
    jobs: Annotated[
        int,
        typer.Option(metavar="N", help="Number of cells that run at once; 2 or more use persistent processes.", min=1),
    ] = 1
    max_hours: Annotated[
        float | None,
        typer.Option(metavar="HOURS", help="Start no cell that would end later; exit code 75 if cells remain."),
    ] = None
    labels: LabelsOption = None
    image_column: ImageColumnOption = None
    label_column: LabelColumnOption = None
    subject_column: SubjectColumnOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV with a column image or subject, and any others (site, sex, scanner): the audit reports metrics "
            "per group, and whether features predict the group.",
        ),
    ] = None
    config: ConfigOption = None
    set_: SetOption = None
    split_seed: SplitSeedOption = 0
    fail_on_contamination: FailOnContaminationOption = False
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Save the weights of every cell.")] = False
    resume: ResumeOption = False
    overwrite: OverwriteOption = False
    device: DeviceOption = "auto"


def study(arguments: StudyArguments) -> None:
    """Compare pretrained encoders with training from scratch.

    The comparison is over label budgets, seeds and subjects.
    """
    from medim.evaluation.probing.label_budget import Budget
    from medim.study.checks import check_networks
    from medim.study.design import read_arms
    from medim.study.prepare import StudyOptions
    from medim.study.run import study as run
    from medim.training.finetune.config import resolve_finetune_config

    arms = read_arms(arguments.encoder or [], arguments.frozen or [])
    lr_multipliers = _parse_multipliers(arguments.lr_multipliers)
    budgets = [Budget(labelled=n) for n in arguments.labelled or []]
    budgets += [Budget(fraction=f) for f in arguments.label_fraction or ([] if arguments.labelled else [1.0])]
    spec = check_networks(arms)  # a mistake in these shows before images are read
    first_run = next(run for arm in arms for run in arm.runs)
    config_args = arguments.task, spec.modality, first_run, arguments.config, arguments.set_ or []
    resolve_finetune_config(*config_args)
    image_index, store = read_source(arguments, spec.modality, out=arguments.out)
    settings = resolve_finetune_config(*config_args, index=image_index)
    options = StudyOptions(
        seeds=arguments.seeds,
        probe_seeds=arguments.probe_seeds,
        metric=arguments.metric,
        lr_multipliers=lr_multipliers,
        split_seed=arguments.split_seed,
        jobs=arguments.jobs,
        fail_on_contamination=arguments.fail_on_contamination,
        max_hours=arguments.max_hours,
        keep_models=arguments.keep_models,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        accelerator=arguments.device,
        store=store,
        groups=arguments.groups,
        command=repeat_command(sys.argv),
    )
    summary = run(arguments.task, settings, image_index, arms, budgets, arguments.out, options)
    print_result(
        "study", {**_format_comparisons(summary), "cells": summary["cells"]["done"], "written to": arguments.out}
    )


def _parse_multipliers(text: str | None) -> tuple[float, ...] | None:
    if text is None or text == "fixed":
        return None if text is None else ()
    try:
        multipliers = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        multipliers = ()
    if len(multipliers) < 2 or not all(0 < multiplier < math.inf for multiplier in multipliers):
        raise UsageError(
            f"--lr-multipliers {text}: expected two or more finite multipliers above 0 (0.3,1,3), or fixed."
        )
    return multipliers


def repeat_command(words: list[str]) -> list[str]:
    """Remove the options of a single call, such as --resume, from a command line."""
    arguments = ["medim"]
    for previous, word in pairwise(words):
        if word not in PER_CALL_OPTIONS and not word.startswith("--max-hours") and previous != "--max-hours":
            arguments.append(word)
    return arguments


def _format_comparisons(summary: StudySummary) -> dict[str, str]:
    """Format one line per arm and budget: difference from scratch, interval and verdict."""
    rows = summary["comparisons"]["rows"] if summary["comparisons"] else []
    return {
        f"{row['arm']}, {row['budget']} labels": f"{summary['metric']} {format_or_dash(row['value'])}, scratch "
        f"{format_or_dash(row['scratch'])}: {row['difference']['value']:+.3f} [{row['difference']['low']:+.3f}, "
        f"{row['difference']['high']:+.3f}], p {row['p_corrected']:.2g}: {row['verdict']}"
        for row in rows
    }


def report(
    folder: Annotated[
        Path, typer.Argument(help="A run, an evaluation, an index, a store, a study, or a folder of runs.")
    ],
) -> None:
    """Write a self-contained HTML report into a folder."""
    from medim.reports.report import write_report_page as report_runs
    from medim.study.report.report import is_study
    from medim.study.report.report import write_study_page as report_study

    write_page = report_study if is_study(folder) else report_runs
    print_result("report", {"written to": write_page(folder)})
