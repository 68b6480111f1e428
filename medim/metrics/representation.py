"""Features of many images, and whether they have collapsed."""

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
    """Images of one shape that follow each other, in batches as large as memory likes.

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
    """The encoder's summaries of many images, joined by the mean and maximum of some maps.

    The encoder runs in evaluation mode, on the device its weights are on, and is left in the mode it came in.

    Args:
        encoder: image -> `Features`.
        batches: (N_i, C, ...) tensors.
        maps: levels whose mean and maximum join the summary.

    Returns:
        (N, summary_channels + 2 * the channels of these maps) float32, in the order of the batches; (0, 0) where there
        is none.
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
    r"""Effective rank of a feature matrix (Garrido et al. 2023, eq. 1).

    exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_j sigma_j and sigma the singular values: 1 where all rows are
    multiples of one another, min(N, d) where they are as spread out as they can be.

    Args:
        features: (N, d).

    Returns:
        At least 1; 0 where every feature is zero. NaN where a feature is not finite.
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

    Rows are scaled to unit length; the standard deviation over rows, averaged over the d channels, is 1 / sqrt(d) where
    the directions are uniform on the sphere, and is given here times sqrt(d).

    Args:
        features: (N, d).
    """
    unit = _normalise_rows(features)
    return float(unit.std(axis=0).mean() * np.sqrt(unit.shape[1]))


def alignment(one: Array, other: Array) -> float:
    """Mean squared distance between two views of the same images (Wang and Isola 2020, eq. 1 with exponent 2).

    Rows are scaled to unit length: 0 where both views have one direction, 2 where they are unrelated, at most 4.

    Args:
        one: (N, d) features of a view of each image.
        other: (N, d) features of another view, in the same order.
    """
    return float(((_normalise_rows(one) - _normalise_rows(other)) ** 2).sum(axis=1).mean())


def uniformity(features: Array) -> float:
    """How evenly features cover the sphere (Wang and Isola 2020, eq. 2 with t = 2).

    The log of the mean of exp(-2 distance^2) over all pairs of two images, rows scaled to unit length: 0 where all have
    one direction, about -4 where they are uniform in many dimensions; the lower the better. NaN with fewer than two.

    Args:
        features: (N, d), a row an image.
    """
    unit = _normalise_rows(features)
    distance = 2 - 2 * (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    return float(np.log(np.exp(-2 * distance).mean())) if len(distance) else float("nan")


def _normalise_rows(features: Array) -> Array:
    rows = features.astype(np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _EPSILON))
