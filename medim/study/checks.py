"""What a study refuses before anything is trained, each with its reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np

from medim.config import Section
from medim.data.contamination import Counts, guard, read_seen
from medim.data.index.index import Index, Record
from medim.data.loading.cohort import Cohort
from medim.evaluation.probing.label_budget import Budget
from medim.metrics.bootstrap import MIN_SUBJECTS
from medim.models.serialization import find
from medim.study.design import Arm, Subsets, Task
from medim.types import Split, UsageError, UserError

log = logging.getLogger(__name__)
NETWORK = ("modality", "spatial_dims", "in_channels", "encoder", "preprocessing", "input_shape")
_MORE = "Measure on more subjects: a larger validation split, or another source."


def check_networks(arms: Iterable[Arm]) -> Section:
    """The spec that all encoders share.

    Raises:
        UserError: two differ in network, preprocessing or input, or two runs of an arm are one encoder.
    """
    first: tuple[Path, Section] | None = None
    hashes: dict[tuple[str, str], Path] = {}
    for name, run in ((arm.name, run) for arm in arms for run in arm.runs):
        spec = find(run)[1]
        if (same := hashes.setdefault((name, spec["sha256"]), run)) is not run:
            raise UserError(
                f"{run}: expected another encoder than {same}, got the same weights; an arm's pretraining runs "
                "differ by their seed. Name each once."
            )
        if first is None:
            first = run, spec
        for key in NETWORK:
            if spec[key] != first[1][key]:
                raise UserError(
                    f"{run}: expected every arm to have the same network, so that pretraining alone differs, got {key} "
                    f"{spec[key]}, where {first[0]} has {first[1][key]}. Compare encoders of one architecture, "
                    "preprocessing and input shape."
                )
    assert first is not None
    return first[1]


def check_labels(index: Index) -> None:
    """Refuse labels that are findings, any number an image.

    Raises:
        UserError: they are.
    """
    if index.findings:
        raise UserError(
            f"{index.root}: expected one class an image, got labels of {len(index.findings)} findings. Study one at a "
            "time: give --labels CSV with columns image,label."
        )


def check_sides(cohort: Cohort) -> None:
    """Refuse a split with a subject, or the same pixels, on both sides.

    Raises:
        UserError: there is one.
    """
    both = {r.subject for r in cohort.records("train")} & {r.subject for r in cohort.records("val")}
    if both:
        raise UserError(
            f"split: expected every subject on one side, got {len(both)} in training and validation split. "
            "Correct the split column, or the subjects that --subjects gives."
        )
    if cohort.overlap["images"]:
        raise UserError(
            f"split: expected every image on one side, but {cohort.overlap['images']} held-out images (of "
            f"{cohort.overlap['subjects']} subjects) have the same pixels as images of the training split; a study on "
            "them proves nothing. Correct the source's split column, or take the copies out."
        )


def check_cases(task: Task, cohort: Cohort) -> None:
    """Refuse an evaluation split that is too small for an interval, or lacks a class.

    Raises:
        UserError: fewer than five subjects, in all or (classification) of a class; or no mask with a class.
    """
    val = cohort.records("val")
    subjects = {record.subject for record in val}
    if len(subjects) < MIN_SUBJECTS:
        raise UserError(
            f"evaluation split: expected at least {MIN_SUBJECTS} subjects for an interval, got {len(subjects)}. {_MORE}"
        )
    if task == "classification":
        held = Counter(str(label) for _, label in {(record.subject, record.label) for record in val})
        named, fewest = cohort.index.labels, MIN_SUBJECTS
    else:
        names = ("background", *(cohort.index.classes))
        values = ((r.subject, v) for r in val for v in np.unique(cohort.store.mask(cohort.keys[r.image])))
        held = Counter(names[value] for _, value in set(values))
        named, fewest = cohort.index.classes, 1
    few = [f"{held[name]} with {name}" for name in named if held[name] < fewest]
    if few:
        raise UserError(
            f"evaluation split: expected at least {fewest} subject(s) with each class, got {', '.join(few)}. {_MORE}"
        )


def count_seen(arms: Iterable[Arm], cohort: Cohort, *, strict: bool) -> dict[str, list[Counts | None]]:
    """What the encoders of each arm have seen of the evaluation split, a count a run.

    Raises:
        UserError: `strict`, and one saw any of it.
    """
    cases = cohort.cases(cohort.records("val"))
    return {
        arm.name: [guard(read_seen(run), cases, what=f"encoder {arm.name} ({run})", strict=strict) for run in arm.runs]
        for arm in arms
        if arm.runs
    }


def count_chosen(arms: Iterable[Arm]) -> dict[str, int]:
    """The labels that chose the step of an arm's encoders (their online probe), the most of its runs."""
    own = {arm.name: [find(run)[1].get("selected", {}).get("labels", 0) for run in arm.runs] for arm in arms}
    found = {name: max(labels) for name, labels in own.items() if labels}
    if told := ", ".join(f"{name} ({labels})" for name, labels in found.items() if labels):
        log.warning(
            "labels of training subjects chose the encoders' steps, beside the budgets: %s. To avoid it, pretrain with "
            "--set select_without_labels=true",
            told,
        )
    return found


def draw(
    task: Task, cohort: Cohort, budgets: Sequence[Budget], seeds: int
) -> tuple[tuple[Budget, ...], dict[tuple[Budget, int], tuple[Record, ...]]]:
    """The labels of each budget and subset seed, nested for one seed; a budget of all labels has one subset.

    Returns:
        The budgets, fewest labels first, and their subsets.

    Raises:
        UserError: a subset without a label of some class.
        UsageError: two budgets that give the same labels, or one that is out of range.
    """
    train = cohort.records("train")
    subsets: dict[tuple[Budget, int], tuple[Record, ...]] = {}
    for budget in dict.fromkeys(budgets):
        for seed in range(seeds):
            subset = budget.of(train, seed)
            if seed and len(subset) == len(train):
                continue
            have = {record.label for record in subset}
            missing = [name for name in cohort.index.labels if name not in have] if task == "classification" else []
            if missing:
                raise UserError(
                    f"budget {budget.name}, subset {seed}: expected a label of every class, got {len(subset)} image(s) "
                    f"without {', '.join(missing)}. Give a larger budget."
                )
            subsets[budget, seed] = subset
    ordered = sorted(dict.fromkeys(budgets), key=lambda budget: len(subsets[budget, 0]))
    for one, other in pairwise(ordered):
        if len(subsets[one, 0]) == len(subsets[other, 0]):
            raise UsageError(
                f"budgets {one.name} and {other.name}: both give {len(subsets[one, 0])} labelled images. Leave one out."
            )
    return tuple(ordered), subsets


def check_selection(too_small: dict[str, str]) -> None:
    """Refuse budgets that selection alone would eat, where it was asked for.

    Args:
        too_small: budget to why nothing can be chosen in it; see `medim.study.lr_selection.too_small`.

    Raises:
        UsageError: there is one.
    """
    if too_small:
        budget, reason = next(iter(too_small.items()))
        raise UsageError(
            f"--learning-rates: budget {budget} is too small to choose by: {reason}. Selection is paid from the label "
            "budget; give a larger budget, or --learning-rates fixed."
        )


def counts_of(task: Task, cohort: Cohort, subsets: Subsets) -> dict[str, Any]:
    """How many images and subjects each split and each subset has."""
    parts = {part: cohort.records(part) for part in get_args(Split)}
    return {
        "images": len(cohort.index.records),
        "rejected": len(cohort.index.rejected) + len(cohort.rejected),
        "unlabelled": len(cohort.index.records) - len(cohort.keys) - len(cohort.rejected),
        "splits": {part: _size(records) for part, records in parts.items()},
        "classes": list(cohort.index.classes if task == "segmentation" else cohort.index.labels),
        "labels": {
            f"{budget.name}/{seed}": {
                **_size(records),
                "classes": dict(sorted(Counter(str(r.label) for r in records if r.label is not None).items())),
            }
            for (budget, seed), records in subsets.items()
        },
    }


def _size(records: Sequence[Record]) -> dict[str, int]:
    return {"images": len(records), "subjects": len({record.subject for record in records})}
