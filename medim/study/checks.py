"""Preconditions of a study, checked before training; each error states the reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np

from medim.data.contamination import ContaminationCounts, check_contamination, load_training_history
from medim.data.index.index import ImageRecord, Index
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import warn_label_shortage
from medim.evaluation.probing.label_budget import Budget
from medim.metrics.bootstrap import MIN_SUBJECTS
from medim.model_spec import ModelSpec
from medim.models.serialization import locate_weights
from medim.study.content import CohortCounts, SplitCounts
from medim.study.design import Arm, LabelSubsets
from medim.tasks import find_task
from medim.types import Split, UsageError, UserError

log = logging.getLogger(__name__)
NETWORK_KEYS = ("modality", "spatial_dims", "in_channels", "encoder", "preprocessing", "input_shape")
_MORE_SUBJECTS = "Use more subjects: a larger validation split, or another source."


def check_networks(arms: Iterable[Arm]) -> ModelSpec:
    """Check that all encoders have the same architecture and input, and return their common spec.

    Raises:
        UserError: two encoders differ in network, preprocessing or input, or two runs of an arm have the same weights.
    """
    reference: tuple[Path, ModelSpec] | None = None
    hashes: dict[tuple[str, str], Path] = {}
    for name, run in ((arm.name, run) for arm in arms for run in arm.runs):
        spec = locate_weights(run)[1]
        if (other_run := hashes.setdefault((name, spec.sha256), run)) is not run:
            raise UserError(
                f"{run}: has the same weights as {other_run}, but the pretraining runs of an arm must differ in their "
                "seed. List each run once."
            )
        if reference is None:
            reference = run, spec
        for key in NETWORK_KEYS:
            value, reference_value = spec.to_json()[key], reference[1].to_json()[key]
            if value != reference_value:
                raise UserError(
                    f"{run}: all arms must have the same network, so that only pretraining differs; {key} is {value}, "
                    f"but {reference_value} in {reference[0]}. Compare encoders of one architecture, preprocessing and "
                    "input shape."
                )
    assert reference is not None
    return reference[1]


def check_one_class_per_image(index: Index) -> None:
    """Reject labels that are findings, several per image.

    Raises:
        UserError: the labels are findings.
    """
    if index.findings:
        raise UserError(
            f"{index.source_name}: expected one class per image, got labels of {len(index.findings)} findings. "
            "Study one finding at a time: use --labels CSV with columns image,label."
        )


def check_metric(task: str, metric: str | None, index: Index) -> str:
    """Check that studies of the task have a metric; None is the primary metric of the task.

    Raises:
        UsageError: an unknown metric.
    """
    names = find_task(task).study_metrics(find_task(task).class_names(index))
    if metric is not None and metric not in names:
        raise UsageError(f"--metric {metric}: expected one of {', '.join(names)}.")
    return metric or names[0]


def check_disjoint_splits(cohort: Cohort) -> None:
    """Reject a split with the same subject or the same pixels in training and validation.

    Raises:
        UserError: the splits overlap.
    """
    shared_subjects = {r.subject for r in cohort.records("train")} & {r.subject for r in cohort.records("val")}
    if shared_subjects:
        raise UserError(
            f"split: {len(shared_subjects)} subjects are in both the training and the validation split. "
            "Correct the split column, or the subjects of --subjects."
        )
    if cohort.overlap["images"]:
        raise UserError(
            f"split: {cohort.overlap['images']} validation images (of {cohort.overlap['subjects']} subjects) have the "
            "same pixels as images of the training split, so the results would be invalid. Correct the split column "
            "of the source, or remove the copies."
        )


def check_evaluation_split(task: str, cohort: Cohort) -> None:
    """Reject an evaluation split that is too small for an interval, or that lacks a class.

    Raises:
        UserError: there are fewer than five subjects in total or (classification) of a class, or no mask contains a
            class.
    """
    val = cohort.records("val")
    subjects = {record.subject for record in val}
    if len(subjects) < MIN_SUBJECTS:
        raise UserError(
            cohort.index.append_selection(
                f"evaluation split: expected at least {MIN_SUBJECTS} subjects for an interval, got {len(subjects)}. "
                f"{_MORE_SUBJECTS}"
            )
        )
    if find_task(task).has_class_labels:
        subject_counts = Counter(str(label) for _, label in {(record.subject, record.label) for record in val})
        class_names, minimum = cohort.index.labels, MIN_SUBJECTS
    elif not find_task(task).dense:
        return
    else:
        names = ("background", *(cohort.index.classes))
        values = ((r.subject, v) for r in val for v in np.unique(cohort.store.read_mask(cohort.keys[r.image])))
        subject_counts = Counter(names[value] for _, value in set(values) if value < len(names))
        class_names, minimum = cohort.index.classes, 1
    shortages = [f"{subject_counts[name]} with {name}" for name in class_names if subject_counts[name] < minimum]
    if shortages:
        raise UserError(
            cohort.index.append_selection(
                f"evaluation split: expected at least {minimum} subject(s) with each class, got "
                f"{', '.join(shortages)}. {_MORE_SUBJECTS}"
            )
        )


def count_contamination(
    arms: Iterable[Arm], cohort: Cohort, *, fail_on_contamination: bool
) -> dict[str, list[ContaminationCounts | None]]:
    """Count the evaluation images in the training history of the encoders of each arm, one count per run.

    Raises:
        UserError: `fail_on_contamination` is set and an encoder was trained on an evaluation image or subject.
    """
    cases = cohort.cases(cohort.records("val"))
    return {
        arm.name: [
            check_contamination(
                load_training_history(run),
                cases,
                weights_name=f"encoder {arm.name} ({run})",
                fail_on_contamination=fail_on_contamination,
            )
            for run in arm.runs
        ]
        for arm in arms
        if arm.runs
    }


def count_selection_labels(arms: Iterable[Arm]) -> dict[str, int]:
    """Count the labels used to select the step of the encoders of an arm (by online probe), the largest of its runs."""
    label_counts = {arm.name: [locate_weights(run)[1].n_selection_labels for run in arm.runs] for arm in arms}
    selection_labels = {name: max(labels) for name, labels in label_counts.items() if labels}
    if listing := ", ".join(f"{name} ({labels})" for name, labels in selection_labels.items() if labels):
        log.warning(
            "labels of training subjects were used to select the step of encoders, in addition to the label budgets: "
            "%s. To avoid this, pretrain with checkpoint_selection=loss, the default",
            listing,
        )
    return selection_labels


def draw_label_subsets(
    task: str, cohort: Cohort, budgets: Sequence[Budget], seeds: int
) -> tuple[tuple[Budget, ...], dict[tuple[Budget, int], tuple[ImageRecord, ...]]]:
    """Draw the label subsets of each budget and subset seed, nested for one seed; all labels are a single subset.

    Returns:
        The budgets, smallest first, and their subsets.

    Raises:
        UserError: a subset contains no label of a class.
        UsageError: two budgets have the same number of labels, or a budget is out of range.
    """
    train = cohort.records("train")
    for budget in budgets:
        warn_label_shortage(train, budget.labelled)
    subsets: dict[tuple[Budget, int], tuple[ImageRecord, ...]] = {}
    for budget in dict.fromkeys(budgets):
        for seed in range(seeds):
            subset = budget.draw_subset(train, seed)
            if seed and len(subset) == len(train):
                continue
            labels = {record.label for record in subset}
            missing = (
                [name for name in cohort.index.labels if name not in labels] if find_task(task).has_class_labels else []
            )
            if missing:
                raise UserError(
                    f"budget {budget.name}, subset {seed}: expected a label of every class, got {len(subset)} image(s) "
                    f"without {', '.join(missing)}. Use a larger budget."
                )
            subsets[budget, seed] = subset
    by_size = sorted(dict.fromkeys(budgets), key=lambda budget: len(subsets[budget, 0]))
    for smaller, larger in pairwise(by_size):
        if len(subsets[smaller, 0]) == len(subsets[larger, 0]):
            raise UsageError(
                f"budgets {smaller.name} and {larger.name}: both give {len(subsets[smaller, 0])} labelled images. "
                "Remove one of them."
            )
    return tuple(by_size), subsets


def check_selection_budgets(shortages: dict[str, str]) -> None:
    """Reject budgets that are too small for the requested learning-rate selection.

    Args:
        shortages: reason by budget; see `medim.study.lr_selection.describe_subset_shortage`.

    Raises:
        UsageError: a budget is too small.
    """
    if shortages:
        budget, reason = next(iter(shortages.items()))
        raise UsageError(
            f"--lr-multipliers: budget {budget} is too small for selection: {reason}. Selection uses labels of the "
            "budget; use a larger budget, or --lr-multipliers fixed."
        )


def count_cohort(task: str, cohort: Cohort, subsets: LabelSubsets) -> CohortCounts:
    """Count the images and subjects of each split and each subset."""
    split_records = {part: cohort.records(part) for part in get_args(Split)}
    has_numbers = find_task(task).quantity == "value"
    return {
        "images": len(cohort.index.records),
        "rejected": len(cohort.index.rejected) + len(cohort.rejections),
        "unlabelled": len(cohort.index.records) - len(cohort.keys) - len(cohort.rejections),
        "splits": {part: _count_split(records) for part, records in split_records.items()},
        "classes": list(find_task(task).class_names(cohort.index)),
        "labels": {
            f"{budget.name}/{seed}": {
                **_count_split(records),
                "classes": {} if has_numbers else _count_labels(records),
            }
            for (budget, seed), records in subsets.items()
        },
    }


def _count_labels(records: Sequence[ImageRecord]) -> dict[str, int]:
    return dict(sorted(Counter(str(r.label) for r in records if r.label is not None).items()))


def _count_split(records: Sequence[ImageRecord]) -> SplitCounts:
    return {"images": len(records), "subjects": len({record.subject for record in records})}
