"""What every entry of PROTOCOLS promises: probabilities of test rows, from labelled rows alone."""

from __future__ import annotations

import numpy as np
import pytest

from medim.evaluation.probing.classifiers import PROBES
from medim.types import Array

every_protocol = pytest.mark.parametrize("name", PROBES)
CLASSES = 3


def clouds(per_class: int, seed: int) -> tuple[Array, Array]:
    """Rows (3 * per_class, 6) around two corners a class, and their classes."""
    rng = np.random.default_rng(seed)
    y = np.tile(np.arange(CLASSES), per_class)
    return 3 * np.tile(np.eye(CLASSES), 2)[y] + rng.normal(scale=0.3, size=(len(y), 6)), y


@every_protocol
@pytest.mark.parametrize("per_class", [1, 8])
def test_classes_that_lie_apart_are_told_apart_from_one_label_each_on(name: str, per_class: int) -> None:
    (train_x, train_y), (test_x, test_y) = clouds(per_class, 0), clouds(10, 1)
    probabilities, settings = PROBES[name](train_x, train_y, test_x, seed=0)
    assert probabilities.shape == (30, CLASSES)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == test_y).all()
    assert settings


@every_protocol
def test_the_unit_of_a_feature_changes_nothing(name: str) -> None:
    (train_x, train_y), (test_x, _) = clouds(4, 0), clouds(5, 1)
    scale, shift = 10.0 ** np.arange(-3, 3), np.arange(6.0)
    plain = PROBES[name](train_x, train_y, test_x, seed=0).probabilities
    other = PROBES[name](train_x * scale + shift, train_y, test_x * scale + shift, seed=0).probabilities
    np.testing.assert_allclose(plain, other, atol=1e-3)


@every_protocol
def test_a_test_row_does_not_see_the_others(name: str) -> None:
    (train_x, train_y), (test_x, _) = clouds(4, 0), clouds(5, 1)
    together = PROBES[name](train_x, train_y, test_x, seed=0).probabilities
    alone = PROBES[name](train_x, train_y, test_x[7:8], seed=0).probabilities
    np.testing.assert_allclose(together[7:8], alone, rtol=1e-6)


@every_protocol
def test_the_same_seed_gives_the_same_answer(name: str) -> None:
    (train_x, train_y), (test_x, _) = clouds(6, 0), clouds(5, 1)
    groups = np.arange(18) // 2
    first, again = (PROBES[name](train_x, train_y, test_x, seed=3, groups=groups) for _ in range(2))
    assert first.settings == again.settings
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
