"""Initialise the head as a linear probe of the features before fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from medim.evaluation.probing.classifiers import fit_linear, fit_ridge
from medim.models.heads import LinearProbe, RegressionHead
from medim.models.model import Model
from medim.types import IGNORE_INDEX, Array

ROWS_PER_CLASS = 4000


def start_head_as_probe(
    model: Model, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, classes: int, seed: int
) -> None:
    """Fit a logistic regression to the inputs of the head, and initialise the head with it.

    Full fine-tuning with a random head distorts pretrained features before the head is trained; a fitted head avoids
    this (LP-FT: Kumar et al. 2022, arXiv 2202.10054).

    Args:
        model: encoder, decoder and head, on any device; normalisation layers use batch statistics, as in the training
            steps.
        batches: labelled images (N, C, ...) and targets: class indices (N,) or (N, ...), or findings (N, K).
        classes: number of classes, K.
        seed: random seed of the folds and of the selection of voxels.
    """
    rows, labels = _collect_head_inputs(model.train(), batches, np.random.default_rng(seed))
    head: Any = model.head
    if isinstance(head, RegressionHead):
        head.start_from(fit_ridge_probe(rows, labels, seed=seed))
    elif labels.ndim == 2:
        head.start_from(fit_finding_probes(rows, labels, seed=seed))
    elif len(np.unique(labels)) > 1:
        head.start_from(fit_probe(rows, labels, classes=classes, seed=seed))


def fit_probe(rows: Array, labels: Array, *, classes: int, seed: int) -> LinearProbe:
    """Fit the `linear` probe of `medim probe`, and return its weights.

    Args:
        rows: features (n, d).
        labels: class indices (n,), of at least two classes.
        classes: number of classes, K; classes without a row get the lowest bias.
        seed: random seed of the folds.
    """
    scaler, classifier, _ = fit_linear(rows, labels, seed=seed)
    coefficients, intercepts = classifier.coef_, classifier.intercept_
    if len(coefficients) == 1:  # for two classes, scikit-learn has only the logit of the second
        coefficients, intercepts = (np.concatenate([-half, half]) for half in (coefficients / 2, intercepts / 2))
    weight, bias = np.zeros((classes, rows.shape[1])), np.full(classes, intercepts.min())
    weight[classifier.classes_], bias[classifier.classes_] = coefficients, intercepts
    return LinearProbe(*(torch.from_numpy(a).float() for a in (scaler.mean_, scaler.scale_, weight, bias)))


def fit_ridge_probe(rows: Array, targets: Array, *, seed: int) -> LinearProbe:
    """Fit the `ridge` probe of `medim probe` to one target, and return its weights in float64.

    Args:
        rows: features (n, d).
        targets: (n, 1).
        seed: random seed of the folds.
    """
    scaler, regression, _ = fit_ridge(rows, targets[:, 0], seed=seed)
    weight, bias = regression.coef_.reshape(1, -1), np.atleast_1d(regression.intercept_)
    return LinearProbe(*(torch.from_numpy(a).double() for a in (scaler.mean_, scaler.scale_, weight, bias)))


def fit_finding_probes(rows: Array, labels: Array, *, seed: int) -> LinearProbe:
    """Fit a `linear` probe per finding, on the images with a known value; the logit is that of its presence.

    Args:
        rows: features (n, d).
        labels: (n, K) of 1, 0 and NaN (unknown); a finding that is present in all or in no image gets only a bias.
        seed: random seed of the folds.
    """
    common = StandardScaler().fit(rows)
    weight, bias = np.zeros((labels.shape[1], rows.shape[1])), np.zeros(labels.shape[1])
    for k, column in enumerate(labels.T):
        is_known = np.isfinite(column)
        present = column[is_known].astype(int)
        bias[k] = np.log1p(present.sum()) - np.log1p((1 - present).sum())
        if 0 < present.sum() < len(present):
            scaler, classifier, _ = fit_linear(rows[is_known], present, seed=seed)
            slope = classifier.coef_[0] / scaler.scale_
            weight[k] = slope * common.scale_
            bias[k] = classifier.intercept_[0] + slope @ (common.mean_ - scaler.mean_)
    return LinearProbe(*(torch.from_numpy(a).float() for a in (common.mean_, common.scale_, weight, bias)))


@torch.no_grad()
def _collect_head_inputs(
    model: Model, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Collect the inputs of the head (n, d) and the targets.

    Returns:
        Inputs and targets: class indices (n,) for at most `ROWS_PER_CLASS` rows per class, or findings (n, K) for all
            rows.
    """
    chunks: list[tuple[Array, Array]] = []
    head: Any = model.head
    device = next(model.parameters()).device
    for image, target in batches:
        features = model.encoder(image.to(device))
        x = head.inputs(features if model.decoder is None else model.decoder(features)).float()
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).cpu().numpy()
        if target.is_floating_point():
            chunks.append((rows, target.numpy()))
            continue
        labels = target.reshape(-1).numpy()
        if target.ndim > 1:  # masks, in which voxels may have no label
            rows, labels = rows[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
        chunks.append(_subsample(rows, labels, rng))
    rows, labels = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return (rows, labels) if labels.ndim == 2 else _subsample(rows, labels, rng)


def _subsample(rows: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw at most `ROWS_PER_CLASS` rows of each class at random."""
    class_indices = [rng.permutation(np.flatnonzero(labels == label))[:ROWS_PER_CLASS] for label in np.unique(labels)]
    indices = np.sort(np.concatenate([np.empty(0, np.intp), *class_indices]))
    return rows[indices], labels[indices]
