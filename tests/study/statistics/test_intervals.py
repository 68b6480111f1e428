from __future__ import annotations

import json
import runpy
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medim.metrics.bootstrap import Scores, compute_scores, draw_resamples, weighted_mean
from medim.study.statistics.intervals import (
    Comparison,
    ConfidenceInterval,
    apply_holm_correction,
    combine_verdicts,
    compare_to_scratch,
    compute_interval,
    get_metric_limits,
    paired_difference,
)
from medim.types import Array, UserError

SUBJECTS = [f"s{n // 2}" for n in range(40)]


def cells(values: Array) -> list[list[object]]:
    return [[weighted_mean(case) for case in row] for row in values]


def whole(values: Array) -> Scores:
    """Scores of runs (S, T) whose subjects were not resampled."""
    return Scores(np.asarray(values, dtype=float)[..., None])


def test_the_value_is_the_mean_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.8, 0.1, (3, 5, 40)), rng.normal(0.7, 0.1, (3, 5, 40))
    found = paired_difference(cells(ours), cells(theirs), SUBJECTS)  # type: ignore[arg-type]
    assert found.value == pytest.approx((ours - theirs).mean())
    assert (found.seeds, found.subsets, found.subjects) == (3, 5, 20)
    assert found.variance_sources == ("seeds", "subsets", "subjects")
    assert found.low < found.value < found.high


def test_what_both_arms_share_cancels() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0.5, 0.3, 40) + rng.normal(0, 0.2, (3, 3, 1))
    found = paired_difference(cells(hard + 0.01), cells(hard), SUBJECTS)  # type: ignore[arg-type]
    assert (found.low, found.high) == pytest.approx((0.01, 0.01))


def test_arms_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        paired_difference(cells(np.zeros((2, 2, 40))), cells(np.zeros((2, 3, 40))), SUBJECTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1])
def test_runs_that_differ_by_seed_or_subset_alone_give_the_t_interval_of_their_means(axis: int) -> None:
    means = np.random.default_rng(2).normal(0.0, 1.0, 4)
    runs = np.broadcast_to(np.expand_dims(means, 1 - axis), (4, 3) if axis == 0 else (3, 4))
    found = compute_interval(whole(runs))
    error = means.std(ddof=1) / 2
    assert (found.error, found.df) == pytest.approx((error, 3))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, means.mean(), error))


def test_one_run_gives_the_t_interval_of_its_subjects() -> None:
    values = np.repeat(np.random.default_rng(3).normal(0.0, 1.0, 20), 2)
    scores = compute_scores([[weighted_mean(values)]], draw_resamples(SUBJECTS, resamples=20_000))
    found = compute_interval(scores)
    assert found.df == pytest.approx(19)
    assert found.error == pytest.approx(values[::2].std(ddof=1) / np.sqrt(20), rel=0.02)
    assert found.variance_sources == ("subjects",)


def test_noise_of_subjects_is_not_counted_again_as_scatter_of_runs() -> None:
    rng, errors, truth = np.random.default_rng(4), [], 1 / np.sqrt(4 * 4 * 20)
    drawn = draw_resamples([str(n) for n in range(20)], resamples=200)
    for _ in range(60):
        errors.append(compute_interval(compute_scores(cells(rng.normal(0, 1, (4, 4, 20))), drawn)).error)  # type: ignore[arg-type]
    assert truth < np.median(errors) < 1.35 * truth  # counted at all three levels it were sqrt(3) times the truth


ONE = "this pair of pretraining and from-scratch runs"


def test_degrees_of_freedom_never_fall_below_those_of_the_least_certain_part() -> None:
    rng, drawn = np.random.default_rng(6), draw_resamples([str(n) for n in range(14)], resamples=200)
    found = [
        compute_interval(compute_scores(cells(rng.normal(0, 1, (3, 3, 14))), drawn)).df  # type: ignore[arg-type]
        for _ in range(60)
    ]
    assert min(found) == 2, "scatter of runs barely above the noise of subjects"
    assert max(found) == pytest.approx(13), "scatter of runs below it: the subjects alone"


@pytest.mark.parametrize(
    ("shape", "over", "scope"),
    [
        ((1, 3), ("subsets", "subjects"), f"over 3 label subsets and 20 subjects; it applies only to {ONE}"),
        ((3, 1), ("seeds", "subjects"), "over 3 pretraining seeds and 20 subjects; it applies only to this label subset"),  # noqa: E501
        ((1, 1), ("subjects",), f"over 20 subjects; it applies only to {ONE} and this label subset"),
        ((2, 2), ("seeds", "subsets", "subjects"), "over 2 pretraining seeds, 2 label subsets and 20 subjects"),
    ],
)  # fmt: skip
def test_an_interval_says_what_it_speaks_of(shape: tuple[int, int], over: tuple[str, ...], scope: str) -> None:
    values = np.random.default_rng(5).normal(0, 1, (*shape, 40))
    found = compute_interval(compute_scores(cells(values), draw_resamples(SUBJECTS)))  # type: ignore[arg-type]
    assert (found.variance_sources, found.scope_text) == (over, scope)


def test_a_single_number_has_no_interval() -> None:
    with pytest.raises(UserError, match="Add seeds or subsets"):
        compute_interval(whole(np.ones((1, 1))))


def test_resamples_without_a_value_are_left_out() -> None:
    values = np.random.default_rng(6).normal(0, 1, (2, 2, 101))
    holed = np.insert(values, [5, 50], np.nan, axis=2)
    assert compute_interval(Scores(holed, 9)) == compute_interval(Scores(values, 9))


def test_the_ends_stay_within_the_limits_of_the_metric() -> None:
    found = compute_interval(whole(np.array([[0.9, 0.99], [0.95, 1.0]])), (0.0, 1.0))
    assert found.high == 1.0
    assert 0 < found.low < found.value


def test_the_ends_of_a_difference_stay_where_two_metrics_can_lie() -> None:
    ours, theirs = whole(np.array([[0.9, 0.2], [0.95, 1.0]])), whole(np.array([[0.1, 0.3], [0.0, 0.1]]))
    free, clipped = (
        compare_to_scratch({("dim", "1"): (ours, theirs)}, *given)[0]
        for given in ((), (get_metric_limits("dice", difference=True),))
    )
    assert free.difference.high > 1
    assert (clipped.difference.high, clipped.p) == (1.0, free.p)
    assert (get_metric_limits("auroc"), get_metric_limits("hd95_left")) == ((0.0, 1.0), (0.0, np.inf))
    assert get_metric_limits("hd95_left", difference=True) == (-np.inf, np.inf)


@given(st.lists(st.floats(-1, 1).map(lambda v: round(v, 3)), min_size=6, max_size=6), st.floats(-1, 1))
def test_a_p_value_is_below_five_percent_exactly_where_the_interval_excludes_the_value(
    runs: list[float], against: float
) -> None:
    found = compute_interval(whole(np.array(runs).reshape(2, 3)))
    if min(abs(against - found.low), abs(against - found.high)) > 1e-9:
        assert (found.p_value(against) < 0.05) == (not found.low <= against <= found.high)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(p: list[float]) -> None:
    places = range(len(p))
    subsets = [s for size in range(1, len(p) + 1) for s in combinations(places, size)]
    closed = [max(min(1, len(s) * min(p[i] for i in s)) for s in subsets if place in s) for place in places]
    assert apply_holm_correction(p) == pytest.approx(closed)


def test_a_study_without_comparisons_has_nothing_to_correct() -> None:
    assert apply_holm_correction([]) == []


def test_verdicts_follow_the_corrected_p_value_and_the_sign() -> None:
    up, flat = np.array([[0.30, 0.31], [0.29, 0.30]]), np.array([[0.1, -0.1], [-0.1, 0.1]])
    zero = whole(np.zeros((2, 2)))
    pairs = {
        ("a", "10"): (whole(up), zero),
        ("a", "100"): (whole(flat), zero),
        ("b", "10"): (whole(-up), zero),
    }
    found = {(c.arm, c.budget): c for c in compare_to_scratch(pairs)}
    assert [c.verdict for c in found.values()] == ["benefit", "no evidence of a benefit", "harm"]
    assert found["a", "10"].p_corrected == pytest.approx(3 * found["a", "10"].p)
    assert combine_verdicts([found["a", "10"], found["a", "100"]]) == "benefit"
    assert combine_verdicts(list(found.values())) == "harm"
    assert combine_verdicts([found["a", "100"]]) == "no evidence of a benefit"


def test_a_difference_that_is_clear_alone_may_not_be_clear_among_many() -> None:
    rng, zero = np.random.default_rng(7), whole(np.zeros((3, 3)))
    edge = whole(np.array([[0.1], [0.2], [0.3]]) + np.array([-0.05, 0.0, 0.05]) + 0.1)
    alone = compare_to_scratch({("a", "10"): (edge, zero)})
    many = compare_to_scratch(
        {("a", "10"): (edge, zero)} | {("b", str(n)): (whole(rng.normal(0, 1, (3, 3))), zero) for n in "123"}
    )
    assert (alone[0].verdict, many[0].verdict) == ("benefit", "no evidence of a benefit")
    assert many[0].p == alone[0].p == alone[0].p_corrected < 0.05 < many[0].p_corrected


def test_results_are_json_and_the_same_each_time() -> None:
    values = np.random.default_rng(8).normal(0.1, 1, (3, 3, 40))

    def run() -> str:
        drawn = draw_resamples(SUBJECTS)
        pairs = {("a", "10"): (compute_scores(cells(values), drawn), compute_scores(cells(0 * values), drawn))}  # type: ignore[arg-type]
        return json.dumps([asdict(c) for c in compare_to_scratch(pairs)], allow_nan=False)

    assert run() == run()
    assert json.loads(run())[0]["difference"]["variance_sources"] == ["seeds", "subsets", "subjects"]


def test_arms_without_any_difference_have_an_interval_of_zero_width() -> None:
    found: Comparison = compare_to_scratch({("a", "10"): (whole(np.ones((3, 3))), whole(np.ones((3, 3))))})[0]
    assert isinstance(found.difference, ConfidenceInterval)
    assert (found.difference.low, found.difference.high, found.p) == (0, 0, 1)
    assert found.verdict == "no evidence of a benefit"


@pytest.fixture(scope="module")
def simulation() -> dict[str, object]:
    return runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "coverage.py"))


@pytest.mark.parametrize(("mix", "unequal"), [("subjects", False), ("noise", False), ("even", True), ("seeds", False)])
def test_intervals_of_three_seeds_and_three_subsets_hold_the_truth(simulation, mix: str, unequal: bool) -> None:  # type: ignore[no-untyped-def]
    found = simulation["measure_coverage"](simulation["build_mean_study"](3, 3, 20, mix, unequal=unequal), 200)
    assert 0.88 <= found["coverage"] <= 0.995  # 90 to 98 % and what 200 repetitions allow


def test_the_simulation_sees_an_interval_that_is_too_short(simulation) -> None:  # type: ignore[no-untyped-def]
    found = simulation["measure_coverage"](simulation["build_mean_study"](1, 3, 20, "subsets"), 200)
    assert found["percentile_coverage"] < 0.9 < found["coverage"]


def test_studies_without_an_effect_seldom_raise_an_alarm(simulation) -> None:  # type: ignore[no-untyped-def]
    assert simulation["measure_false_alarms"]("even", 20) <= 0.1
