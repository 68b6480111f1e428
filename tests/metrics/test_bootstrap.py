from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medim.metrics import bootstrap
from medim.metrics.bootstrap import Scores, compute_scores, draw_resamples, weighted_mean
from medim.metrics.classification import classification_statistics
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
    alone = classification_statistics(np.tile([0.4, 0.6], (20, 1)), np.zeros(20, dtype=int))["auroc"]
    with pytest.raises(UserError, match="undefined on all cases"):
        compute_scores([[alone]], draw_resamples(SUBJECTS))


def test_a_metric_that_most_resamples_leave_undefined_is_refused() -> None:
    labels = np.zeros(20, dtype=int)
    labels[3] = 1
    rare = classification_statistics(np.tile([0.4, 0.6], (20, 1)), labels)["auroc"]
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
