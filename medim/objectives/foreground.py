"""Foreground mask of the cells of a map."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

FOREGROUND_THRESHOLD = 0.1  # minimum intensity of tissue, as a share of the image's range above its minimum


def find_foreground_cells(image: torch.Tensor, grid: tuple[int, ...], share: float) -> torch.Tensor:
    """Mark the cells with at least a given share of foreground voxels.

    The background (air, padding, the zeros around a stripped brain) is the minimum of an image under every
    normalisation. A voxel is foreground if one of its channels exceeds that channel's minimum by more than a tenth of
    its range, so noise in the air and its augmentation stay background. A constant image has no foreground; an image of
    pure noise counts as tissue.

    Args:
        image: (N, C, ...).
        grid: grid of the map, over the whole image.
        share: minimum share of foreground voxels in a cell, above 0 and at most 1.

    Returns:
        (N, cells) bool.
    """
    axes = tuple(range(2, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    tissue = (image > low + FOREGROUND_THRESHOLD * (high - low)).any(dim=1, keepdim=True)
    return interpolate(tissue.float(), size=grid, mode="area").flatten(1) >= share
