"""The contracting half of a U-Net, built from MONAI's DynUNet blocks; `UNetDecoder` uses its maps."""

from __future__ import annotations

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from torch import nn

from medim.config import Size
from medim.models.layers import (
    Norm,
    check_channels,
    compute_level_origins,
    compute_level_strides,
    compute_maps,
    level_receptive_field,
    norm_spec,
    pool_map,
)
from medim.types import Features


class UNetEncoder(nn.Module):
    """Two 3-wide convolutions per level, the first of each deeper level with stride 2.

    Block: Isensee et al. 2021 (nnU-Net), as in `monai.networks.blocks.dynunet_block`. The summary is a linear layer on
    the mean and maximum of the coarsest map, so every input size that is divisible by the strides is accepted.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        channels: channels of each level, fine to coarse; the strides are 1, 2, 4, ...
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.
        summary_channels: length of the summary.

    Examples:
        >>> encoder = UNetEncoder(1, 2, channels=(4, 8), summary_channels=16)
        >>> features = encoder(torch.zeros(2, 1, 16, 16))
        >>> [tuple(map_.shape) for map_ in features.maps], tuple(features.summary.shape)
        ([(2, 4, 16, 16), (2, 8, 8, 8)], (2, 16))
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        *,
        channels: tuple[Size, ...] = (16, 32, 64, 128),
        norm: Norm = "in",
        summary_channels: Size = 64,
    ) -> None:
        super().__init__()
        check_channels("unet", channels)
        self.channels = channels
        self._levels = [[(3, 2 if level else 1, 1), (3, 1, 1)] for level in range(len(channels))]
        self.strides = compute_level_strides(self._levels)
        self.origins = compute_level_origins(self._levels)
        self.summary_channels = summary_channels
        widths = (in_channels, *channels)
        self.levels = nn.ModuleList(
            UnetBasicBlock(spatial_dims, widths[i], widths[i + 1], 3, 1 if i == 0 else 2, norm_spec(norm))
            for i in range(len(channels))
        )
        self.to_summary = nn.Linear(2 * channels[-1], summary_channels)

    def forward(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) images with sides divisible by the last stride into `Features`."""
        maps = compute_maps(self.levels, image)
        return Features(maps, self.to_summary(pool_map(maps[-1])))

    def receptive_field(self, level: int) -> int:
        """Side of the receptive field of a cell of map `level`, in voxels (5, 11, 23, 47 for four levels)."""
        return level_receptive_field(self._levels, level)
