"""Properties that every entry of PROBES must have: predictions of test rows, from labelled rows alone."""

from __future__ import annotations

import numpy as np
import pytest

from medim.evaluation.probing.classifiers import PROBES
from medim.tasks import TASKS
from medim.types import Array

every_probe = pytest.mark.parametrize("name", PROBES)
every_classifier = pytest.mark.parametrize("name", [n for n, probe in PROBES.items() if probe.task == "classification"])
every_regression = pytest.mark.parametrize("name", [n for n, probe in PROBES.items() if probe.task == "regression"])
CLASSES = 3


def clouds(per_class: int, seed: int) -> tuple[Array, Array]:
    """Rows (3 * per_class, 6) around two corners a class, and their classes; as numbers, 0 to 2."""
    rng = np.random.default_rng(seed)
    y = np.tile(np.arange(CLASSES), per_class)
    return 3 * np.tile(np.eye(CLASSES), 2)[y] + rng.normal(scale=0.3, size=(len(y), 6)), y


@every_classifier
@pytest.mark.parametrize("per_class", [1, 8])
def test_separate_classes_are_recognised_from_one_label_each_on(name: str, per_class: int) -> None:
    (train_x, train_y), (test_x, test_y) = clouds(per_class, 0), clouds(10, 1)
    probabilities, settings = PROBES[name].predict(train_x, train_y, test_x, seed=0)
    assert probabilities.shape == (30, CLASSES)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == test_y).all()
    assert settings


@every_regression
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_linear_effect_is_predicted_in_the_unit_of_the_labels(name: str, offset: float) -> None:
    rng = np.random.default_rng(0)
    train_x, test_x = rng.normal(size=(60, 6)), rng.normal(size=(30, 6))
    slopes = 10 * np.arange(6)
    predictions, settings = PROBES[name].predict(train_x, train_x @ slopes + offset, test_x, seed=0)
    assert predictions.shape == (30,)
    np.testing.assert_allclose(predictions, test_x @ slopes + offset, atol=10)
    assert settings


@every_probe
def test_a_probe_is_of_a_task_with_one_label_per_image(name: str) -> None:
    assert not TASKS[PROBES[name].task].dense


@every_probe
def test_the_unit_of_a_feature_changes_nothing(name: str) -> None:
    (train_x, train_y), (test_x, _) = clouds(4, 0), clouds(5, 1)
    scale, shift = 10.0 ** np.arange(-3, 3), np.arange(6.0)
    plain = PROBES[name].predict(train_x, train_y, test_x, seed=0).predictions
    other = PROBES[name].predict(train_x * scale + shift, train_y, test_x * scale + shift, seed=0).predictions
    np.testing.assert_allclose(plain, other, atol=1e-3)


@every_probe
def test_a_test_row_does_not_see_the_others(name: str) -> None:
    (train_x, train_y), (test_x, _) = clouds(4, 0), clouds(5, 1)
    together = PROBES[name].predict(train_x, train_y, test_x, seed=0).predictions
    alone = PROBES[name].predict(train_x, train_y, test_x[7:8], seed=0).predictions
    np.testing.assert_allclose(together[7:8], alone, rtol=1e-6)


@every_probe
def test_the_same_seed_gives_the_same_answer(name: str) -> None:
    (train_x, train_y), (test_x, _) = clouds(6, 0), clouds(5, 1)
    groups = np.arange(18) // 2
    first, again = (PROBES[name].predict(train_x, train_y, test_x, seed=3, groups=groups) for _ in range(2))
    assert first.settings == again.settings
    np.testing.assert_array_equal(first.predictions, again.predictions)


@every_regression
def test_a_large_offset_of_the_labels_changes_no_difference_of_predictions(name: str) -> None:
    rng = np.random.default_rng(0)
    train_x, test_x = (rng.normal(size=(count, 6)).astype(np.float32) for count in (60, 30))
    labels = 10 * train_x.astype(np.float64).sum(axis=1)
    plain, shifted = (
        PROBES[name].predict(train_x, labels + offset, test_x, seed=0).predictions - offset for offset in (0.0, 1e9)
    )
    np.testing.assert_allclose(shifted, plain, atol=1e-3)
