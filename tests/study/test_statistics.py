from __future__ import annotations

import numpy as np
import pytest

from medim.evaluation.paired import mean_of, paired_difference
from medim.types import Array

SUBJECTS = [f"s{n // 2}" for n in range(40)]


def cells(values: Array) -> list[list[object]]:
    return [[mean_of(case) for case in row] for row in values]


def test_the_value_is_the_mean_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.8, 0.1, (3, 5, 40)), rng.normal(0.7, 0.1, (3, 5, 40))
    found = paired_difference(cells(ours), cells(theirs), SUBJECTS)  # type: ignore[arg-type]
    assert found["value"] == pytest.approx((ours - theirs).mean())
    assert found["n"] == 15
    assert found["ci_low"] < found["value"] < found["ci_high"]


def test_what_both_arms_share_cancels() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0.5, 0.3, 40) + rng.normal(0, 0.2, (3, 3, 1))
    found = paired_difference(cells(hard + 0.01), cells(hard), SUBJECTS)  # type: ignore[arg-type]
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_spread_over_seeds_subsets_and_subjects_widens_the_interval(axis: int) -> None:
    shape = [1, 1, 1]
    shape[axis] = 40 if axis == 2 else 6
    draw = np.random.default_rng(2).normal(0.0, 1.0, shape)
    ours = np.broadcast_to(draw, (6, 6, 40))
    found = paired_difference(cells(ours), cells(np.zeros((6, 6, 40))), SUBJECTS, resamples=4000)  # type: ignore[arg-type]
    if axis == 2:
        clusters = draw.reshape(-1, 2).mean(axis=1)
        error = clusters.std() / np.sqrt(len(clusters))
    else:
        error = draw.std() / np.sqrt(6)
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_arms_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference(cells(np.zeros((2, 2, 40))), cells(np.zeros((2, 3, 40))), SUBJECTS)  # type: ignore[arg-type]
