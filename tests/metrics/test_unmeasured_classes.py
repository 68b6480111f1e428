"""Classes without a true voxel have no score; a missed structure has a distance and is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medim.data.index.index import ImageRecord
from medim.evaluation.cases import summarise_cases
from medim.metrics.segmentation import METRIC_RULE
from medim.tasks import find_task_of_kind
from medim.tasks.task import CaseRow, LabelledCase
from medim.types import IGNORE_INDEX, Array, Volume

TASK = find_task_of_kind("segmenter")
CLASSES = ("a", "b", "c")


def score(truth: Array, answer: Array, number: int = 0, classes: Any = CLASSES, source: Any = ()) -> list[CaseRow]:
    affine = np.eye(4)
    volume, mask = (Volume(array[None], affine, affine, truth.shape) for array in (truth.astype(np.float32), truth))
    record: ImageRecord = None  # type: ignore[assignment]  # the task does not read it
    case = LabelledCase(record=record, volume=volume, mask=mask, classes=classes, source_classes=source)
    assert TASK.find_target_error(case) is None
    return [{"image": f"i{number}", "subject": f"s{number}", **row} for row in TASK.score_case(answer, case)]


def box(value: int, start: int = 1) -> Array:
    array = np.zeros((6, 6, 6), np.uint8)
    array[start : start + 3, 1:4, 1:4] = value
    return array


def measured(rows: list[CaseRow]) -> dict[str, Any]:
    TASK.clear_unmeasured_classes(rows)
    summary = summarise_cases(rows, "segmenter", CLASSES)
    assert summary["metric_rule"] == METRIC_RULE == 2
    return summary["metrics"]


def test_a_class_that_no_truth_contains_has_no_value_and_stands_in_no_mean() -> None:
    rows = [row for k in range(6) for row in score(box(1), box(2), k)]  # b is predicted in every case, never true
    metrics = measured(rows)
    assert metrics["dice"]["value"] == 0.0
    assert metrics["dice_a"]["value"] == 0.0
    for name in ("dice_b", "dice_c", "hd95_b", "surface_dice_c"):
        assert (metrics[name]["value"], metrics[name]["ci_low"], metrics[name]["n"]) == (None, None, 0), name
    assert all(row["dice"] is None for row in rows if row["class"] != "a")
    assert all(row["predicted_ml"] > 0 for row in rows if row["class"] == "b")


def test_a_case_in_which_truth_and_prediction_lack_a_class_has_no_dice() -> None:
    rows = score(box(1), box(1), 0) + score(box(2), box(2), 1) + score(box(2), box(0), 2)
    metrics = measured(rows)
    assert (metrics["dice_a"]["value"], metrics["dice_a"]["n"]) == (1.0, 1)
    assert (metrics["dice_b"]["value"], metrics["dice_b"]["n"]) == (0.5, 2)
    assert (metrics["dice"]["value"], metrics["dice"]["n"]) == (
        0.75,
        3,
    )  # mean of the lines below
    assert metrics["dice_c"]["value"] is None


def test_a_false_positive_in_a_case_without_the_class_counts_as_zero() -> None:
    metrics = measured(score(box(1), box(1), 0) + score(box(0), box(1), 1))
    assert (metrics["dice_a"]["value"], metrics["dice_a"]["n"]) == (0.5, 2)
    assert (metrics["hd95_a"]["value"], metrics["hd95_a"]["n"], metrics["hd95_a"]["missed"]) == (0.0, 1, 0)


def test_a_missed_structure_has_the_diagonal_of_the_image_as_distance_and_is_counted() -> None:
    metrics = measured(score(box(1), box(1), 0) + score(box(1), box(0), 1))
    assert metrics["hd95_a"]["value"] == pytest.approx(108**0.5 / 2)
    assert (metrics["hd95_a"]["n"], metrics["hd95_a"]["missed"]) == (2, 1)
    assert "missed" not in metrics["dice_a"]


def test_voxels_without_a_label_count_neither_as_truth_nor_as_false_positives() -> None:
    truth = box(1)
    truth[4:] = IGNORE_INDEX
    answer = box(1)
    answer[4:] = 1
    rows = score(truth, answer)
    assert rows[0]["dice"] == 1.0
    assert rows[0]["hd95"] == 0.0
    assert rows[0]["predicted_ml"] == rows[0]["truth_ml"] == pytest.approx(0.027)


def test_a_source_may_lack_classes_of_the_model_and_number_them_in_another_order() -> None:
    assert TASK.find_class_error(CLASSES, ("c", "a")) is None
    assert "expected the model's classes" in str(TASK.find_class_error(CLASSES, ("a", "d")))
    rows = score(box(1), box(3), source=("c", "a"))
    assert {row["class"]: row["dice"] for row in rows} == {"a": None, "b": None, "c": 1.0}


def test_the_difference_of_two_networks_is_the_difference_of_their_metrics() -> None:
    one = score(box(1), box(1), 0) + score(box(0), box(1), 1)  # a false positive costs the first network
    two = score(box(1), box(1), 0) + score(box(0), box(0), 1)
    gaps = TASK.compare_cases(one, two, CLASSES)
    assert gaps["dice_a"]["value"] == gaps["dice"]["value"] == -0.5
    assert gaps["dice_b"]["value"] is None


def test_rows_of_the_first_metric_rule_are_summarised_by_this_one() -> None:
    rows = score(box(1), box(1), 0)
    for row in rows[1:]:
        row["dice"] = row["surface_dice"] = 1.0  # as metric rule 1 scored absent classes
    rows[0]["dice"] = 0.25
    assert measured(rows)["dice"]["value"] == 0.25
