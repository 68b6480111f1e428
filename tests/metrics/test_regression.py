"""Metrics of predicted numbers against scikit-learn and scipy, with weights as repetitions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score

from medim.metrics import METRICS, build_statistics

ORACLES = {"r2": r2_score, "mae": mean_absolute_error, "pearson": lambda truth, values: pearsonr(truth, values)[0]}


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("name", ORACLES)
def test_weighted_metrics_equal_those_of_repeated_cases(name: str, offset: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=30) + offset
    predictions = truth + rng.normal(size=30)
    weights = np.concatenate([np.ones((1, 30)), rng.integers(0, 4, (5, 30))]).astype(float)
    values = build_statistics("regression", predictions, truth)[name](weights)
    for row, value in zip(weights, values, strict=True):
        repeated = np.repeat(np.arange(30), row.astype(int))
        assert value == pytest.approx(ORACLES[name](truth[repeated], predictions[repeated]), rel=1e-9)


@pytest.mark.parametrize("name", ["r2", "pearson"])
def test_a_constant_truth_defines_no_value(name: str) -> None:
    statistic = build_statistics("regression", np.array([1.0, 2.0, 3.0]), np.full(3, 0.1))[name]
    assert np.isnan(statistic(np.ones((2, 3)))).all()


def test_each_metric_has_an_entry_in_the_table() -> None:
    assert set(ORACLES) <= set(METRICS)
    assert not METRICS["mae"].higher_is_better
