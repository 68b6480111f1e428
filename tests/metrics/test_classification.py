"""Classification metrics against scikit-learn and brute force, with weights as repetitions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from medim.metrics import build_statistics, compute_metrics
from medim.types import Array


def random_scores(cases: int, classes: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, cases - classes)])
    logits = rng.normal(size=(cases, classes)).round(1)  # rounded: ties occur
    logits[np.arange(cases), labels] += 0.8
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def brute_force_ece(probabilities: Array, labels: Array) -> float:
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


def compute_oracles(probabilities: Array, labels: Array) -> dict[str, float]:
    """The metrics by scikit-learn, and ECE by brute force, over the classes that occur."""
    predicted, present = probabilities.argmax(axis=1), np.unique(labels)
    positive = [1] if probabilities.shape[1] == 2 else present
    sides = [(labels == k, probabilities[:, k]) for k in positive]
    return {
        "auroc": float(np.mean([roc_auc_score(*side) for side in sides])),
        "average_precision": float(np.mean([average_precision_score(*side) for side in sides])),
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, labels=np.union1d(labels, predicted), average="macro"),
        "ece": brute_force_ece(probabilities, labels),
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    probabilities, labels = random_scores(80, classes, seed=1)
    metrics = compute_metrics("classification", probabilities, labels)
    assert metrics == pytest.approx(compute_oracles(probabilities, labels), abs=1e-12)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("classes", [2, 4])
def test_weights_count_a_case_as_often_as_repeating_it(classes: int) -> None:
    probabilities, labels = random_scores(60, classes, seed=2)
    weights = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=20)
    statistics = build_statistics("classification", probabilities, labels)
    values = {name: statistic(weights.astype(float)) for name, statistic in statistics.items()}
    for number, row in enumerate(weights):
        repeated = np.repeat(np.arange(60), row)
        expected = compute_oracles(probabilities[repeated], labels[repeated])
        assert {name: value[number] for name, value in values.items()} == pytest.approx(expected, abs=1e-12)


def test_no_case_has_no_value() -> None:
    assert set(compute_metrics("classification", np.zeros((0, 2)), np.zeros(0, int)).values()) == {None}


@pytest.mark.parametrize("name", ["auroc", "average_precision"])
@pytest.mark.parametrize("probabilities", [np.array([[0.9, 0.1], [0.2, 0.8]]), np.eye(3)[:2]])
def test_a_ranking_is_undefined_where_one_class_occurs(name: str, probabilities: Array) -> None:
    assert compute_metrics("classification", probabilities, np.array([1, 1]))[name] is None
    statistics = build_statistics("classification", probabilities, np.array([1, 1]))
    assert np.isnan(statistics[name](np.ones((3, 2)))).all()
