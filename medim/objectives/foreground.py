"""Which cells of a map look at the body, and which at air alone."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

FOREGROUND_THRESHOLD = 0.1  # of an image's range over its minimum, where tissue begins


def find_foreground_cells(image: torch.Tensor, grid: tuple[int, ...], share: float) -> torch.Tensor:
    """Cells of which at least a share lies in the foreground.

    Air, padding and the zeros around a stripped brain are an image's minimum, whatever it is normalised to. A voxel is
    foreground where some channel lies further above its own minimum than a tenth of its range, so that neither noise in
    the air nor its augmentation counts. An image that is constant has no foreground; noise alone passes for tissue.

    Args:
        image: (N, C, ...).
        grid: of the map, over the whole image.
        share: of a cell's voxels, above 0 and at most 1.

    Returns:
        (N, cells) bool.
    """
    axes = tuple(range(2, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    tissue = (image > low + FOREGROUND_THRESHOLD * (high - low)).any(dim=1, keepdim=True)
    return interpolate(tissue.float(), size=grid, mode="area").flatten(1) >= share
