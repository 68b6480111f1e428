"""One score against two sides, weighted; and thresholds that are chosen on other cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from medim.metrics.bootstrap import bootstrap_intervals
from medim.metrics.metric import MetricFunction
from medim.metrics.ranking import (
    auroc_standard_error,
    average_precision,
    choose_threshold,
    operating_point_statistics,
    rank_auroc,
)
from medim.types import Array, UserError

CASES = 50


def drawn(seed: int, cases: int = CASES) -> tuple[Array, Array]:
    """Scores with ties, and sides of which 30 % are positive and score higher."""
    rng = np.random.default_rng(seed)
    positive = rng.random(cases) < 0.3
    return (rng.normal(size=cases) + positive).round(1), positive


def resamples(cases: int = CASES) -> Array:
    return np.random.default_rng(9).multinomial(cases, np.full(cases, 1 / cases), size=30)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(rank_auroc, roc_auc_score), (average_precision, average_precision_score)],
    ids=lambda f: f.__name__,
)
def test_weights_count_a_case_as_often_as_repeating_it(ours: MetricFunction, theirs: Callable[..., float]) -> None:
    scores, positive = drawn(1)
    weights = resamples()
    values = ours(scores, positive, weights.astype(float))
    for row, value in zip(weights, values, strict=True):
        repeated = np.repeat(np.arange(CASES), row)
        assert value == pytest.approx(theirs(positive[repeated], scores[repeated]))
        assert value == pytest.approx(theirs(positive, scores, sample_weight=row))


@pytest.mark.parametrize("ranking", [rank_auroc, average_precision])
@pytest.mark.parametrize("side", [True, False])
def test_a_ranking_of_one_side_alone_is_undefined(ranking: MetricFunction, side: bool) -> None:
    scores = np.array([0.1, 0.5, 0.9])
    assert np.isnan(ranking(scores, np.full(3, side), np.ones((2, 3)))).all()
    lopsided = ranking(scores, np.array([True, False, False]), np.array([[0.0, 1, 1], [1, 0, 0], [1, 1, 1]]))
    assert np.isnan(lopsided[:2]).all()
    assert np.isfinite(lopsided[2])


def test_an_uninformed_score_has_the_average_precision_of_the_share() -> None:
    positive = np.arange(20) < 5
    assert average_precision(np.zeros(20), positive, np.ones((1, 20))) == pytest.approx([0.25])


@pytest.mark.parametrize("sensitivity", [0.05, 0.5, 0.7, 0.9, 0.95, 1.0])
def test_the_threshold_is_the_highest_that_finds_the_share_asked_for(sensitivity: float) -> None:
    scores, positive = drawn(2, cases=200)
    threshold = choose_threshold(scores, positive, sensitivity)
    assert (scores >= threshold)[positive].mean() >= sensitivity
    higher = np.nextafter(threshold, np.inf)
    assert (scores >= higher)[positive].mean() < sensitivity


def test_seven_of_ten_positives_are_a_sensitivity_of_seven_tenths() -> None:
    scores, positive = np.arange(20.0), np.arange(20) >= 10
    assert choose_threshold(scores, positive, 0.7) == 13
    assert choose_threshold(scores, positive, 1.0) == 10


def test_an_operating_point_is_measured_by_sensitivity_and_specificity() -> None:
    scores, positive = drawn(3)
    point = operating_point_statistics(scores, positive, 0.5)
    weights = resamples()
    for name, side in (("sensitivity", 1), ("specificity", 0)):
        for row, value in zip(weights, point[name](weights.astype(float)), strict=True):
            repeated = np.repeat(np.arange(CASES), row)
            expected = recall_score(positive[repeated], scores[repeated] >= 0.5, pos_label=side)
            assert value == pytest.approx(expected)
    found = bootstrap_intervals(point, [f"s{i // 2}" for i in range(CASES)])["specificity"]
    assert found["ci_low"] < found["value"] < found["ci_high"]  # type: ignore[operator]


def test_a_threshold_chosen_on_few_cases_promises_more_than_it_keeps() -> None:
    """Why it is never chosen on the cases it is measured on: 200 times ten positives, sensitivity 1 asked for."""
    kept = []
    for seed in range(200):
        scores, positive = drawn(seed, cases=40)
        if positive.any() and not positive.all():
            others, sides = drawn(1000 + seed, cases=400)
            threshold = choose_threshold(scores, positive, 1.0)
            kept.append(operating_point_statistics(others, sides, threshold)["sensitivity"](np.ones((1, 400)))[0])
    assert 0.8 < np.mean(kept) < 0.97


@pytest.mark.parametrize(
    ("positive", "sensitivity", "message"),
    [
        ([True, True], 0.9, "2 positive of 2"),
        ([False, False], 0.9, "0 positive of 2"),
        ([True, False], 0.0, "above 0 and at most 1, got 0"),
        ([True, False], 1.1, "above 0 and at most 1"),
        ([True, False], float("nan"), "above 0 and at most 1"),
    ],
)
def test_what_gives_no_threshold_is_refused(positive: list[bool], sensitivity: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_threshold(np.array([0.2, 0.8]), np.array(positive), sensitivity)


def test_the_error_of_an_auroc_is_the_spread_of_that_of_drawn_cases() -> None:
    rng = np.random.default_rng(0)
    drawn = [(rng.normal(1.0, 1.0, 40)[:, None] > rng.normal(0.0, 1.0, 60)).mean() for _ in range(2000)]
    assert auroc_standard_error(float(np.mean(drawn)), 40, 60) == pytest.approx(np.std(drawn), rel=0.1)
    assert auroc_standard_error(1.0, 10, 10) == 0
