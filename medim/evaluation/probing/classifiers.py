"""Probes: from features and a few labels to class probabilities or numbers, with a frozen encoder.

To add a probe, write a function with the signature of `ProbeFunction` and add a line to `PROBES`. All choices of a
probe (scaling, neighbours, penalties) must be based on its training rows only, so that they are part of the label
budget.
"""

from __future__ import annotations

import typing
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from medim.types import Array

TEMPERATURE = 0.07  # temperature of the votes of neighbours (Wu et al. 2018)
N_NEIGHBOURS = 20
N_FOLDS = 5
MIN_CLASS_SUBJECTS = 3  # minimum number of subjects per class for cross-validation
PENALTIES = (1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3)  # C times the number of features, weakest last
FIXED_PENALTY = 1e0


ProbeSettings = dict[str, float | str]  # settings by name, such as the penalty


class ProbePrediction(NamedTuple):
    """Predictions of a probe for the test images.

    Attributes:
        predictions: class probabilities (N, K), whose rows sum to one, or numbers (N,).
        settings: chosen settings, for the output file.

    Examples:
        >>> prediction = ProbePrediction(np.array([[0.2, 0.8]]), {"k": 5})
        >>> int(prediction.predictions.argmax())
        1
    """

    predictions: Array
    settings: ProbeSettings


class ProbeFunction(typing.Protocol):
    """Interface of a probe: a pure function of arrays and a seed."""

    def __call__(
        self, train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
    ) -> ProbePrediction:
        """Predict the labels of test rows from labelled training rows.

        Args:
            train_x: (M, d) features.
            train_y: (M,) class indices, each of 0 to K - 1 occurs; or numbers.
            test_x: (N, d) features.
            seed: random seed.
            groups: (M,) subject of each row; None: every row has its own subject.
        """
        ...


class Probe(NamedTuple):
    """A probe and its task.

    Attributes:
        predict: the probe.
        task: name of the task, which determines labels, predictions and metrics: `classification` or `regression`.

    Examples:
        >>> PROBES["ridge"].task
        'regression'
    """

    predict: ProbeFunction
    task: str = "classification"


def linear_probe(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Logistic regression on standardised features.

    The inverse penalty C minimises the log loss of a cross-validation on the training rows. Folds contain whole
    subjects and are stratified by class. The candidates are six values from 0.01 to 1000 divided by the number of
    features, so that the penalties for wide and narrow features are comparable. If a class has fewer than three
    subjects, C is 1 over the number of features, and `c_source` is `fixed` instead of `cross-validation`.
    """
    scaler, regression, settings = fit_linear(train_x, train_y, seed=seed, groups=groups)
    return ProbePrediction(regression.predict_proba(scaler.transform(test_x)), settings)


def fit_linear(
    x: Array, y: Array, *, seed: int, groups: Array | None = None
) -> tuple[StandardScaler, LogisticRegression, ProbeSettings]:
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
    settings = {"c": c, "c_source": "fixed" if penalty is None else "cross-validation"}
    return scaler, _build_regression(c).fit(features, y), settings


def ridge_probe(
    train_x: Array, train_y: Array, test_x: Array, *, seed: int, groups: Array | None = None
) -> ProbePrediction:
    """Predict a number by ridge regression on standardised features.

    The penalty alpha has the least mean squared error in a cross-validation on the training rows, whose folds contain
    whole subjects. The candidates are the numbers of rows and features, multiplied, over the six values of
    `linear_probe`. With fewer than three subjects, alpha is this product, and `alpha_source` is `fixed` instead of
    `cross-validation`. The predictions (N,) are in the unit of `train_y`.
    """
    scaler, regression, settings = fit_ridge(train_x, train_y, seed=seed, groups=groups)
    return ProbePrediction(regression.predict(scaler.transform(test_x.astype(np.float64))), settings)


def fit_ridge(
    x: Array, y: Array, *, seed: int, groups: Array | None = None
) -> tuple[StandardScaler, Ridge, ProbeSettings]:
    """Fit the scaler and the regression of `ridge_probe` in float64, and return them with the settings.

    scikit-learn rounds the targets to the type of the features, and float32 would round the differences of targets with
    a large mean away.

    Args:
        x: (M, d) features.
        y: (M,) numbers.
        seed: random seed of the folds.
        groups: (M,) subject of each row; None: each row is of another subject.
    """
    scaler = StandardScaler().fit(x)
    features, subjects = scaler.transform(x.astype(np.float64)), np.arange(len(x)) if groups is None else groups
    n_folds = min(N_FOLDS, len(np.unique(subjects)))
    if n_folds < MIN_CLASS_SUBJECTS:
        alpha = x.size / FIXED_PENALTY
        return scaler, Ridge(alpha).fit(features, y), {"alpha": alpha, "alpha_source": "fixed"}
    folds = list(GroupKFold(n_folds, shuffle=True, random_state=seed).split(features, y, subjects))
    alphas = [x.size / c for c in PENALTIES]
    search = RidgeCV(alphas, cv=folds, scoring="neg_mean_squared_error").fit(features, y)
    alpha = float(search.alpha_)
    return scaler, Ridge(alpha).fit(features, y), {"alpha": alpha, "alpha_source": "cross-validation"}


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


PROBES: dict[str, Probe] = {
    "linear": Probe(linear_probe),
    "knn": Probe(knn_probe),
    "ridge": Probe(ridge_probe, task="regression"),
}


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
