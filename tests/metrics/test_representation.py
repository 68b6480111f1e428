from __future__ import annotations

import numpy as np
import pytest

from medim.metrics.representation import alignment, feature_std, rankme, uniformity


def test_rankme_of_orthogonal_features_is_their_number_and_of_one_direction_is_one() -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 16)))[0]
    assert rankme(3 * orthogonal) == pytest.approx(16)
    assert rankme(np.outer(np.arange(1, 20), np.ones(16))) == pytest.approx(1)
    assert rankme(np.zeros((4, 3))) == 0


def test_rankme_of_two_singular_values_is_the_closed_form() -> None:
    p = np.array([0.75, 0.25])
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_rankme_of_features_that_are_not_finite_is_not_a_number() -> None:
    assert np.isnan(rankme(np.array([[1.0, np.inf], [0.0, 1.0]])))


def test_feature_std_is_one_for_isotropic_and_zero_for_equal_directions() -> None:
    isotropic = np.random.default_rng(0).normal(size=(4000, 32)) * 7
    assert feature_std(isotropic) == pytest.approx(1, abs=0.02)
    assert feature_std(np.outer(np.arange(1, 20), np.ones(32))) == pytest.approx(0, abs=1e-7)
    assert feature_std(np.zeros((5, 4))) == 0


def test_feature_std_of_the_axes_both_ways_is_exactly_one() -> None:
    assert feature_std(np.concatenate([np.eye(4), -np.eye(4)])) == pytest.approx(1)


def test_alignment_is_the_squared_distance_of_directions() -> None:
    one = np.array([[3.0, 0.0], [0.0, 2.0]])
    assert alignment(one, 5 * one) == pytest.approx(0)
    assert alignment(one, one[::-1]) == pytest.approx(2)
    assert alignment(one, -one) == pytest.approx(4)


def test_uniformity_is_zero_for_one_direction_and_falls_as_directions_spread() -> None:
    assert uniformity(np.outer([1.0, 2.0, 3.0], [1.0, 1.0])) == pytest.approx(0)
    assert uniformity(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(-4)  # squared distance 2, t = 2
    spread = np.random.default_rng(0).normal(size=(400, 256))
    assert uniformity(spread) == pytest.approx(-4, abs=0.1)
    assert np.isnan(uniformity(spread[:1]))
