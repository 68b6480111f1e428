from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from medim.metrics import compute_metrics
from medim.metrics.calibration import compute_calibration


@pytest.mark.parametrize("classes", [2, 4])
def test_the_error_is_that_of_the_metrics(classes: int) -> None:
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(classes), 200), rng.integers(0, classes, 200)
    found = compute_calibration(probabilities, labels)
    assert found.ece == pytest.approx(compute_metrics("classification", probabilities, labels)["ece"])
    assert sum(found.counts) == 200


def test_bins_hold_what_was_predicted_and_what_came_true() -> None:
    probabilities = np.array([[0.1, 0.9], [0.1, 0.9], [0.12, 0.88], [0.45, 0.55]])
    found = compute_calibration(probabilities, np.array([1, 1, 0, 0]))
    assert [bin for bin, count in enumerate(found.counts) if count] == [8, 13]
    assert found.edges[13] < 0.88 < 0.9 < found.edges[14]
    assert (found.counts[13], found.mean_confidence[13], found.accuracy[13]) == pytest.approx((3, 2.68 / 3, 2 / 3))
    assert (found.counts[8], found.mean_confidence[8], found.accuracy[8]) == (1, 0.55, 0.0)
    assert found.ece == pytest.approx((abs(2.68 - 2) + 0.55) / 4)


def test_an_empty_bin_has_no_value_and_the_result_is_json() -> None:
    found = compute_calibration(np.array([[0.0, 1.0]]), np.array([1]))
    assert (found.mean_confidence[0], found.accuracy[0], found.counts[-1], found.accuracy[-1]) == (None, None, 1, 1.0)
    json.dumps(asdict(found), allow_nan=False)


def test_a_probability_that_is_not_finite_leaves_the_error_undefined() -> None:
    probabilities = np.array([[0.2, 0.8], [np.nan, np.nan]])
    found = compute_calibration(probabilities, np.array([1, 0]))
    assert found.ece is None
    assert sum(found.counts) == 0
    json.dumps(asdict(found), allow_nan=False)
