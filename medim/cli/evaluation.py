"""The command that measures what pretraining is worth: parse, make one call, print what came out."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medim.cli.options import (
    AcceleratorOption,
    ConfigOption,
    DataOption,
    LabelsOption,
    OutOption,
    OverwriteOption,
    ResumeOption,
    SetOption,
    SplitSeedOption,
    StrictOption,
    SubjectsOption,
)
from medim.cli.terminal import format_or_dash, print_result
from medim.types import UsageError

PER_CALL_OPTIONS = ("--resume", "--overwrite", "--quiet", "--debug")  # of the command to repeat a study


def study(
    task: Annotated[Literal["segmentation", "classification"], typer.Option(help="What to learn.")],
    out: OutOption,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="An arm, NAME=RUN[,RUN2,...]: a pretraining run or package a seed. May be repeated."),
    ] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="The same, but the encoder stays frozen. May be repeated.")
    ] = None,
    data: DataOption = None,
    labelled: Annotated[list[int] | None, typer.Option(help="Label budget, in images. May be repeated.")] = None,
    label_fraction: Annotated[
        list[float] | None,
        typer.Option(help="Label budget, as a share of the labelled training images. May be repeated. Default: 1.0."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Label subsets a budget, drawn with seeds 0 to N - 1.", min=1)] = 1,
    probe_seeds: Annotated[
        int | None, typer.Option(help="The same for arms that stay frozen. Default: as --seeds.", min=1)
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Multiples of the preset's rate to choose from, such as 0.3,1,3, or fixed. Default: 0.3,1,3 where the "
            "budget can pay for it."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at once; 2 or more run in processes that stay warm.", min=1)] = 1,
    max_hours: Annotated[
        float | None,
        typer.Option(help="Begin no cell that is expected to end later; exit code 75 where some are left."),
    ] = None,
    labels: LabelsOption = None,
    subjects: SubjectsOption = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="CSV with a column image or subject, and any others (site, sex, scanner): the audit tells metrics of "
            "each group, and whether features tell the groups apart."
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    split_seed: SplitSeedOption = 0,
    strict: StrictOption = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the weights of every cell.")] = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    accelerator: AcceleratorOption = "auto",
) -> None:
    """Measure what pretraining is worth in labels, against the scratch twin, paired over seeds, labels and subjects."""
    from medim.data.source import open_source
    from medim.evaluation.probing.label_budget import Budget
    from medim.study.checks import check_networks
    from medim.study.design import read_arms
    from medim.study.prepare import StudyOptions
    from medim.study.run import study as run
    from medim.training.finetune.run import resolve_finetune_config

    arms = read_arms(encoder or [], probe or [])
    budgets = [Budget(labelled=n) for n in labelled or []]
    budgets += [Budget(fraction=f) for f in label_fraction or ([] if labelled else [1.0])]
    multiples = _parse_multiples(learning_rates)
    spec = check_networks(arms)  # a mistake in these shows before images are read
    config_args = task, spec["modality"], next(run for arm in arms for run in arm.runs), config, set_ or []
    resolve_finetune_config(*config_args)
    image_index, store = open_source(data, spec["modality"], labels=labels, subjects=subjects)
    settings = resolve_finetune_config(*config_args, index=image_index)
    options = StudyOptions(
        seeds=seeds,
        probe_seeds=probe_seeds,
        lr_multipliers=multiples,
        split_seed=split_seed,
        jobs=jobs,
        strict=strict,
        max_hours=max_hours,
        keep_models=keep_models,
        resume=resume,
        overwrite=overwrite,
        accelerator=accelerator,
        store=store,
        groups=groups,
        command=repeat_command(sys.argv),
    )
    summary = run(task, settings, image_index, arms, budgets, out, options)
    print_result("study", {**_format_comparisons(summary), "cells": summary["cells"]["done"], "written to": out})


def _parse_multiples(text: str | None) -> tuple[float, ...] | None:
    if text is None or text == "fixed":
        return None if text is None else ()
    try:
        multiples = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        multiples = ()
    if len(multiples) < 2 or min(multiples) <= 0:
        raise UsageError(f"--learning-rates {text}: expected two or more multiples above 0 (0.3,1,3), or fixed.")
    return multiples


def repeat_command(words: list[str]) -> list[str]:
    """The command as it was typed, without what only concerns this call of it."""
    arguments = ["medim"]
    for previous, word in pairwise(words):
        if word not in PER_CALL_OPTIONS and not word.startswith("--max-hours") and previous != "--max-hours":
            arguments.append(word)
    return arguments


def _format_comparisons(summary: dict[str, Any]) -> dict[str, str]:
    """A line for each arm and budget: against scratch, with interval and verdict."""
    rows = (summary["comparisons"] or {"rows": []})["rows"]
    return {
        f"{row['arm']}, {row['budget']} labels": f"{summary['metric']} {format_or_dash(row['value'])}, scratch "
        f"{format_or_dash(row['scratch'])}: {row['difference']['value']:+.3f} [{row['difference']['low']:+.3f}, "
        f"{row['difference']['high']:+.3f}], p {row['p_corrected']:.2g}: {row['verdict']}"
        for row in rows
    }
