"""Classes that a fine-tuned network does not find, although images have them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from medim.config import FinetuneConfig
from medim.data.index.index import AllRejectedError, ImageRecord
from medim.data.loading.cohort import Cohort
from medim.evaluation.cases import score_cases
from medim.evaluation.evaluate import build_predictor
from medim.model_spec import ModelSpec
from medim.models.model import as_numpy_function
from medim.reports.page import format_recall
from medim.tasks import find_task_of_kind
from medim.tasks.task import CaseRow

log = logging.getLogger(__name__)
LOST_RECALL = 0.1  # a class of which the network finds a smaller fraction is lost
TRAINING_IMAGES = 20  # largest number of training images for a class that no validation image has


def find_lost_classes(
    model: Any, cohort: Cohort, train: Sequence[ImageRecord], val_rows: Sequence[CaseRow], spec: ModelSpec
) -> dict[str, float]:
    """Find the classes of which a network finds less than a tenth of the labelled images or voxels.

    They are measured on the validation split. Classes that no validation image has are measured on training images.

    Args:
        model: the network.
        cohort: images of the run.
        train: labelled training images.
        val_rows: rows of the validation cases.
        spec: spec of the model.

    Returns:
        The fraction of each lost class that the network finds.
    """
    task = find_task_of_kind(spec.kind)
    recalls = task.measure_recalls([row for row in val_rows if not row.get("rejected")], spec.classes)
    records = _select_records(cohort, train, spec, [name for name in spec.classes if name not in recalls])
    if records:
        try:
            rows = score_cases(build_predictor(as_numpy_function(model), spec), cohort.index, records)
        except AllRejectedError:
            rows = []
        valid_rows = [row for row in rows if not row.get("rejected")]
        recalls = {**task.measure_recalls(valid_rows, spec.classes), **recalls}
    return {name: recalls[name] for name in spec.classes if recalls.get(name, 1.0) < LOST_RECALL}


def warn_of_lost_classes(
    lost: Mapping[str, float], cohort: Cohort, train: Sequence[ImageRecord], spec: ModelSpec, config: FinetuneConfig
) -> None:
    """Log a warning with advice for each lost class, by options that the configuration does not use yet."""
    if not lost:
        return
    task = find_task_of_kind(spec.kind)
    counts = task.count_targets(train, spec.classes, cohort.read_mask)
    for name, recall in lost.items():
        is_labelled = counts[task.first_class_index + spec.classes.index(name)] > 0
        options = _list_unused_options(config, is_dense=task.dense)
        rare_text = f"; for rare classes, see also {', '.join(options)}" if options else ""
        advice = (
            f"It was probably not trained long enough: increase max_steps (now {config.max_steps}){rare_text}"
            if is_labelled
            else "No labelled training image has this class: label some that have it, or use more labels"
        )
        log.warning("class %s: the model finds %s of its labels. %s", name, format_recall(recall), advice)


def _list_unused_options(config: FinetuneConfig, *, is_dense: bool) -> list[str]:
    """List the options for rare classes that a configuration leaves at their defaults."""
    is_set = {"head.class_weights": config.head.get("class_weights") is not None}
    if is_dense:
        is_set["head.dice"] = config.head.get("dice") == "image"
        is_set["views.foreground_share"] = config.views.foreground_share > 0
    else:
        is_set["balanced_batches"] = config.balanced_batches
    return [name for name, value in is_set.items() if not value]


def _select_records(
    cohort: Cohort, train: Sequence[ImageRecord], spec: ModelSpec, names: Sequence[str]
) -> list[ImageRecord]:
    """Select at most `TRAINING_IMAGES` training images of each of some classes."""
    task = find_task_of_kind(spec.kind)
    if not names or not (task.dense or task.has_class_labels):
        return []
    numbers = [task.first_class_index + spec.classes.index(name) for name in names]
    remaining = dict.fromkeys(numbers, TRAINING_IMAGES)
    records = []
    for record in train:
        if not any(remaining.values()):
            break
        counts = task.count_targets([record], spec.classes, cohort.read_mask)
        present = [number for number in numbers if counts[number] and remaining[number]]
        for number in present:
            remaining[number] -= 1
        if present:
            records.append(record)
    return records
