"""The command that measures what pretraining is worth: parse, make one call, print what came out."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medim.cli.options import (
    Accelerator,
    Config,
    Data,
    Labels,
    Out,
    Overwrite,
    Resume,
    Set,
    SplitSeed,
    Strict,
    Subjects,
)
from medim.cli.terminal import number, show
from medim.types import UsageError

LEFT_OUT = ("--resume", "--overwrite", "--quiet", "--debug")  # of the command to repeat a study


def study(
    task: Annotated[Literal["segmentation", "classification"], typer.Option(help="What to learn.")],
    out: Out,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="An arm, NAME=RUN[,RUN2,...]: a pretraining run or package a seed. May be repeated."),
    ] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="The same, but the encoder stays frozen. May be repeated.")
    ] = None,
    data: Data = None,
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
    labels: Labels = None,
    subjects: Subjects = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="CSV with a column image or subject, and any others (site, sex, scanner): the audit tells metrics of "
            "each group, and whether features tell the groups apart."
        ),
    ] = None,
    config: Config = None,
    set_: Set = None,
    split_seed: SplitSeed = 0,
    strict: Strict = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the weights of every cell.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    accelerator: Accelerator = "auto",
) -> None:
    """Measure what pretraining is worth in labels, against the scratch twin, paired over seeds, labels and subjects."""
    from medim.data.source import open_source
    from medim.evaluation.probing.label_budget import Budget
    from medim.study.checks import check_networks
    from medim.study.design import read_arms
    from medim.study.prepare import Options
    from medim.study.run import study as run
    from medim.training.finetune.run import resolve_config

    arms = read_arms(encoder or [], probe or [])
    budgets = [Budget(labelled=n) for n in labelled or []]
    budgets += [Budget(fraction=f) for f in label_fraction or ([] if labelled else [1.0])]
    multiples = _multiples(learning_rates)
    spec = check_networks(arms)  # a mistake in these shows before images are read
    chosen = task, spec["modality"], next(run for arm in arms for run in arm.runs), config, set_ or []
    resolve_config(*chosen)
    found, store = open_source(data, spec["modality"], labels=labels, subjects=subjects)
    settings = resolve_config(*chosen, index=found)
    options = Options(
        seeds=seeds,
        probe_seeds=probe_seeds,
        multiples=multiples,
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
        command=repeatable(sys.argv),
    )
    summary = run(task, settings, found, arms, budgets, out, options)
    show("study", {**_told(summary), "cells": summary["cells"]["done"], "written to": out})


def _multiples(text: str | None) -> tuple[float, ...] | None:
    if text is None or text == "fixed":
        return None if text is None else ()
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if len(found) < 2 or min(found) <= 0:
        raise UsageError(f"--learning-rates {text}: expected two or more multiples above 0 (0.3,1,3), or fixed.")
    return found


def repeatable(words: list[str]) -> list[str]:
    """The command as it was typed, without what only concerns this call of it."""
    kept = ["medim"]
    for before, word in pairwise(words):
        if word not in LEFT_OUT and not word.startswith("--max-hours") and before != "--max-hours":
            kept.append(word)
    return kept


def _told(summary: dict[str, Any]) -> dict[str, str]:
    """A line for each arm and budget: against scratch, with interval and verdict."""
    rows = (summary["comparisons"] or {"rows": []})["rows"]
    return {
        f"{row['arm']}, {row['budget']} labels": f"{summary['metric']} {number(row['value'])}, scratch "
        f"{number(row['scratch'])}: {row['difference']['value']:+.3f} [{row['difference']['low']:+.3f}, "
        f"{row['difference']['high']:+.3f}], p {row['p_corrected']:.2g}: {row['verdict']}"
        for row in rows
    }
