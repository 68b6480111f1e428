"""The encoder of AMDIM (Bachman et al. 2019, arXiv 1906.00910), in 2D and 3D."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from monai.networks.layers.factories import Conv
from torch import nn
from torch.nn.functional import pad

from medim.config import Size
from medim.models.layers import (
    MeanPool3d,
    Norm,
    build_conv_block,
    build_norm,
    check_channels,
    compute_level_origins,
    compute_level_strides,
    compute_maps,
    level_receptive_field,
)
from medim.types import Features, UsageError

STEM_LAYERS = {32: [(3, 1, 0)], 64: [(3, 1, 0)], 128: [(5, 2, 2), (3, 1, 0)]}  # kernel size, stride and padding
BLOCK_LAYERS = {
    32: [(1, 1, 1), (2, 4, 2), (4, 2, 2), (4, 3, 1), (4, 3, 1)],  # multiple of `width`, kernel size, stride
    64: [(2, 4, 2), (4, 4, 2), (8, 2, 2), (8, 3, 1), (8, 3, 1)],
    128: [(2, 4, 2), (4, 4, 2), (8, 2, 2), (8, 3, 1), (8, 3, 1)],
}


class AMDIMEncoder(nn.Module):
    """Residual blocks without padding: receptive fields grow slowly, and image borders do not reveal positions.

    The maps of a 32x32 image are 30, 30, 14, 7, 5 and 3 wide, of 64x64 62, 30, 14, 7, 5, 3, of 128x128 64, 62, 30, 14,
    7, 5, 3; AMDIM predicts those of 7 and 5 (levels -3 and -2). The summary f1 is the single cell of a further block,
    or the mean of its cells for a larger image, after batch norm.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        size: minimum side of an image, which selects the layers: 32, 64 or 128.
        width: channels of the first map (ndf); later maps have 2, 4 and, from size 64 on, 8 times as many.
        depth: units per block; the first unit changes the grid.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation inside the blocks; f1 has its own.
        summary_channels: length of the summary (n_rkhs), at least the channels of the last map.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        *,
        size: Literal[32, 64, 128] = 32,
        width: Size = 128,
        depth: Size = 3,
        norm: Norm = "none",
        summary_channels: Size = 1024,
    ) -> None:
        super().__init__()
        check_channels("amdim", (width,), option="width")
        check_channels("amdim", (depth,), option="depth")
        stem, blocks = STEM_LAYERS[size], BLOCK_LAYERS[size]
        self.channels = (*[width] * len(stem), *(times * width for times, _, _ in blocks))
        self.summary_channels = summary_channels
        if summary_channels < self.channels[-1]:
            raise UsageError(
                f"amdim.summary_channels: expected at least {self.channels[-1]}, the channels of the last map, "
                f"got {summary_channels}."
            )
        self._levels = [[layer] for layer in [*stem, *((kernel, stride, 0) for _, kernel, stride in blocks)]]
        self.strides = compute_level_strides(self._levels)
        self.origins = compute_level_origins(self._levels)
        self.stages = nn.ModuleList()
        for before, (kernel, stride, padding) in zip((in_channels, width), stem, strict=False):
            mode = "reflect" if padding else "zeros"
            self.stages.append(
                build_conv_block(
                    spatial_dims, before, width, kernel, stride, "none", padding=padding, padding_mode=mode
                )
            )
        for (before, after), (_, kernel, stride) in zip(pairwise(self.channels[len(stem) - 1 :]), blocks, strict=True):
            units = 1 if kernel == 1 else depth  # the first block of size 32 is one unit
            block = [_ResidualUnit(spatial_dims, before, after, kernel, stride, norm)]
            block += [_ResidualUnit(spatial_dims, after, after, 1, 1, norm) for _ in range(units - 1)]
            self.stages.append(nn.Sequential(*block))
        last_norm: Norm = "none" if norm == "in" else norm  # a single cell has no variance
        self.to_f1 = _ResidualUnit(spatial_dims, self.channels[-1], summary_channels, 3, 1, last_norm)
        self.f1_norm = nn.BatchNorm1d(summary_channels)

    def forward(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) images with sides of at least `size` voxels into `Features`."""
        maps = compute_maps(self.stages, image)
        return Features(maps, self.f1_norm(self.to_f1(maps[-1]).flatten(2).mean(dim=2)))

    def receptive_field(self, level: int) -> int:
        """Side of the receptive field of a cell of map `level`, in voxels (3, 3, 6, 8, 16, 24 for size 32)."""
        return level_receptive_field(self._levels, level)


class _ResidualUnit(nn.Module):
    """`ConvResNxN` of the public code: convolution, norm, ReLU, 1-wide convolution initialised to zero (fixup).

    The shortcut is the mean over the receptive field of the convolution; its missing channels are filled with zeros. No
    ReLU follows the sum.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: Norm
    ) -> None:
        super().__init__()
        layer = Conv[Conv.CONV, spatial_dims]
        last_layer = layer(out_channels, out_channels, 1, bias=False)
        nn.init.zeros_(last_layer.weight)
        self.branch = nn.Sequential(
            layer(in_channels, out_channels, kernel_size, stride, bias=False),
            build_norm(norm, spatial_dims, out_channels),
            nn.ReLU(inplace=True),
            last_layer,
        )
        self.shortcut = (nn.AvgPool2d if spatial_dims == 2 else MeanPool3d)(kernel_size, stride)
        self._channel_padding = [0, 0] * spatial_dims + [0, out_channels - in_channels]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, ...) to (N, out_channels, ...)."""
        output: torch.Tensor = self.branch(x) + pad(self.shortcut(x), self._channel_padding)
        return output
