"""Probe classifiers: from features and a few labels to class probabilities, with a frozen encoder.

To add a classifier, write a function with the signature of `ProbeClassifier` and add a line to `PROBES`. All choices of
a classifier (scaling, neighbours, penalties) must be based on its training rows only, so that they are part of the
label budget.
"""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from medim.types import Array

TEMPERATURE = 0.07  # temperature of the votes of neighbours (Wu et al. 2018)
N_NEIGHBOURS = 20
N_FOLDS = 5
MIN_CLASS_SUBJECTS = 3  # minimum number of subjects per class for cross-validation
PENALTIES = (1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3)  # C times the number of features, weakest last
FIXED_PENALTY = 1e0


class ProbePrediction(NamedTuple):
    """Predictions of a probe classifier for the test images.

    Attributes:
        probabilities: (N, K), rows sum to one.
        settings: chosen settings, for the output file.

    Examples:
        >>> prediction = ProbePrediction(np.array([[0.2, 0.8]]), {"k": 5})
        >>> int(prediction.probabilities.argmax())
        1
    """

    probabilities: Array
    settings: dict[str, Any]


class ProbeClassifier(typing.Protocol):
    """Interface of a probe classifier: a pure function of arrays and a seed."""

    def __call__(
        self, train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
    ) -> ProbePrediction:
        """Classify test rows from labelled training rows.

        Args:
            train_x: (M, d) features.
            train_y: (M,) class indices; each of 0 to K - 1 occurs.
            test_x: (N, d) features.
            seed: random seed.
            groups: (M,) subject of each row; None: every row has its own subject.
        """
        ...


def linear_probe(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Logistic regression on standardised features.

    The inverse penalty C minimises the log loss of a cross-validation on the training rows. Folds contain whole
    subjects and are stratified by class. The candidates are six values from 0.01 to 1000 divided by the number of
    features, so that the penalties for wide and narrow features are comparable. If a class has fewer than three
    subjects, C is 1 over the number of features, and `c_from` is `fixed` instead of `cross-validation`.
    """
    scaler, regression, settings = fit_linear(train_x, train_y, seed=seed, groups=groups)
    return ProbePrediction(regression.predict_proba(scaler.transform(test_x)), settings)


def fit_linear(
    x: Array, y: Array, *, seed: int, groups: Array | None = None
) -> tuple[StandardScaler, LogisticRegression, dict[str, Any]]:
    """Fit the scaler and the classifier of `linear_probe`, and return them with the chosen settings.

    Args:
        x: (M, d) features.
        y: (M,) class indices, of two or more classes.
        seed: random seed of the folds.
        groups: (M,) subject of each row; None: every row has its own subject.
    """
    scaler = StandardScaler().fit(x)
    features, n_features = scaler.transform(x), x.shape[1]
    penalty = _choose_penalty(features, y, groups, seed)
    c = (FIXED_PENALTY if penalty is None else penalty) / n_features
    settings = {"c": c, "c_from": "fixed" if penalty is None else "cross-validation"}
    return scaler, _build_regression(c).fit(features, y), settings


def ridge_probe(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Predict a number by ridge regression on standardised features.

    The penalty is selected by cross-validation within the training rows, as in `linear_probe`, by the least mean
    squared error.

    Returns:
        Predictions (N, 1) in the unit of `train_y`.
    """
    scaler, regression, settings = fit_ridge(train_x, train_y, seed=seed, groups=groups)
    return ProbePrediction(regression.predict(scaler.transform(test_x)).reshape(-1, 1), settings)


def fit_ridge(
    x: Array, y: Array, *, seed: int, groups: Array | None = None
) -> tuple[StandardScaler, Ridge, dict[str, Any]]:
    """Fit the scaler and the regression of `ridge_probe`, and return them with the settings.

    Args:
        x: (M, d) features.
        y: (M,) numbers.
        seed: random seed of the folds.
        groups: (M,) subject of each row; None: each row is of another subject.
    """
    scaler = StandardScaler().fit(x)
    features, subjects = scaler.transform(x), np.arange(len(x)) if groups is None else groups
    names, numbers = np.unique(subjects, return_inverse=True)
    n_folds = min(N_FOLDS, len(names))
    alphas = [len(x) * x.shape[1] / c for c in PENALTIES]
    alpha, source = len(x) * x.shape[1] / FIXED_PENALTY, "fixed"
    if n_folds >= MIN_CLASS_SUBJECTS:
        folds = (np.random.default_rng(seed).permutation(len(names)) % n_folds)[numbers]
        splits = [(folds != k, folds == k) for k in range(n_folds)]
        errors = [
            sum(((Ridge(a).fit(features[i], y[i]).predict(features[j]) - y[j]) ** 2).sum() for i, j in splits)
            for a in alphas
        ]
        alpha, source = alphas[int(np.argmin(errors))], "cross-validation"
    return scaler, Ridge(alpha).fit(features, y), {"alpha": alpha, "alpha_from": source}


def knn_probe(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Weighted nearest neighbours (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    The k = min(20, M) training rows with the largest cosine vote for their class with weight exp(cosine / 0.07).
    Features are standardised first. The method is deterministic, so `seed` and `groups` have no effect.
    """
    scaler, k = StandardScaler().fit(train_x), min(N_NEIGHBOURS, len(train_x))
    train_unit, test_unit = (_scale_to_unit(scaler.transform(x)) for x in (train_x, test_x))
    cosine = test_unit @ train_unit.T  # (N, M)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    top_cosine = np.take_along_axis(cosine, order, axis=1)  # (N, k)
    weight = np.exp((top_cosine - top_cosine[:, :1]) / TEMPERATURE)  # relative to the nearest one
    votes = np.stack([(weight * (train_y[order] == c)).sum(axis=1) for c in range(train_y.max() + 1)], axis=1)
    return ProbePrediction(votes / votes.sum(axis=1, keepdims=True), {"k": k})


PROBES: dict[str, ProbeClassifier] = {"linear": linear_probe, "knn": knn_probe}


def _choose_penalty(x: Array, y: Array, groups: Array | None, seed: int) -> float | None:
    """Select the entry of PENALTIES with the lowest cross-validated log loss; None if there are too few subjects."""
    classes = np.unique(y)
    subjects = np.arange(len(x)) if groups is None else groups
    n_folds = min(N_FOLDS, *(len(np.unique(subjects[y == c])) for c in classes))
    if n_folds < MIN_CLASS_SUBJECTS:
        return None
    # Without groups, use ungrouped folds: drawing folds with one group per row took longer than the regressions.
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    splits = splitter(n_folds, shuffle=True, random_state=seed).split(x, y, groups)
    usable_splits = [(train, test) for train, test in splits if len(test) and len(np.unique(y[train])) == len(classes)]
    if not usable_splits:  # with subjects of several classes, a fold may lack a class
        return None
    losses = [
        sum(
            log_loss(
                y[test],
                _build_regression(c / x.shape[1]).fit(x[train], y[train]).predict_proba(x[test]),
                labels=classes,
            )
            for train, test in usable_splits
        )
        for c in PENALTIES
    ]
    return PENALTIES[int(np.argmin(losses))]


def _build_regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=2000)


def _scale_to_unit(rows: Array) -> Array:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny))
