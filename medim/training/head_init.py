"""Start the head as a linear probe of the features, before anything else learns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from medim.evaluation.protocols import fit_linear
from medim.models.heads import LinearProbe
from medim.models.model import Model
from medim.types import Array

ROWS_A_CLASS = 4000


def start_head_as_probe(
    model: Model, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, classes: int, seed: int
) -> None:
    """Fit a logistic regression to what the head sees, and start the head from it.

    Full fine-tuning from a random head distorts pretrained features before the head has learnt to use them; a head
    that is right from the first step does not (LP-FT: Kumar et al. 2022, arXiv 2202.10054).

    Args:
        model: encoder, decoder and head; norms use the statistics of the batches, as in the steps that follow.
        batches: labelled images (N, C, ...) and targets (N,) or (N, ...).
        classes: number of classes, K.
        seed: of the folds, and of the draw of voxels.
    """
    rows, labels = _rows(model.train(), batches, np.random.default_rng(seed))
    if len(np.unique(labels)) < 2:
        return
    head: Any = model.head
    head.start_from(fit_probe(rows, labels, classes=classes, seed=seed))


def fit_probe(rows: Array, labels: Array, *, classes: int, seed: int) -> LinearProbe:
    """The `linear` probe of `medim probe`, as weights.

    Args:
        rows: features (n, d).
        labels: class indices (n,), of at least two classes.
        classes: number of classes, K; those without a row get the lowest bias.
        seed: of the folds.
    """
    scaler, found, _ = fit_linear(rows, labels, seed=seed)
    coefficients, intercepts = found.coef_, found.intercept_
    if len(coefficients) == 1:  # of two classes scikit-learn keeps the second one's logit alone
        coefficients, intercepts = (np.concatenate([-half, half]) for half in (coefficients / 2, intercepts / 2))
    weight, bias = np.zeros((classes, rows.shape[1])), np.full(classes, intercepts.min())
    weight[found.classes_], bias[found.classes_] = coefficients, intercepts
    return LinearProbe(*(torch.from_numpy(a).float() for a in (scaler.mean_, scaler.scale_, weight, bias)))


@torch.no_grad()
def _rows(
    model: Model, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], rng: np.random.Generator
) -> tuple[Array, Array]:
    """What the head sees (n, d) and its targets (n,), at most `ROWS_A_CLASS` a class."""
    found: list[tuple[Array, Array]] = []
    head: Any = model.head
    for image, target in batches:
        features = model.encoder(image)
        x = head.inputs(features if model.decoder is None else model.decoder(features)).float()
        found.append(_few(x.movedim(1, -1).reshape(-1, x.shape[1]).numpy(), target.reshape(-1).numpy(), rng))
    rows, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _few(rows, labels, rng)


def _few(rows: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """At most `ROWS_A_CLASS` rows of each class, drawn at random."""
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:ROWS_A_CLASS] for label in np.unique(labels)]
    keep = np.sort(np.concatenate(drawn))
    return rows[keep], labels[keep]
