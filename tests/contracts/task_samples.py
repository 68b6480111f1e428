"""Labelled images, answers and case rows of any task, for the contracts of tasks and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medim.data.index.index import Index
from medim.data.index.records import ImageRecord
from medim.tasks import TASKS
from medim.tasks.task import CaseRow, LabelledCase, Task
from medim.types import Array, Volume

CASES = 12
SHAPE = (8, 6)
LABELS = {  # by the form of the labels, in the order in which a task is asked for them
    "classes": ["large", "small", "none"],
    "findings": ["+edema|-mass", "-edema|+mass", "?edema|-mass", "+edema|+mass"],
    "numbers": [f"{40 + 3.5 * n}" for n in range(CASES)],
}


@dataclass(frozen=True)
class TaskSample:
    """Images with labels of a task, and random answers.

    Attributes:
        task: the task.
        index: the images; no file exists.
        classes: classes of the network.
        volume: an image.
        mask: its mask; None if the task is not dense.
        logits: (CASES, K) or (CASES, K, *SHAPE), output of the network for each image.
        rows: case rows with keys, as `medim.evaluation.cases.read_cases` returns them.
    """

    task: Task
    index: Index
    classes: tuple[str, ...]
    volume: Volume
    mask: Volume | None
    logits: Array
    rows: list[CaseRow]


def build_index(labels: list[str] | None) -> Index:
    """An index of images with labels, repeated as often as needed; None: with masks of two classes."""
    affine = tuple(np.eye(4).ravel().tolist())
    records = tuple(
        ImageRecord(
            image=f"i{n:02d}",
            path=f"i{n:02d}.npy",
            subject=f"s{n:02d}",
            session=None,
            series=None,
            modality="xray",
            sequence=None,
            shape=SHAPE,
            spacing=(1.0, 1.0),
            affine=affine,
            scanner=None,
            field_strength=None,
            label=labels[n % len(labels)] if labels else None,
            mask=None if labels else f"m{n:02d}.npy",
            split=None,
            quality=None,
        )
        for n in range(CASES)
    )
    return Index(root=Path("source"), modality="xray", records=records, classes=() if labels else ("front", "back"))


def find_index(task: Task) -> Index:
    """The index with labels of the form that the task learns from."""
    if task.dense:
        return build_index(None)
    return next(index for index in map(build_index, LABELS.values()) if task.accepts_labels(index))


def make_sample(name: str) -> TaskSample:
    """The sample of an entry of TASKS."""
    task, rng = TASKS[name], np.random.default_rng(0)
    index = find_index(task)
    classes = task.class_names(index)
    volume = Volume(rng.random((1, *SHAPE), np.float32), np.eye(4), np.eye(4), SHAPE)
    mask = volume.with_array(rng.integers(0, 3, (1, *SHAPE), np.uint8)) if task.dense else None
    logits = rng.normal(size=(CASES, task.count_outputs(classes), *(SHAPE if task.dense else ())))
    rows: list[CaseRow] = []
    for record, output in zip(index.records, logits, strict=True):
        answer = task.to_answer(output, volume, volume)
        case = LabelledCase(record=record, volume=volume, mask=mask, classes=classes, source_classes=index.classes)
        assert task.find_target_error(case) is None
        case_rows = task.score_case(answer, case)
        keys = {**dict.fromkeys(task.case_columns), "image": record.image, "subject": record.subject}
        rows += [{**keys, **row} for row in case_rows]
    return TaskSample(task, index, classes, volume, mask, logits, rows)
