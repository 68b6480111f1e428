"""Features of many images, and metrics of their quality and collapse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from medim.models.layers import pool_features
from medim.types import Array

BATCH_IMAGES, BATCH_VOXELS = 256, 1 << 22
_EPSILON = 1e-7


def batch_images(images: Iterable[Array]) -> Iterator[torch.Tensor]:
    """Group consecutive images of equal shape into batches of limited size.

    Args:
        images: (C, ...) each, of any shapes.

    Yields:
        (N_i, C, ...) float32, in the order of the images.
    """
    batch: list[Array] = []
    for image in images:
        if batch and (image.shape != batch[0].shape or len(batch) >= min(BATCH_IMAGES, BATCH_VOXELS // image.size)):
            yield torch.from_numpy(np.stack(batch).astype(np.float32, copy=False))
            batch = []
        batch.append(image)
    if batch:
        yield torch.from_numpy(np.stack(batch).astype(np.float32, copy=False))


@torch.inference_mode()
def extract_features(encoder: nn.Module, batches: Iterable[torch.Tensor], *, maps: Sequence[int] = ()) -> Array:
    """Compute the summaries of many images, concatenated with the mean and maximum of some maps.

    The encoder runs in evaluation mode, on the device of its weights; its mode is restored afterwards.

    Args:
        encoder: image -> `Features`.
        batches: (N_i, C, ...) tensors.
        maps: indices of the maps to append as mean and maximum.

    Returns:
        (N, summary_channels + 2 * the channels of these maps) float32, in the order of the batches; (0, 0) without
        images.
    """
    weight = next(encoder.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    was_training = encoder.training
    encoder.eval()
    try:
        rows = [pool_features(encoder(batch.to(device)), maps).float().cpu().numpy() for batch in batches]
    finally:
        encoder.train(was_training)
    return np.concatenate(rows) if rows else np.zeros((0, 0), dtype=np.float32)


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
