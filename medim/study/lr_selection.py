"""Which learning rate an arm gets at a budget: chosen on its first label subset, and paid for from that subset.

A fifth of the subset's subjects is held out, the rest trains with each multiple of the preset's rate, and the best
metric on the fifth wins. What selection is given is cut out of the subset, so it cannot look at the evaluation split.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import select_label_budget
from medim.study.design import StudyTask
from medim.types import Split

HOLDOUT_SHARE = 1 / 5
MIN_IMAGES = 10  # of a budget, and
MIN_IMAGES_PER_CLASS = 2  # of each class on either side, below which nothing is chosen
TASK_METRICS: dict[StudyTask, str] = {"segmentation": "dice", "classification": "auroc"}


def split_subset(subset: Sequence[ImageRecord]) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...]]:
    """The images of a label subset that selection trains on, and those it holds out: whole subjects, a fifth."""
    holdout = select_label_budget(subset, fraction=HOLDOUT_SHARE, seed=0)
    holdout_images = {record.image for record in holdout}
    return tuple(record for record in subset if record.image not in holdout_images), holdout


def describe_subset_shortage(task: StudyTask, subset: Sequence[ImageRecord]) -> str | None:
    """Why nothing can be chosen within a label subset, or None."""
    if len(subset) < MIN_IMAGES:
        return f"it has {len(subset)} labelled images, of {MIN_IMAGES} needed"
    if not split_subset(subset)[0]:
        return "its images are of a single subject"
    if task == "classification":
        names = {record.label for record in subset}
        for part in split_subset(subset):
            label_counts = Counter(record.label for record in part)
            if rare_labels := [str(name) for name in names if label_counts[name] < MIN_IMAGES_PER_CLASS]:
                classes = ", ".join(sorted(rare_labels))
                return f"a fifth held out leaves fewer than {MIN_IMAGES_PER_CLASS} images of {classes} on a side"
    return None


def selection_cohort(cohort: Cohort, subset: Sequence[ImageRecord]) -> Cohort:
    """The cohort as selection sees it: the label subset alone, a fifth of it in the place of the validation split."""
    train, holdout = split_subset(subset)
    splits: dict[str, Split] = {record.image: "test" for record in cohort.index.records}
    splits |= {record.image: "train" for record in train}
    splits |= {record.image: "val" for record in holdout}
    keys = {record.image: cohort.keys[record.image] for record in subset}
    return replace(cohort, keys=keys, splits=splits, overlap={"images": 0, "subjects": 0})


def best_multiplier(scores: Mapping[float, float | None]) -> float:
    """The multiple with the best score; of equals, and where no run gave any, the one nearest to the preset's rate."""
    numeric_scores = {lr_multiplier: -1.0 if score is None else score for lr_multiplier, score in scores.items()}
    return max(numeric_scores, key=lambda lr_multiplier: (numeric_scores[lr_multiplier], -abs(math.log(lr_multiplier))))
