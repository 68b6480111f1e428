"""Rankings of findings, each where it is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from medim.metrics import METRICS, list_metrics
from medim.metrics.multi_label import mean_statistics, multi_label_metrics
from medim.types import Array

NAMES = ["edema", "mass", "nodule"]
FUNCTIONS = {name: METRICS[name].functions["multi_label"] for name in list_metrics("multi_label")}


def drawn(cases: int = 60) -> tuple[Array, Array]:
    """Probabilities that tell a little, and labels of which a quarter is unknown."""
    rng = np.random.default_rng(0)
    labels = (rng.random((cases, 3)) < [0.5, 0.3, 0.4]).astype(float)
    probabilities = 1 / (1 + np.exp(-rng.normal(labels - 0.5)))
    labels[rng.random(labels.shape) < 0.25] = np.nan
    return probabilities, labels


def measured(probabilities: Array, labels: Array) -> dict[str, dict[str, float | int | None]]:
    subjects = [f"s{i // 2}" for i in range(len(labels))]
    return multi_label_metrics(FUNCTIONS, probabilities, labels, NAMES, subjects, seed=0, resamples=200)


def test_each_finding_is_ranked_where_it_is_known_and_the_mean_is_over_findings() -> None:
    probabilities, labels = drawn()
    found = measured(probabilities, labels)
    for metric, exact in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        values = []
        for k, name in enumerate(NAMES):
            known = ~np.isnan(labels[:, k])
            values.append(exact(labels[known, k], probabilities[known, k]))
            assert found[f"{metric}_{name}"]["value"] == pytest.approx(values[-1])
            assert found[f"{metric}_{name}"]["n"] == known.sum()
        assert found[metric]["value"] == pytest.approx(np.mean(values))
        assert found[metric]["ci_low"] < found[metric]["value"] < found[metric]["ci_high"]  # type: ignore[operator]


def test_what_is_said_of_an_unknown_finding_plays_no_part() -> None:
    probabilities, labels = drawn()
    other = np.where(np.isnan(labels), 1 - probabilities, probabilities)
    assert measured(other, labels) == measured(probabilities, labels)
    both = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=5).astype(float)
    for name in FUNCTIONS:
        one, two = (mean_statistics(FUNCTIONS, p, labels)[name](both) for p in (probabilities, other))
        np.testing.assert_array_equal(one, two)


def test_weights_count_an_image_as_often_as_repeating_it() -> None:
    probabilities, labels = drawn()
    weights = np.random.default_rng(2).multinomial(60, np.full(60, 1 / 60), size=10)
    for metric, statistic in mean_statistics(FUNCTIONS, probabilities, labels).items():
        values = statistic(weights.astype(float))
        for row, value in zip(weights, values, strict=True):
            repeated = np.repeat(np.arange(60), row)
            assert value == pytest.approx(measured(probabilities[repeated], labels[repeated])[metric]["value"])


def test_a_finding_without_both_sides_has_no_value_and_is_not_in_the_mean() -> None:
    probabilities, labels = drawn()
    labels[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 0.0)
    found = measured(probabilities, labels)
    assert found["auroc_mass"]["value"] is found["auroc_mass"]["ci_low"] is None
    assert found["auroc_mass"]["n"] == (~np.isnan(labels[:, 1])).sum()
    others = [found[f"auroc_{name}"]["value"] for name in ("edema", "nodule")]
    assert found["auroc"]["value"] == pytest.approx(np.mean(others))  # type: ignore[arg-type]
    nothing = measured(probabilities, np.full_like(labels, np.nan))
    assert all(metric["value"] is None and metric["n"] == 0 for metric in nothing.values())
