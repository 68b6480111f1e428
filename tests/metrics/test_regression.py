"""Metrics of predicted numbers against scikit-learn and scipy, with weights as repetitions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score

from medim.metrics import METRICS, build_statistics, compute_metrics
from medim.metrics.bootstrap import bootstrap_intervals

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


@pytest.mark.parametrize("name", ORACLES)
def test_an_extreme_label_has_no_effect_on_the_resamples_without_it(name: str) -> None:
    rng = np.random.default_rng(0)
    truth = np.append(rng.normal(size=12), 1e8)
    predictions = np.append(truth[:12] + 0.1 * rng.normal(size=12), 1e8)
    weights = np.append(np.ones(12), 0.0)[None]
    value = build_statistics("regression", predictions, truth)[name](weights)[0]
    assert value == pytest.approx(ORACLES[name](truth[:12], predictions[:12]), rel=1e-9)
    intervals = bootstrap_intervals(build_statistics("regression", predictions, truth), [f"s{n}" for n in range(13)])
    assert intervals[name]["ci_low"] is not None


@pytest.mark.parametrize("name", ORACLES)
def test_float32_values_have_the_metrics_of_their_float64_copies(name: str) -> None:
    rng = np.random.default_rng(0)
    truth = (1000 + rng.normal(size=30)).astype(np.float32)
    predictions = truth + rng.normal(size=30).astype(np.float32)
    exact = compute_metrics("regression", predictions.astype(np.float64), truth.astype(np.float64))[name]
    assert compute_metrics("regression", predictions, truth)[name] == exact


def test_each_metric_has_an_entry_in_the_table() -> None:
    assert set(ORACLES) <= set(METRICS)
    assert not METRICS["mae"].higher_is_better
