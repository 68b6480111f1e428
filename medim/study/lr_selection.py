"""Learning-rate selection of an arm at a budget, on its first label subset and within the label budget.

A fifth of the subjects of the subset is reserved for validation. The other subjects are used to train with each factor
on the learning rate of the preset; the factor with the best metric on the validation fifth is selected. Selection uses
only images of the subset, so it cannot access the evaluation split.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import select_label_budget
from medim.tasks import find_task
from medim.types import Split

HOLDOUT_SHARE = 1 / 5
MIN_IMAGES = 10  # smallest budget with selection
MIN_IMAGES_PER_CLASS = 2  # smallest number of images per class in both parts


def split_subset(subset: Sequence[ImageRecord]) -> tuple[tuple[ImageRecord, ...], tuple[ImageRecord, ...]]:
    """Split a label subset by subject into the images to train on, and the validation fifth."""
    holdout = select_label_budget(subset, fraction=HOLDOUT_SHARE, seed=0)
    holdout_images = {record.image for record in holdout}
    return tuple(record for record in subset if record.image not in holdout_images), holdout


def describe_subset_shortage(task: str, subset: Sequence[ImageRecord]) -> str | None:
    """Describe why a label subset is too small for selection, or return None."""
    if len(subset) < MIN_IMAGES:
        return f"it has {len(subset)} labelled images, but {MIN_IMAGES} are needed"
    if not split_subset(subset)[0]:
        return "all its images are of one subject"
    if find_task(task).has_class_labels:
        names = {record.label for record in subset}
        for part in split_subset(subset):
            label_counts = Counter(record.label for record in part)
            if rare_labels := [str(name) for name in names if label_counts[name] < MIN_IMAGES_PER_CLASS]:
                classes = ", ".join(sorted(rare_labels))
                return f"with a fifth held out, a part has fewer than {MIN_IMAGES_PER_CLASS} images of {classes}"
    return None


def selection_cohort(cohort: Cohort, subset: Sequence[ImageRecord]) -> Cohort:
    """Build the cohort for selection: only the label subset, with the validation fifth as validation split."""
    train, holdout = split_subset(subset)
    splits: dict[str, Split] = {record.image: "test" for record in cohort.index.records}
    splits |= {record.image: "train" for record in train}
    splits |= {record.image: "val" for record in holdout}
    keys = {record.image: cohort.keys[record.image] for record in subset}
    return replace(cohort, keys=keys, splits=splits, overlap={"images": 0, "subjects": 0})


def best_multiplier(scores: Mapping[float, float | None], *, higher_is_better: bool = True) -> float:
    """Select the factor with the best score; for equal scores, or without any, the closest to 1."""
    sign = 1 if higher_is_better else -1
    numeric_scores = {multiplier: -math.inf if score is None else sign * score for multiplier, score in scores.items()}
    return max(numeric_scores, key=lambda lr_multiplier: (numeric_scores[lr_multiplier], -abs(math.log(lr_multiplier))))
