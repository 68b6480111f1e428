"""Encoder of overlapping crops, one cell per crop: the local features of CPC, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from medim.config import Section, Size, SizeOrZero, build_from_section
from medim.models.layers import SummaryNetwork, compute_level_origins, compute_level_strides, level_receptive_field
from medim.types import Features, UsageError


class PatchEncoder(nn.Module):
    """Cut an image into overlapping cubes, encode each separately to one vector, and arrange the vectors on their grid.

    van den Oord et al. 2018 (arXiv 1807.03748); the "folded" networks of the Deep InfoMax paper's comparison with CPC:
    64x64 in crops of 16, or 32x32 in crops of 8, give a grid of 7x7. A cell depends on its crop only, provided that the
    encoder of the crops has no batch norm, which mixes crops and images.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        encoders: table of encoders by name, with that of the crops.
        patch: side of a crop, in voxels.
        stride: distance between neighbouring crops, in voxels; 0 is half of `patch`.
        encoder: section of `encoders` for a crop; its summary becomes the cell.
        summary_channels: length of the summary, a linear layer on the mean and maximum of the cells.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        encoders: Mapping[str, Callable[..., nn.Module]],
        *,
        patch: Size = 16,
        stride: SizeOrZero = 0,
        encoder: Section = {"name": "convnet", "norm": "none", "hidden": 0, "summary_channels": 256},  # noqa: B006
        summary_channels: Size = 64,
    ) -> None:
        super().__init__()
        self._patch, self._stride = patch, stride or max(patch // 2, 1)
        if patch < 1 or not 0 < self._stride <= patch:
            raise UsageError(f"patches: expected crops and a stride of 1 to {patch} voxels, got {patch} and {stride}.")
        crop: Any = build_from_section(
            encoders,
            encoder,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            input_shape=(patch,) * spatial_dims,
            encoders=encoders,
        )
        self.crop = crop
        self.channels = (crop.summary_channels,)
        self._levels = [[(patch, self._stride, 0)]]
        self.strides = compute_level_strides(self._levels)
        self.origins = compute_level_origins(self._levels)
        self.summary_channels = summary_channels
        self.to_summary = SummaryNetwork(
            2 * crop.summary_channels, pooling="mean_max", hidden=(), out_channels=summary_channels
        )

    def forward(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) images with sides of at least `patch` voxels into `Features`."""
        crops = unfold_patches(image, self._patch, self._stride)  # (N, *grid, in_channels, *patch)
        grid = crops.shape[1 : image.ndim - 1]
        cells = self.crop(crops.flatten(0, image.ndim - 2)).summary
        map_ = cells.unflatten(0, (image.shape[0], *grid)).movedim(-1, 1)
        return Features((map_,), self.to_summary(map_))

    def receptive_field(self, level: int) -> int:
        """Side of a crop."""
        return level_receptive_field(self._levels, level)


def unfold_patches(image: torch.Tensor, patch: int, stride: int) -> torch.Tensor:
    """Cut (N, C, ...) into overlapping cubes: (N, *grid, C, *patch); a remainder at the far borders is dropped."""
    dims = image.ndim - 2
    for axis in range(2, 2 + dims):
        image = image.unfold(axis, patch, stride)
    return image.movedim(1, 1 + dims)
