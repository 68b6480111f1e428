"""Metrics of the quality and collapse of features."""

from __future__ import annotations

import numpy as np

from medim.types import Array

_EPSILON = 1e-7


def rankme(features: Array) -> float:
    """Effective rank of a feature matrix (Garrido et al. 2023, eq. 1).

    exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_j sigma_j and sigma the singular values: 1 if all rows are
    multiples of one another, min(N, d) for equal singular values.

    Args:
        features: (N, d).

    Returns:
        At least 1; 0 if every feature is zero; NaN if a feature is not finite.
    """
    if not np.isfinite(features).all():
        return float("nan")
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    if sigma.sum() == 0:
        return 0.0
    p = sigma[sigma > sigma[0] * np.finfo(np.float64).eps] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def feature_std(features: Array) -> float:
    """Spread of the directions of features (Chen and He 2021, fig. 2), scaled so that 1 is isotropic and 0 collapsed.

    Rows are scaled to unit length. The standard deviation over rows, averaged over the d channels, is 1 / sqrt(d) for
    directions that are uniform on the sphere; the result is multiplied by sqrt(d).

    Args:
        features: (N, d).
    """
    unit = _normalise_rows(features)
    return float(unit.std(axis=0).mean() * np.sqrt(unit.shape[1]))


def alignment(one: Array, other: Array) -> float:
    """Mean squared distance between two views of the same images (Wang and Isola 2020, eq. 1 with exponent 2).

    Rows are scaled to unit length: 0 if both views have the same direction, 2 if they are unrelated, at most 4.

    Args:
        one: (N, d) features of a view of each image.
        other: (N, d) features of another view, in the same order.
    """
    return float(((_normalise_rows(one) - _normalise_rows(other)) ** 2).sum(axis=1).mean())


def uniformity(features: Array) -> float:
    """Uniformity of features on the sphere (Wang and Isola 2020, eq. 2 with t = 2).

    Logarithm of the mean of exp(-2 distance^2) over all pairs of two images, rows scaled to unit length: 0 if all have
    the same direction, about -4 if they are uniform in many dimensions; lower is better. NaN for fewer than two images.

    Args:
        features: (N, d), one row per image.
    """
    unit = _normalise_rows(features)
    distance = 2 - 2 * (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    return float(np.log(np.exp(-2 * distance).mean())) if len(distance) else float("nan")


def _normalise_rows(features: Array) -> Array:
    rows = features.astype(np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _EPSILON))
