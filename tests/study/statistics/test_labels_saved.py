from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from medim.metrics.bootstrap import Scores, compute_scores, draw_resamples, weighted_mean
from medim.study.statistics.intervals import compare_to_scratch
from medim.study.statistics.labels_saved import (
    CensoredInterval,
    CensoredValue,
    LabelsSaved,
    labels_saved,
    summary_sentence,
    time_to_level,
)
from medim.types import Array

BUDGETS = (10, 100, 1000)
SUBJECTS = [str(n) for n in range(30)]
NONE = "no evidence of a benefit"


def scores(means: list[float], noise: float, seed: int, subsets: int = 3) -> list[Scores]:
    """Scores of an arm at each budget: the mean, and scatter of runs and subjects around it."""
    rng, drawn = np.random.default_rng(seed), draw_resamples(SUBJECTS, resamples=200)
    found = []
    for mean in means:
        values = rng.normal(0, 1, (3, subsets, 1)) + rng.normal(0, 1, 30) + rng.normal(0, 1, (3, subsets, 30))
        values = mean + noise * (values - values.mean())
        found.append(compute_scores([[weighted_mean(run) for run in row] for row in values], drawn))
    return found


def curve(labels: Array) -> list[float]:
    """A learning curve: 0.1 for each factor of ten."""
    return [0.5 + 0.1 * float(v) for v in np.log10(labels)]


def test_pretraining_worth_four_times_the_labels_is_found() -> None:
    ours, scratch = scores(curve(4 * np.array(BUDGETS)), 1e-3, 0), scores(curve(np.array(BUDGETS)), 1e-3, 1)
    found = labels_saved(BUDGETS, ours, scratch)
    for saved, labels in zip(found[:2], BUDGETS, strict=False):
        assert saved.equivalent_labels.value.value == pytest.approx(4 * labels, rel=1e-3)
        assert saved.savings.value.value == pytest.approx(3 * labels, rel=1e-2)
        assert saved.ratio.value.value == pytest.approx(4, rel=1e-3)
        assert (
            labels < saved.equivalent_labels.low.value < 4 * labels < saved.equivalent_labels.high.value < 4.4 * labels
        )
        assert {
            end.censored
            for end in (saved.equivalent_labels.value, saved.equivalent_labels.low, saved.equivalent_labels.high)
        } == {""}
    assert str(found[2].equivalent_labels.value) == str(found[2].equivalent_labels.high) == "more than 1,000"
    assert str(found[2].savings.value) == "more than 0"
    assert f"{found[2].ratio.value:.1f}" == "more than 1.0"


def test_no_effect_includes_the_arms_own_labels() -> None:
    ours, scratch = scores(curve(np.array(BUDGETS)), 0.05, 2), scores(curve(np.array(BUDGETS)), 0.05, 3)
    low, middle, _ = labels_saved(BUDGETS, ours, scratch)
    assert middle.equivalent_labels.value.value == pytest.approx(100)
    assert middle.equivalent_labels.low.value < 100 < middle.equivalent_labels.high.value
    assert low.equivalent_labels.low.censored == "fewer than"


def test_an_arm_below_the_smallest_budget_of_scratch_is_worth_fewer_than_that() -> None:
    ours, scratch = scores([0.2, 0.3, 0.4], 1e-3, 4), scores(curve(np.array(BUDGETS)), 1e-3, 5)
    worst = labels_saved(BUDGETS, ours, scratch)[0]
    assert (
        str(worst.equivalent_labels.value)
        == str(worst.equivalent_labels.low)
        == str(worst.equivalent_labels.high)
        == "fewer than 10"
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_interval_excludes_the_own_labels_where_the_difference_is_clear(seed: int) -> None:
    ours, scratch = (
        scores(curve(1.6 * np.array(BUDGETS)), 0.02, seed),
        scores(curve(np.array(BUDGETS)), 0.02, 50 + seed),
    )
    found = labels_saved(BUDGETS, ours, scratch)[1]
    compared = compare_to_scratch({("a", "100"): (ours[1], scratch[1])})[0]
    assert (found.equivalent_labels.low.value > 100 + 1e-6) == (compared.p < 0.05)
    ends = [
        end.value for end in (found.equivalent_labels.low, found.equivalent_labels.value, found.equivalent_labels.high)
    ]
    assert ends == sorted(ends)


def test_budgets_out_of_order_are_pooled() -> None:
    ours, scratch = scores([0.55, 0.55, 0.55], 1e-4, 6), scores([0.4, 0.62, 0.58], 1e-4, 7)
    found = labels_saved(BUDGETS, ours, scratch)[0]
    assert found.equivalent_labels.value.value == pytest.approx(
        10 ** (1 + 0.15 / 0.2), rel=1e-3
    )  # the curve rises to 0.6


def test_all_labels_may_be_a_single_subset() -> None:
    ours, scratch = (
        [*scores(curve(k * np.array(BUDGETS[:2])), 1e-3, k), *scores(curve(k * np.array(BUDGETS[2:])), 1e-3, 9 + k, 1)]
        for k in (4, 1)
    )
    found = labels_saved(BUDGETS, ours, scratch)
    assert found[1].equivalent_labels.value.value == pytest.approx(400, rel=1e-3)
    assert found[0].variance_sources == ("seeds", "subsets", "subjects")


@pytest.mark.parametrize("budgets", [(10, 100), (10, 10, 1000), (0, 10, 100)])
def test_budgets_that_do_not_increase_or_fit_are_refused(budgets: tuple[int, ...]) -> None:
    arm = scores([0.1, 0.2, 0.3], 0.1, 8)
    with pytest.raises(ValueError, match="expected two or more increasing ones"):
        labels_saved(budgets, arm, arm)


def test_budgets_of_other_seeds_are_refused() -> None:
    arm = scores([0.1, 0.2, 0.3], 0.1, 8)
    with pytest.raises(ValueError, match="the number of seeds or resamples differs"):
        labels_saved(BUDGETS, arm, [*arm[:2], Scores(arm[2].values[:1], 30)])


def saved(labels: float, value: CensoredValue, low: CensoredValue, high: CensoredValue) -> LabelsSaved:
    span = CensoredInterval(value, low, high)
    return LabelsSaved(labels=labels, equivalent_labels=span, savings=span, ratio=span, variance_sources=())


def test_the_sentence_says_no_more_than_the_verdict() -> None:
    clear = saved(10, CensoredValue(38.4), CensoredValue(21), CensoredValue(60))
    told = "With 10 labels and the encoder you get what 38 labels (21 to 60) give without."
    assert summary_sentence(clear, "benefit") == told
    assert summary_sentence(clear, NONE) == (
        "No evidence of a benefit with 10 labels. Point estimate: like 38 labels from scratch (95 % CI 21 to 60)."
    )
    beyond = CensoredValue(150, "more than")
    assert summary_sentence(saved(10, beyond, CensoredValue(9), beyond), NONE) == (
        "No evidence of a benefit with 10 labels. Point estimate: like more than 150 labels from scratch "
        "(95 % CI 9 to more than 150)."
    )
    assert summary_sentence(clear, "harm").startswith("The encoder does harm: ")


MOST, FEWEST = CensoredValue(150, "more than"), CensoredValue(5, "fewer than")


@pytest.mark.parametrize(
    ("value", "low", "high", "told"),
    [
        (CensoredValue(38), CensoredValue(21), MOST, "what 38 labels (21 or more) give without"),
        (CensoredValue(38), FEWEST, CensoredValue(60), "what 38 labels (60 or fewer) give without"),
        (
            CensoredValue(38),
            FEWEST,
            MOST,
            "what 38 labels (the interval reaches beyond all that was tried) give without",
        ),
        (MOST, MOST, MOST, "more than 150 labels give without, the most that were tried"),
        (MOST, CensoredValue(41), MOST, "more than 150 labels give without, the most that were tried (41 or more)"),
        (FEWEST, FEWEST, CensoredValue(7), "less than 5 labels give without, the fewest that were tried (7 or fewer)"),
        (CensoredValue(10), CensoredValue(10), CensoredValue(10), "what 10 labels give without"),
        (CensoredValue(1.3), CensoredValue(1), CensoredValue(2.1), "what 1 label (1 to 2) gives without"),
        (CensoredValue(2714), CensoredValue(462), MOST, "what 2,714 labels (462 or more) give without"),
    ],
)
def test_the_sentence_says_nothing_of_labels_that_were_not_tried(
    value: CensoredValue, low: CensoredValue, high: CensoredValue, told: str
) -> None:
    assert summary_sentence(saved(1, value, low, high), "benefit") == f"With 1 label and the encoder you get {told}."


def test_the_first_step_at_the_level_of_scratch_lies_between_perhaps_and_surely() -> None:
    steps, final = (20, 40, 80, 160), scores([0.7], 0.01, 9)[0]
    ours = scores([0.60, 0.699, 0.701, 0.8], 0.01, 10)
    found = time_to_level(steps, ours, final)
    assert found.level == pytest.approx(0.7)
    assert [str(end) for end in (found.steps.low, found.steps.value, found.steps.high)] == ["40", "80", "160"]
    assert found.variance_sources == ("seeds", "subsets", "subjects")


def test_a_level_that_is_never_or_at_once_reached_is_told_so() -> None:
    final = scores([0.7], 1e-3, 11)[0]
    never = time_to_level((20, 40), scores([0.4, 0.5], 1e-3, 12), final)
    at_once = time_to_level((20, 40), scores([0.8, 0.9], 1e-3, 12), final)
    assert {str(end) for end in (never.steps.low, never.steps.value, never.steps.high)} == {"more than 40"}
    assert {str(end) for end in (at_once.steps.low, at_once.steps.value, at_once.steps.high)} == {"at most 20"}


def test_steps_measured_without_cases_speak_of_these_subjects() -> None:
    ours = [Scores(run.values[..., :1]) for run in scores([0.4, 0.9], 1e-3, 13)]
    assert time_to_level((20, 40), ours, scores([0.7], 1e-3, 14)[0]).variance_sources == ("seeds", "subsets")


def test_results_are_json() -> None:
    arm = scores([0.1, 0.2, 0.3], 0.01, 15)
    json.dumps([asdict(found) for found in labels_saved(BUDGETS, arm, arm)], allow_nan=False)
    json.dumps(asdict(time_to_level((1, 2, 3), arm, arm[1])), allow_nan=False)
