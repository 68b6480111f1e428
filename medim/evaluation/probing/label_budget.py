"""Label budget of a probe, and its nested subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import check_label_budget, select_label_budget, warn_label_shortage
from medim.tasks.task import Task
from medim.types import Array, UserError


@dataclass(frozen=True)
class Budget:
    """Label budget of a probe: a number of images, or a share of the labelled training images.

    Raises:
        UsageError: both values are given, or one is out of range.
    """

    labelled: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        """Reject a budget that is out of range."""
        check_label_budget(self.labelled, self.fraction)

    @property
    def name(self) -> str:
        """Name of the budget: `50` images, or `10%`."""
        return f"{self.labelled}" if self.fraction is None else f"{100 * self.fraction:g}%"

    def draw_subset(self, records: Sequence[ImageRecord], seed: int) -> tuple[ImageRecord, ...]:
        """Draw the images of the budget, as `medim.data.loading.splits.select_label_budget` does."""
        return select_label_budget(records, labelled=self.labelled, fraction=self.fraction, seed=seed)


def draw_probe_subsets(
    cohort: Cohort, task: Task, budgets: Sequence[Budget], seeds: Sequence[int]
) -> dict[tuple[Budget, int], tuple[ImageRecord, ...]]:
    """Draw the label subset of each budget and seed; the subsets of one seed are nested.

    A budget of all labelled images has a single subset, which is returned for the first seed only.

    Raises:
        UserError: a subset lacks a label of some class that the task predicts.
    """
    subsets = {}
    labelled = cohort.labelled_records("train")
    for label_budget in dict.fromkeys(budgets):
        warn_label_shortage(labelled, label_budget.labelled)
        for seed in dict.fromkeys(seeds):
            subset = label_budget.draw_subset(labelled, seed)
            if len(subset) == len(labelled) and seed != seeds[0]:
                continue
            labels, classes = {record.label for record in subset}, cohort.classes if task.has_class_labels else ()
            missing = [name for name in classes if name not in labels]
            if missing:
                raise UserError(
                    f"budget {label_budget.name}, seed {seed}: expected a label of every class "
                    f"({', '.join(cohort.classes)}),"
                    f" got {len(subset)} image(s) without {', '.join(missing)}. Give a larger budget."
                )
            subsets[label_budget, seed] = subset
    return subsets


def number_subjects(records: Sequence[ImageRecord]) -> Array:
    """Number the subjects of images in order of occurrence, (N,); independent of the pseudonyms of a site."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(record.subject, len(numbers)) for record in records])
