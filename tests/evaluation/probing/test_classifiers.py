from __future__ import annotations

import numpy as np
import pytest

from medim.evaluation.probing.classifiers import knn_probe, linear_probe
from medim.types import Array


def noise(rows: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, width))


def test_neighbours_vote_by_the_exponential_of_their_cosine() -> None:
    train, test, y = noise(30, 5), noise(4, 5, seed=1), np.arange(30) % 3
    probabilities, settings = knn_probe(train, y, test, seed=0)
    assert settings == {"k": 20}
    mean, sd = train.mean(axis=0), train.std(axis=0)
    for row, found in zip((test - mean) / sd, probabilities, strict=True):
        cosines = [float(row @ v / np.linalg.norm(row) / np.linalg.norm(v)) for v in (train - mean) / sd]
        votes = np.zeros(3)
        for place in sorted(range(30), key=lambda i: -cosines[i])[:20]:
            votes[y[place]] += np.exp(cosines[place] / 0.07)
        np.testing.assert_allclose(found, votes / votes.sum())


def test_there_are_no_more_neighbours_than_labels() -> None:
    assert knn_probe(noise(7, 3), np.arange(7) % 2, noise(2, 3), seed=0).settings == {"k": 7}


def test_with_fewer_than_three_of_a_class_the_penalty_is_fixed_and_says_so() -> None:
    y = np.array([0] * 10 + [1] * 2)
    assert linear_probe(noise(12, 4), y, noise(2, 4), seed=0).settings == {"c": 0.25, "c_source": "fixed"}
    y[2] = 1
    assert linear_probe(noise(12, 4), y, noise(2, 4), seed=0).settings["c_source"] == "cross-validation"


def test_three_images_of_one_subject_are_one_for_the_cross_validation() -> None:
    y = np.array([0] * 9 + [1] * 3)
    groups = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9])
    assert linear_probe(noise(12, 4), y, noise(2, 4), seed=0, groups=groups).settings["c_source"] == "fixed"


@pytest.mark.parametrize("by_subject", [True, False])
def test_the_penalty_is_not_chosen_on_copies_of_what_is_learnt_by_heart(by_subject: bool) -> None:
    """Four equal images a subject, with labels that mean nothing: only across subjects does that show."""
    rows, y = np.repeat(noise(12, 40), 4, axis=0), np.repeat(np.arange(12) % 2, 4)
    groups = np.repeat(np.arange(12), 4) if by_subject else None
    c = linear_probe(rows, y, noise(2, 40, seed=1), seed=0, groups=groups).settings["c"] * 40
    assert c < 1 if by_subject else c > 10


def test_the_penalty_is_weak_where_classes_lie_apart_and_strong_where_there_is_nothing_to_learn() -> None:
    y = np.arange(40) % 2
    apart = linear_probe(noise(40, 6) * 0.1 + y[:, None], y, noise(2, 6), seed=0).settings["c"]
    nothing = linear_probe(noise(40, 6), y, noise(2, 6), seed=0).settings["c"]
    assert nothing < 0.1 < 10 < apart * 6
