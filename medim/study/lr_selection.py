"""Which learning rate an arm gets at a budget: chosen on its first label subset, and paid for from that subset.

A fifth of the subset's subjects is held out, the rest trains with each multiple of the preset's rate, and the best
metric on the fifth wins. What selection is given is cut out of the subset, so it cannot look at the evaluation split.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medim.data.index.index import Record
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import budget
from medim.study.design import Task
from medim.types import Split

SHARE = 1 / 5
MIN_IMAGES = 10  # of a budget, and
MIN_CLASS = 2  # of each class on either side, below which nothing is chosen
METRIC: dict[Task, str] = {"segmentation": "dice", "classification": "auroc"}


def parts(subset: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The images of a label subset that selection trains on, and those it holds out: whole subjects, a fifth."""
    held = budget(subset, fraction=SHARE, seed=0)
    chosen = {record.image for record in held}
    return tuple(record for record in subset if record.image not in chosen), held


def too_small(task: Task, subset: Sequence[Record]) -> str | None:
    """Why nothing can be chosen within a label subset, or None."""
    if len(subset) < MIN_IMAGES:
        return f"it has {len(subset)} labelled images, of {MIN_IMAGES} needed"
    if not parts(subset)[0]:
        return "its images are of a single subject"
    if task == "classification":
        names = {record.label for record in subset}
        for side in parts(subset):
            held = Counter(record.label for record in side)
            if few := [str(name) for name in names if held[name] < MIN_CLASS]:
                return f"a fifth held out leaves fewer than {MIN_CLASS} images of {', '.join(sorted(few))} on a side"
    return None


def cut(cohort: Cohort, subset: Sequence[Record]) -> Cohort:
    """The cohort as selection sees it: the label subset alone, a fifth of it in the place of the validation split."""
    train, held = parts(subset)
    sides: dict[str, Split] = {record.image: "test" for record in cohort.index.records}
    sides |= {record.image: "train" for record in train}
    sides |= {record.image: "val" for record in held}
    keys = {record.image: cohort.keys[record.image] for record in subset}
    return replace(cohort, keys=keys, splits=sides, overlap={"images": 0, "subjects": 0})


def best(scores: Mapping[float, float | None]) -> float:
    """The multiple with the best score; of equals, and where no run gave any, the one nearest to the preset's rate."""
    known = {multiple: -1.0 if score is None else score for multiple, score in scores.items()}
    return max(known, key=lambda multiple: (known[multiple], -abs(math.log(multiple))))
