from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medim.metrics import bootstrap, build_statistics
from medim.metrics.bootstrap import (
    Scores,
    bootstrap_intervals,
    compute_scores,
    draw_resamples,
    weighted_mean,
)
from medim.types import UserError

SUBJECTS = [f"s{n // 2}" for n in range(20)]


def test_the_cases_of_a_subject_come_and_go_together() -> None:
    drawn = draw_resamples(SUBJECTS, resamples=50)
    values = np.arange(20.0)
    scores = compute_scores([[weighted_mean(values)]], drawn)
    assert scores.values.shape == (1, 1, 51)
    assert scores.values[0, 0, 0] == values.mean()
    expected = [np.average(values, weights=np.repeat(row, 2)) for row in drawn.counts]
    assert scores.values[0, 0] == pytest.approx(expected)
    assert (drawn.counts.sum(axis=1) == 10).all()


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    assert (draw_resamples(SUBJECTS, seed=1).counts == draw_resamples(SUBJECTS, seed=1).counts).all()
    assert (draw_resamples(SUBJECTS, seed=1).counts != draw_resamples(SUBJECTS, seed=2).counts).any()


def test_scores_do_not_depend_on_how_many_weights_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw_resamples(SUBJECTS, resamples=50)
    whole = compute_scores([[weighted_mean(range(20))]], drawn).values
    monkeypatch.setattr(bootstrap, "_MAX_WEIGHTS", 140)  # seven rows
    assert (compute_scores([[weighted_mean(range(20))]], drawn).values == whole).all()


@pytest.mark.parametrize(
    ("subjects", "labels", "said"),
    [
        (SUBJECTS[:8], None, "at least 5 subjects, got 4"),
        (SUBJECTS, ["ill"] * 20, "got 10 with ill"),
        (SUBJECTS, ["ill"] * 8 + ["well"] * 12, "got 4 with ill, 6 with well"),
    ],
)
def test_too_few_subjects_are_refused_with_what_is_needed(subjects: list[str], labels: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        draw_resamples(subjects, labels)
    assert "larger validation split" in str(refused.value)


def test_five_subjects_of_each_class_are_enough() -> None:
    assert draw_resamples(SUBJECTS, np.repeat([0, 1], 10)).counts.shape == (1001, 10)


def test_a_metric_without_a_value_is_refused() -> None:
    alone = build_statistics("classification", np.tile([0.4, 0.6], (20, 1)), np.zeros(20, dtype=int))["auroc"]
    with pytest.raises(UserError, match="undefined on all cases"):
        compute_scores([[alone]], draw_resamples(SUBJECTS))


def test_a_metric_that_most_resamples_leave_undefined_is_refused() -> None:
    labels = np.zeros(20, dtype=int)
    labels[3] = 1
    rare = build_statistics("classification", np.tile([0.4, 0.6], (20, 1)), labels)["auroc"]
    assert np.isnan(compute_scores([[rare]], draw_resamples(SUBJECTS)).values).any()  # a third of them
    drawn = draw_resamples([str(n) for n in range(20)])
    with pytest.raises(UserError, match="of 1001 resamples"):
        compute_scores([[lambda weights: np.where(weights[:, 3] == 1, weights[:, 3], np.nan)]], drawn)


def test_a_single_subset_stands_for_each_of_the_others() -> None:
    three, one = Scores(np.arange(6.0).reshape(2, 3, 1)), Scores(np.ones((2, 1, 1)))
    assert ((three - one).values == three.values - 1).all()


@pytest.mark.parametrize(
    "other",
    [Scores(np.zeros((1, 3, 1))), Scores(np.zeros((2, 2, 1))), Scores(np.zeros((2, 3, 5)), 7)],
)
def test_arms_of_other_shapes_are_refused(other: Scores) -> None:
    subjects = other.subjects and 6
    with pytest.raises(ValueError, match=r"expected|broadcast"):
        Scores(np.zeros((2, 3, other.values.shape[2])), subjects) - other


def test_what_is_known_for_all_cases_only_is_compared_on_all_cases_only() -> None:
    whole, resampled = Scores(np.ones((2, 3, 1))), Scores(np.zeros((2, 3, 9)), 7)
    assert (whole - resampled).values.shape == (2, 3, 1)
    assert (whole - resampled).subjects == 0


def mean_interval(values: Any, subjects: list[str], **options: Any) -> dict[str, Any]:
    return bootstrap_intervals({"mean": weighted_mean(values)}, subjects, **options)["mean"]


def test_the_mean_of_one_case_a_subject_has_the_interval_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, size=400)
    found = mean_interval(values, [f"s{i}" for i in range(400)], resamples=4000)
    half = 1.96 * values.std() / 20
    assert found["value"] == pytest.approx(values.mean())
    assert found["ci_low"] == pytest.approx(values.mean() - half, abs=0.002)
    assert found["ci_high"] == pytest.approx(values.mean() + half, abs=0.002)


def test_the_interval_is_over_subjects_so_repeating_each_case_of_a_subject_does_not_narrow_it() -> None:
    values = list(np.random.default_rng(1).random(30))
    subjects = [f"s{i}" for i in range(30)]
    once = mean_interval(values, subjects, seed=5)
    often = mean_interval(values * 10, subjects * 10, seed=5)
    assert once["ci_low"] == pytest.approx(often["ci_low"])
    assert once["ci_high"] == pytest.approx(often["ci_high"])
    assert (once["n"], often["n"]) == (30, 300)


def test_one_seed_gives_one_interval_whatever_the_keys_of_the_subjects() -> None:
    values = list(np.random.default_rng(1).random(12))
    one = mean_interval(values, [f"s-{i % 6}" for i in range(12)], seed=3)
    assert one == mean_interval(values, [f"other-{i % 6}" for i in range(12)], seed=3)
    assert one != mean_interval(values, [f"s-{i % 6}" for i in range(12)], seed=4)


def test_a_single_subject_has_a_value_and_no_interval() -> None:
    assert mean_interval([1.0, 2.0], ["a", "a"]) == {"value": 1.5, "ci_low": None, "ci_high": None, "n": 2}


def test_resamples_of_a_single_class_are_left_out_of_the_interval_of_auroc() -> None:
    probabilities = np.random.default_rng(4).dirichlet(np.ones(2), 12)
    labels = np.zeros(12, dtype=int)
    labels[:3] = 1  # a resample of 12 without any of the three: (9/12)^12 = 3 %
    statistics = build_statistics("classification", probabilities, labels)
    found = bootstrap_intervals(statistics, [str(i) for i in range(12)])["auroc"]
    assert found["ci_low"] is not None
    assert 0 <= found["ci_low"] <= found["value"] <= found["ci_high"] <= 1  # type: ignore[operator]


def test_no_interval_where_most_resamples_define_no_value() -> None:
    rare = {"rare": lambda w: np.where(w[:, 0] == 1, 0.5, np.nan)}  # P(drawn once) = 4/9
    assert bootstrap_intervals(rare, ["a", "b", "c"])["rare"] == {"value": 0.5, "ci_low": None, "ci_high": None, "n": 3}


def test_a_large_set_is_resampled_in_parts_with_the_same_result() -> None:
    values = list(np.random.default_rng(1).random(9000))
    subjects = [f"s{i}" for i in range(9000)]
    found = mean_interval(values, subjects, resamples=1000)  # 9 million weights
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * np.std(values) / 9000**0.5, rel=0.15)  # type: ignore[operator]


def test_an_interval_of_an_evaluation_uses_the_resamples_of_a_study() -> None:
    values = np.random.default_rng(2).random(20)
    scores = compute_scores([[weighted_mean(values)]], draw_resamples(SUBJECTS, seed=7)).values[0, 0]
    estimate = bootstrap_intervals({"mean": weighted_mean(values)}, SUBJECTS, seed=7)["mean"]
    assert estimate["value"] == scores[0]
    assert [estimate["ci_low"], estimate["ci_high"]] == list(np.percentile(scores[1:], [2.5, 97.5]))
