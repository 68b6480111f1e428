"""The task of a fine-tuning run, and the head for the labels of its images."""

from __future__ import annotations

import logging

from medim.config import FinetuneConfig
from medim.data.index.index import Index
from medim.data.labels import check_label_kind
from medim.tasks import TASKS, find_task, find_task_for_labels
from medim.tasks.task import Task
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)


def task_of_config(config: FinetuneConfig) -> Task:
    """Find the task of a configuration by its option and its head.

    Raises:
        UsageError: an unknown task, or a head of another task.
    """
    task = find_task(config.task, config.head.get("name"))
    if task.option != config.task:
        raise UsageError(
            f"config {config.name}: head {config.head.get('name')!r} and task {config.task!r} do not work together. "
            f"Use this head with task {task.option!r}, or the head {config.task!r}."
        )
    return task


def check_task_options(config: FinetuneConfig) -> None:
    """Check that the options of crops and batches are options of the task.

    Raises:
        UsageError: `views.foreground_share` without masks, or `balanced_batches` without one class per image.
    """
    task = task_of_config(config)
    if config.views.foreground_share and not task.dense:
        raise UsageError(
            f"config {config.name}: views.foreground_share: expected 0 for task {config.task!r}, which uses no masks, "
            f"got {config.views.foreground_share:g}. Set it for task 'segmentation' only."
        )
    if config.balanced_batches and not task.has_class_labels:
        raise UsageError(
            f"config {config.name}: balanced_batches: expected a classification with one class per image, got "
            f"{task.title}. Remove balanced_batches."
        )


def select_head(config: FinetuneConfig, index: Index) -> FinetuneConfig:
    """Select the head for the kind of labels: for findings, `multi_label` replaces `classification`.

    Returns:
        Configuration with the selected head.

    Raises:
        UserError: no head of the task learns from such labels, or the labels are of several kinds.
    """
    task, name = task_of_config(config), config.head.get("name")
    if task.dense:
        return config
    check_label_kind(record.label for record in index.records)
    if task.accepts_labels(index):
        return config
    other = find_task_for_labels(config.task, index)
    if other is not None and name == config.task:
        log.info("%s: using head %s instead of %s", other.describe_labels(index), other.name, name)
        return config.model_copy(update={"head": {**config.head, "name": other.name}})
    if other is None or name in TASKS:
        raise UserError(task.label_form_error(index))
    return config


def check_class_weights(config: FinetuneConfig, index: Index) -> None:
    """Check that a list of class weights has one number for each output of the network.

    Raises:
        UsageError: another number of weights.
    """
    weights, task = config.head.get("class_weights"), task_of_config(config)
    if not isinstance(weights, list | tuple):
        return
    names = task.output_names(task.class_names(index))
    if len(weights) != len(names):
        raise UsageError(
            f"head.class_weights: expected {len(names)} numbers, one for each of {', '.join(names)}, got "
            f"{len(weights)}. Give one number a class in this order, or balanced."
        )
