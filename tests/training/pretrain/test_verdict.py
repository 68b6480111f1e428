"""A verdict, why, and what it needs; the table of its edges is in test_monitor.py."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from medim.training.pretrain.history import MetricHistory
from medim.training.pretrain.verdict import (
    ADVICE,
    TrainingVerdict,
    describe_collapse,
    describe_shortfall,
    describe_shrinkage,
    judge_run,
)

LEVELS = {"dim": 4.0}


def test_a_verdict_names_the_term_its_loss_and_what_was_needed() -> None:
    found = judge_run({"dim": 4.0, "coordinates": 3.0}, {"dim": (2.0, 0.1), "coordinates": (2.95, 0.02)})
    assert found.verdict == "at-chance"
    assert found.why == "coordinates: 2.95 held out, 3 at chance: gain 0.05, needed 0.1"


@pytest.mark.parametrize("level", [2.0, 8.04, 12.0])
def test_the_needed_gain_does_not_depend_on_the_number_of_classes(level: float) -> None:
    verdicts = [judge_run({"dim": level}, {"dim": (level - gain, 0.01)}).verdict for gain in (0.02, 0.05, 0.099, 0.101)]
    assert verdicts == ["at-chance", "weak", "weak", "learning"]


def test_a_run_is_weak_only_if_each_of_its_terms_is_better_than_chance() -> None:
    levels = {"dim": 4.0, "coordinates": 3.0}
    assert judge_run(levels, {"dim": (2.0, 0.01), "coordinates": (2.95, 0.01)}).verdict == "weak"
    assert judge_run(levels, {"dim": (2.0, 0.01), "coordinates": (3.0, 0.0)}).verdict == "at-chance"


def test_a_loss_without_a_chance_level_needs_a_share_of_its_first_value() -> None:
    report = judge_run({"vae": 0.5}, {"vae": (0.45, 0.001)}, has_chance=False)
    assert report == ("learning", "vae: 0.45 held out, 0.5 at the first step: gain 0.05, needed 0.025")
    assert judge_run({"vae": 0.5}, {"vae": (0.49, 0.001)}, has_chance=False).verdict == "weak"


def test_a_loss_that_is_no_number_outweighs_all_else() -> None:
    assert judge_run(LEVELS, {"dim": (2.0, 0.1)}, non_finite="dim was nan", collapse="flat") == (
        "diverged",
        "dim was nan",
    )
    assert judge_run(LEVELS, {"dim": (math.nan, 0.1)}, collapse="flat").verdict == "diverged"


def test_a_run_that_strayed_has_diverged_unless_it_has_learnt_since() -> None:
    assert judge_run(LEVELS, {"dim": (4.0, 0.1)}, above_chance="far").verdict == "diverged"
    assert judge_run(LEVELS, {"dim": (2.0, 0.1)}, above_chance="far", collapse="flat").verdict == "diverged"
    assert judge_run(LEVELS, {"dim": (2.0, 0.1)}, above_chance="far").verdict == "learning"


def test_without_validation_losses_a_run_is_not_measured_unless_it_has_diverged() -> None:
    assert judge_run(LEVELS, {}) == ("not-measured", "there is no validation loss")
    assert judge_run(LEVELS, {}, non_finite="NaN").verdict == "diverged"
    assert judge_run(LEVELS, {}, above_chance="far").verdict == "diverged"
    assert "learning rate" not in ADVICE["not-measured"]


@pytest.mark.parametrize(("rank", "spread", "flat"), [(1.2, 0.5, True), (9.0, 0.01, True), (9.0, 0.5, False)])
def test_summaries_are_flat_by_rank_or_by_spread(rank: float, spread: float, flat: bool) -> None:
    assert bool(describe_collapse(rank, spread)) == flat


def test_summaries_that_were_never_measured_are_not_flat() -> None:
    assert describe_collapse(math.nan, math.nan) == ""


def test_every_bad_verdict_has_advice() -> None:
    assert set(ADVICE) == set(get_args(TrainingVerdict))
    assert all(ADVICE[verdict] for verdict in ADVICE if verdict != "learning")


def test_weights_that_shrank_are_a_collapse_only_where_nothing_is_learnt() -> None:
    shrunk = describe_shrinkage(0.1, at_start=7.0)
    assert "shrunk from 7 to 0.1" in shrunk
    assert not describe_shrinkage(1.0, at_start=7.0)
    assert not describe_shrinkage(float("nan"), at_start=7.0)
    for loss, verdict in ((3.99, "collapsed"), (1.0, "learning")):
        assert judge_run({"dim": 4.0}, {"dim": (loss, 0.01)}, weight_shrinkage=shrunk).verdict == verdict


def test_the_advice_on_a_short_run_begins_with_the_missing_steps() -> None:
    history = MetricHistory(shortfall=describe_shortfall(40, 700))
    assert history.advice("at-chance").startswith("This run has 40 of the 700 steps of its preset")
    assert "figures/views.png" in history.advice("at-chance")
    assert history.advice("collapsed") == ADVICE["collapsed"], "more steps would not help"
    assert history.advice("learning") == ""
    assert describe_shortfall(700, 700) == describe_shortfall(900, 700) == ""
