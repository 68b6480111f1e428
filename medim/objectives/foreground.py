"""Foreground mask of the cells of a map."""

from __future__ import annotations

import torch

FOREGROUND_THRESHOLD = 0.1  # minimum intensity of tissue, as a share of the image's range above its minimum
SHARE_TOLERANCE = 1e-5  # of a share, so that a cell of foreground alone has a share of 1


def find_foreground_cells(
    image: torch.Tensor, grid: tuple[int, ...], share: float, *, origin: float, stride: int
) -> torch.Tensor:
    """Mark the cells with at least a given share of foreground voxels.

    Cell c covers `stride` voxels along each axis, around voxel `origin + c * stride`; outside the image, there are no
    voxels to count.

    The background (air, padding, the zeros around a stripped brain) is the minimum of an image under every
    normalisation. A voxel is foreground if one of its channels exceeds that channel's minimum by more than a tenth of
    its range, so noise in the air and its augmentation stay background. A constant image has no foreground; an image of
    pure noise counts as tissue.

    Args:
        image: (N, C, ...).
        grid: grid of the map.
        share: minimum share of foreground voxels in a cell, above 0 and at most 1.
        origin: centre of the first cell, in voxels, see `medim.models.encoders.Encoder`.
        stride: distance between the centres of cells, in voxels.

    Returns:
        (N, cells) bool.
    """
    axes = tuple(range(2, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    tissue = (image > low + FOREGROUND_THRESHOLD * (high - low)).any(dim=1, keepdim=True)
    shares = tissue.float()
    for axis, cells in enumerate(grid, start=2):
        weights = area_weights(image.shape[axis], cells, origin, stride).to(shares)
        shares = (shares.movedim(axis, -1) @ weights).movedim(-1, axis)
    return shares.flatten(1) >= share - SHARE_TOLERANCE


def area_weights(size: int, cells: int, origin: float, stride: int) -> torch.Tensor:
    """Weights (size, cells) of the mean over the voxels of each cell of an axis.

    Examples:
        >>> area_weights(4, 2, origin=0.0, stride=2).T
        tensor([[0.6667, 0.3333, 0.0000, 0.0000],
                [0.0000, 0.2500, 0.5000, 0.2500]])
    """
    voxel, cell = (torch.arange(n, dtype=torch.float64) for n in (size, cells))
    distance = (voxel[:, None] - (origin + cell * stride)).abs()
    overlap = ((stride + 1) / 2 - distance).clamp(0, 1)  # of the voxel and the cell
    return (overlap / overlap.sum(dim=0).clamp_min(1e-9)).float()
