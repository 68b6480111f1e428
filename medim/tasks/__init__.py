"""Prediction tasks: one module and one line in `TASKS` each. No module here imports torch.

To add a task, follow `docs/how-to/add-task.md`.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from medim.config import unknown_name_message
from medim.data.index.index import Index
from medim.tasks.classification import Classification
from medim.tasks.multi_label import MultiLabel
from medim.tasks.regression import Regression
from medim.tasks.segmentation import Segmentation
from medim.tasks.task import CaseRow, Task
from medim.types import UsageError, UserError

TASKS: dict[str, Task] = {
    "segmentation": Segmentation(),
    "classification": Classification(),
    "multi_label": MultiLabel(),
    "regression": Regression(),
}
TASK_OPTIONS = tuple(dict.fromkeys(task.option for task in TASKS.values()))  # values of `--task`
STUDY_TASKS = tuple(dict.fromkeys(task.option for task in TASKS.values() if task.in_studies))  # `medim study --task`
ENCODER = "encoder"  # kind of a network without a task


def find_task(option: str, head: str | None = None) -> Task:
    """Task of a configuration.

    Args:
        option: value of `task`.
        head: name of the head; it decides where tasks share the option, and any other head is of the option's own task.

    Raises:
        UsageError: an unknown option.
    """
    options = tuple(dict.fromkeys(task.option for task in TASKS.values()))
    if option not in options:
        raise UsageError(f"task {option}: {unknown_name_message('task', option, options)}")
    return TASKS[head] if head in TASKS else TASKS[option]


def find_task_of_kind(kind: str) -> Task:
    """Task of a network.

    Raises:
        UserError: an encoder, or an unknown kind.
    """
    tasks = map_tasks_by_kind()
    if kind not in tasks:
        raise UserError(f"expected a fine-tuned model: {unknown_name_message('kind', kind, tasks)} Train it again.")
    return tasks[kind]


def map_tasks_by_kind() -> dict[str, Task]:
    """Map the kinds of networks to their tasks; an encoder has none."""
    return {task.kind: task for task in TASKS.values()}


def find_task_by_title(title: str) -> Task:
    """Task of an evaluation, by its name in `metrics.json`; classification if no task has that name."""
    return next((task for task in TASKS.values() if task.title == title), TASKS["classification"])


def find_task_of_rows(rows: Sequence[CaseRow]) -> Task:
    """Task whose columns fit the rows of an evaluation best."""

    def count_matches(task: Task) -> tuple[int, int]:
        shared = task.case_columns.keys() & rows[0].keys()
        return len(shared), len(shared) - len(task.case_columns)

    return max(TASKS.values(), key=count_matches)


def find_task_of_study(columns: Container[str]) -> Task:
    """Task of a study, by the metrics of a run in `results.parquet`."""
    return next(task for task in TASKS.values() if task.study_column and task.study_column in columns)


def is_dense(kind: str) -> bool:
    """Whether networks of a kind answer with a label map on the grid of the image."""
    task = map_tasks_by_kind().get(kind)
    return task is not None and task.dense


def find_task_for_labels(option: str, index: Index) -> Task | None:
    """Task with this option that learns from labels of the form that an index has; None if there is none."""
    return next((task for task in TASKS.values() if task.option == option and task.accepts_labels(index)), None)
