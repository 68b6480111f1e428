"""Properties that every entry of METRICS must have, in each of its tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medim.metrics import METRICS, higher_is_better
from medim.reports.page import metric_name
from medim.reports.runs import draw_plot
from medim.tasks import TASKS
from medim.types import Array
from tests.contracts.task_samples import make_sample

CASES = 40
PAIRS = [(name, task) for name, metric in METRICS.items() for task in metric.functions]
every_function = pytest.mark.parametrize(("name", "task"), PAIRS, ids=[f"{name}-{task}" for name, task in PAIRS])
every_mask_metric = pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.mask_function])


def draw_cases(task: str, seed: int) -> tuple[Array, Array, Array]:
    """Predictions, targets, and predictions that equal the targets."""
    rng = np.random.default_rng(seed)
    if task == "classification":
        labels = rng.permutation(np.arange(CASES) % 3)
        return rng.dirichlet(np.ones(3), CASES), labels, np.eye(3)[labels]
    if task == "multi_label":
        present = rng.permutation(np.arange(CASES) % 3 == 0)
        return rng.random(CASES), present, present.astype(float)
    truth = rng.normal(50, 10, CASES)
    return truth + rng.normal(0, 5, CASES), truth, truth


def draw_masks(seed: int) -> Array:
    """Prediction and truth on an anisotropic grid, neither of them empty."""
    return np.random.default_rng(seed).random((2, 9, 8, 7)) < 0.4


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_has_a_title_of_its_own_and_belongs_to_tasks(name: str) -> None:
    metric = METRICS[name]
    assert [other.title for other in METRICS.values()].count(metric.title) == 1
    assert metric.tasks
    assert set(metric.tasks) <= set(TASKS)
    assert metric.limits[0] < metric.limits[1]


@every_function
def test_weights_count_a_case_as_often_as_repeating_it(name: str, task: str) -> None:
    function = METRICS[name].functions[task]
    predictions, targets, _ = draw_cases(task, 0)
    weights = np.random.default_rng(1).multinomial(CASES, np.full(CASES, 1 / CASES), size=6)
    values = function(predictions, targets, weights.astype(float))
    assert values.shape == (6,)
    for row, value in zip(weights, values, strict=True):
        repeated = np.repeat(np.arange(CASES), row)
        (expected,) = function(predictions[repeated], targets[repeated], np.ones((1, CASES)))
        assert value == pytest.approx(expected, abs=1e-9)


@every_function
def test_perfect_predictions_have_the_best_value_and_others_are_within_the_limits(name: str, task: str) -> None:
    metric, weights = METRICS[name], np.ones((1, CASES))
    predictions, targets, perfect = draw_cases(task, 2)
    (value,), (best,) = (metric.functions[task](p, targets, weights) for p in (predictions, perfect))
    assert best == pytest.approx(metric.limits[1] if metric.higher_is_better else metric.limits[0])
    assert metric.limits[0] <= value <= metric.limits[1]
    assert value < best if metric.higher_is_better else value > best


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.dense])
def test_a_prediction_that_is_not_finite_leaves_every_metric_undefined(task: str, value: float) -> None:
    sample = make_sample(task)
    number = next(name for name, kind in sample.task.case_columns.items() if kind == "number" and name != "true_value")
    rows = [{**row, number: value} if row["image"] == sample.rows[0]["image"] else row for row in sample.rows]
    metrics = TASKS[task].summarise_cases(rows, sample.classes, resamples=20)
    assert [name for name, metric in metrics.items() if metric["value"] is not None] == []
    page = [*sample.task.describe_evaluation(rows, sample.classes).plots]
    assert all(draw_plot(plot, metrics).svg for plot in page)


@every_function
def test_the_order_of_the_cases_has_no_influence(name: str, task: str) -> None:
    predictions, targets, _ = draw_cases(task, 3)
    order, weights = np.random.default_rng(4).permutation(CASES), np.ones((1, CASES))
    function = METRICS[name].functions[task]
    one, two = function(predictions, targets, weights), function(predictions[order], targets[order], weights)
    np.testing.assert_allclose(one, two, atol=1e-12)


@every_mask_metric
def test_equal_masks_have_the_best_value_and_others_are_within_the_limits(name: str) -> None:
    metric, (prediction, truth) = METRICS[name], draw_masks(0)
    assert metric.mask_function
    best, value = (metric.mask_function(mask, truth, [0.7, 1.0, 3.0]) for mask in (truth, prediction))
    assert isinstance(value, float)
    assert best == pytest.approx(metric.limits[1] if metric.higher_is_better else metric.limits[0])
    assert metric.limits[0] <= value <= metric.limits[1]
    assert value < best if metric.higher_is_better else value > best


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, metric in METRICS.items() for task in metric.tasks])
def test_a_metric_is_evaluated_and_has_its_title_and_unit_in_reports(name: str, task: str) -> None:
    sample = make_sample(task)
    metrics = TASKS[task].summarise_cases(sample.rows, sample.classes, resamples=50)
    keys = [key for key in metrics if key == name or key.startswith(f"{name}_")]
    assert keys
    for key in keys:
        assert math.isfinite(metrics[key]["value"] or math.nan), key
        assert METRICS[name].title in metric_name(key)
        assert METRICS[name].unit in metric_name(key)
        assert higher_is_better(key) == METRICS[name].higher_is_better
    if TASKS[task].in_studies:
        assert set(keys) <= set(TASKS[task].study_metrics(sample.classes))


@pytest.mark.parametrize(
    ("task", "metric"),
    [("segmentation", "dice"), ("classification", "auroc"), ("multi_label", "auroc"), ("regression", "r2")],
)
def test_the_primary_metric_of_a_task_is_the_first(task: str, metric: str) -> None:
    assert TASKS[task].metric == metric
