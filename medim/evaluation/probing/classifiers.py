"""Probe protocols: from features and a few labels to class probabilities. The encoder stays as it is.

To add one, write a function that meets `Protocol` and add a line to `PROTOCOLS`. Everything a protocol chooses it pays
for from the labels it is given: scaling, neighbours and penalties come from the training rows alone.
"""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from medim.types import Array

TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)
NEIGHBOURS = 20
FOLDS = 5
FEWEST = 3  # subjects of each class, below which nothing is cross-validated
PENALTIES = (1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3)  # C times the number of features, weakest last
FIXED = 1e0


class Answer(NamedTuple):
    """What a protocol makes of the test images.

    Attributes:
        probabilities: (N, K), rows sum to one.
        settings: what it chose, for the record.
    """

    probabilities: Array
    settings: dict[str, Any]


class Protocol(typing.Protocol):
    """What every protocol is: a pure function of arrays and a seed."""

    def __call__(
        self, train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
    ) -> Answer:
        """Classify test rows by labelled ones.

        Args:
            train_x: (M, d) features.
            train_y: (M,) class indices; each of 0 to K - 1 occurs.
            test_x: (N, d) features.
            seed: of whatever is drawn.
            groups: (M,) the subject of each row; None: each row is of another.
        """
        ...


def linear(train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None) -> Answer:
    """Logistic regression on standardised features.

    The inverse penalty C has the least log loss in cross-validation within the rows given, whole subjects on one side
    and classes in proportion, over six values from 0.01 to 1000 divided by the number of features (so that wide and
    narrow features are offered equal penalties). Where a class has fewer than three subjects, C is 1 over the number of
    features, and `c_from` says `fixed` in place of `cross-validation`.
    """
    scaler, fitted, settings = fit_linear(train_x, train_y, seed=seed, groups=groups)
    return Answer(fitted.predict_proba(scaler.transform(test_x)), settings)


def fit_linear(
    x: Array, y: Array, *, seed: int, groups: Array | None = None
) -> tuple[StandardScaler, LogisticRegression, dict[str, Any]]:
    """The scaler and the classifier of `linear`, and what was chosen.

    Args:
        x: (M, d) features.
        y: (M,) class indices, of two classes or more.
        seed: of the folds.
        groups: (M,) the subject of each row; None: each row is of another.
    """
    scaler = StandardScaler().fit(x)
    scaled, width = scaler.transform(x), x.shape[1]
    chosen = _least_loss(scaled, y, groups, seed)
    c = (FIXED if chosen is None else chosen) / width
    settings = {"c": c, "c_from": "fixed" if chosen is None else "cross-validation"}
    return scaler, _regression(c).fit(scaled, y), settings


def knn(train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None) -> Answer:
    """Weighted nearest neighbours (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    The k = min(20, M) training rows of largest cosine vote for their class with weight exp(cosine / 0.07); features are
    standardised first. Nothing is drawn or chosen, so `seed` and `groups` change nothing.
    """
    scaler, k = StandardScaler().fit(train_x), min(NEIGHBOURS, len(train_x))
    near, far = (_unit(scaler.transform(x)) for x in (train_x, test_x))
    cosine = far @ near.T  # (N, M)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(cosine, order, axis=1)  # (N, k)
    weight = np.exp((found - found[:, :1]) / TEMPERATURE)  # relative to the nearest one
    votes = np.stack([(weight * (train_y[order] == c)).sum(axis=1) for c in range(train_y.max() + 1)], axis=1)
    return Answer(votes / votes.sum(axis=1, keepdims=True), {"k": k})


PROTOCOLS: dict[str, Protocol] = {"linear": linear, "knn": knn}


def _least_loss(x: Array, y: Array, groups: Array | None, seed: int) -> float | None:
    """The entry of PENALTIES with the least cross-validated log loss, None where there are too few subjects."""
    classes = np.unique(y)
    subjects = np.arange(len(x)) if groups is None else groups
    folds = min(FOLDS, *(len(np.unique(subjects[y == c])) for c in classes))
    if folds < FEWEST:
        return None
    # Folds of single rows need no groups: with one a row, drawing them took longer than the regressions.
    folding = StratifiedKFold if groups is None else StratifiedGroupKFold
    splits = folding(folds, shuffle=True, random_state=seed).split(x, y, groups)
    whole = [(train, test) for train, test in splits if len(test) and len(np.unique(y[train])) == len(classes)]
    if not whole:  # subjects of many classes may leave a fold without one
        return None
    losses = [
        sum(
            log_loss(
                y[test], _regression(c / x.shape[1]).fit(x[train], y[train]).predict_proba(x[test]), labels=classes
            )
            for train, test in whole
        )
        for c in PENALTIES
    ]
    return PENALTIES[int(np.argmin(losses))]


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=2000)


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny))
