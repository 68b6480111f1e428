"""Properties that every entry of TASKS must have: from labels to targets, answers, rows, metrics and columns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from medim.config import build_from_section
from medim.metrics import METRICS
from medim.models.heads import HEADS
from medim.tasks import TASKS, find_task, find_task_by_title, find_task_of_kind, find_task_of_rows, find_task_of_study
from medim.tasks.task import LabelledCase
from medim.types import Features, Volume
from tests.contracts.task_samples import CASES, SHAPE, find_index, make_sample

every_task = pytest.mark.parametrize("name", TASKS)
studied_tasks = pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.in_studies])


@every_task
def test_a_task_is_found_by_its_names(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert find_task(task.option, name) is task
    assert find_task_of_kind(task.kind) is task
    assert find_task_by_title(task.title) is task
    assert find_task_of_rows(make_sample(name).rows) is task


@every_task
def test_a_task_has_metrics_and_the_first_is_in_the_evaluation(name: str) -> None:
    sample = make_sample(name)
    assert set(sample.task.metrics) <= set(METRICS)
    metrics = sample.task.summarise_cases(sample.rows, sample.classes, resamples=50)
    assert next(iter(metrics)) == sample.task.metric
    for metric in sample.task.metrics:
        assert any(key == metric or key.startswith(f"{metric}_") for key in metrics)
    value = metrics[sample.task.metric]["value"]
    assert value is not None
    assert math.isfinite(value)
    differences = sample.task.compare_cases(sample.rows, sample.rows, sample.classes)
    assert differences[sample.task.metric]["value"] == 0


@every_task
def test_the_labels_become_targets_that_the_head_learns_from(name: str) -> None:
    task, index = TASKS[name], find_index(TASKS[name])
    classes = task.class_names(index)
    assert task.accepts_labels(index)
    assert task.find_training_error(index) is None
    targets = task.encode_targets(index.records, classes)
    assert (targets is None) == task.dense
    blank = task.make_blank_targets(4, SHAPE)
    assert len(blank) == 4
    for number, values in ((task.count_outputs(classes), targets), (task.count_outputs(("a", "b")), blank)):
        if values is None:
            continue
        section = task.fit_head({"name": name}, index.records)
        head = build_from_section(
            HEADS, section, channels=(4, 6), summary_channels=5, spatial_dims=2, out_channels=number
        )
        count = len(values)
        features = Features((torch.randn(count, 4, *SHAPE), torch.randn(count, 6, 4, 3)), torch.randn(count, 5))
        loss = head.loss(head(features), torch.tensor(np.asarray(values)))
        assert torch.isfinite(loss)
        assert loss.ndim == 0


@every_task
def test_the_rows_of_a_case_have_the_columns_of_the_task(name: str) -> None:
    sample = make_sample(name)
    for row in sample.rows:
        assert set(row) <= {"image", "subject", "class", *sample.task.case_columns}
        for column, kind in sample.task.case_columns.items():
            assert isinstance(row.get(column), (str, type(None)) if kind == "text" else (float, type(None)))


@every_task
def test_an_evaluation_has_plots_or_tables(name: str) -> None:
    sample = make_sample(name)
    details = sample.task.describe_evaluation(sample.rows, sample.classes)
    assert details.plots or details.tables
    for table in details.tables:
        assert all(len(row) == len(table.head) for row in table.rows)


@every_task
def test_a_prediction_has_columns_and_a_json_file(name: str) -> None:
    sample = make_sample(name)
    answer = sample.task.to_answer(sample.logits[0], sample.volume, sample.volume)
    columns = sample.task.answer_columns(answer, sample.volume, sample.classes)
    assert columns
    assert all(isinstance(value, str | float) for value in columns.values())
    json.dumps(sample.task.answer_content(columns, sample.classes), allow_nan=False)


@studied_tasks
def test_the_runs_of_a_study_have_the_metrics_of_the_evaluation(name: str) -> None:
    sample = make_sample(name)
    task, classes = sample.task, sample.classes
    per_case = len(sample.rows) // CASES
    cases = [task.to_study_rows(sample.rows[n : n + per_case]) for n in range(0, len(sample.rows), per_case)]
    columns = {
        column: np.array([np.nan if dict(case)[column] is None else dict(case)[column] for case in cases], float)
        for column, _ in cases[0]
    }
    assert find_task_of_study(columns) is task
    statistics = task.study_statistics(columns, classes)
    assert set(statistics) == set(task.study_metrics(classes))
    evaluation = task.summarise_cases(sample.rows, classes, resamples=50)
    for metric, statistic in statistics.items():
        (value,) = statistic(np.ones((1, CASES)))
        assert value == pytest.approx(evaluation[metric]["value"])
    scores = task.study_case_scores(columns, classes)
    assert scores.shape == (CASES,)
    assert task.describe_study_case(columns, classes, int(scores.argmin()))
    for text in (task.case_label, task.worst_case_text, task.output_text, task.frozen_text):
        assert text


@pytest.mark.parametrize("name", ["classification", "segmentation"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_recall_of_a_class_is_the_fraction_of_its_labels_that_are_found(name: str, dims: int) -> None:
    """Counted by hand, over the images of a class or the voxels of all images."""
    task, rng = TASKS[name], np.random.default_rng(0)
    classes, shape = ("one", "two", "none"), (8, 6, 4)[:dims]
    rows, hits, labels = [], np.zeros(3), np.zeros(3)
    for number in range(6):
        volume = Volume(rng.random((1, *shape), np.float32), np.eye(4), np.diag([2.0, 1.0, 1.0, 1.0]), shape)
        record = find_index(task).records[number]
        if name == "segmentation":
            truth, answer = rng.integers(0, 3, (2, *shape), np.uint8)
            if number == 0:
                answer[:] = 1
            case = LabelledCase(
                record=record, volume=volume, mask=volume.with_array(truth[None]), classes=classes, source_classes=()
            )
        else:
            truth, answer = number % 2 + 1, np.eye(3)[(0, 1, 1, 0, 0, 2)[number]]
            case = LabelledCase(
                record=replace(record, label=classes[truth - 1]),
                volume=volume,
                mask=None,
                classes=classes,
                source_classes=(),
            )
        predicted = answer if name == "segmentation" else answer.argmax() + 1
        for value in range(1, 4):
            labels[value - 1] += (truth == value).sum() if name == "segmentation" else truth == value
            hits[value - 1] += ((truth == value) & (predicted == value)).sum()
        rows += [{"image": f"i{number}", **row} for row in task.score_case(answer, case)]
    assert task.measure_recalls(rows, classes) == pytest.approx(
        {"one": hits[0] / labels[0], "two": hits[1] / labels[1]}
    )
    assert 0 < hits[0] < labels[0]


@every_task
def test_targets_that_are_classes_are_counted(name: str) -> None:
    sample = make_sample(name)
    task, classes = sample.task, sample.classes
    if not (task.dense or task.has_class_labels):
        assert task.measure_recalls(sample.rows, classes) == {}
        with pytest.raises(ValueError, match="expected targets that are classes"):
            task.count_targets(sample.index.records, classes)
        return
    assert sample.mask is None or sample.mask.array.size == np.prod(SHAPE)
    counts = task.count_targets(sample.index.records, classes, lambda record: sample.mask.array)  # type: ignore[union-attr]
    assert len(counts) == len(task.output_names(classes)) == task.count_outputs(classes)
    assert counts.sum() == CASES * (np.prod(SHAPE) if task.dense else 1)
    weights = task.fit_head(
        {"name": name, "class_weights": "balanced"}, sample.index.records, classes, lambda _: sample.mask.array
    )  # type: ignore[union-attr]
    assert weights["class_weights"] == pytest.approx(list((1 / counts) / (1 / counts).mean()))
    unfitted = {"name": name, "class_weights": "balanced"}
    assert task.fit_head(unfitted, []) == unfitted
