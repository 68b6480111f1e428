"""Features of many images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from medim.models.layers import pool_features
from medim.types import Array, UserError

BATCH_IMAGES, BATCH_VOXELS = 256, 1 << 22


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


def check_finite_features(features: Array, name: str) -> Array:
    """Return features (N, d) if all are finite.

    Args:
        features: result of `extract_features`.
        name: name of the encoder, for the message.

    Raises:
        UserError: a feature is NaN or infinite.
    """
    count = int((~np.isfinite(features).all(axis=1)).sum())
    if count:
        raise UserError(
            f"{name}: the features of {count} of {len(features)} images are NaN or infinite. Use an encoder that has "
            "not diverged, and images without extreme values."
        )
    return features


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
