"""The AlexNet-like network of the Deep InfoMax paper for 64x64 images, in 2D and 3D."""

from __future__ import annotations

from itertools import pairwise

import torch
from monai.networks.layers.factories import Pool
from torch import nn

from medim.config import Size, SizeOrZero
from medim.models.layers import (
    Norm,
    Pooling,
    SummaryNetwork,
    build_conv_block,
    check_channels,
    compute_level_origins,
    compute_level_strides,
    compute_maps,
    count_flat_features,
    level_receptive_field,
)
from medim.types import Features

POOL_AFTER = (True, True, False, False, True)


class AlexNet(nn.Module):
    """Five 3-wide convolutions, the first two and the last with an overlapping max-pool, then two wide linear layers.

    `alex64x64` of the Deep InfoMax authors' code (configs/convnets.py), used for STL-10 and Tiny ImageNet. Its local
    map is level 2, 15x15 for a 64x64 image; two linear layers of 4096 units are followed by a summary of 64. In 3D it
    resembles the AlexNet of the Alzheimer studies of Fedorov et al. (arXiv 1904.10931), with different sizes.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the training views; `summary="flatten"` works at this shape only.
        channels: output channels of the five convolutions.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.
        summary: input of the summary: `flatten` (the flattened last map, as in the paper) or `mean_max` (its mean and
            maximum, for any input size).
        hidden: width of the two layers between map and summary; 0 omits them.
        summary_channels: length of the summary; 0 omits the last linear layer.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        input_shape: tuple[int, ...],
        *,
        channels: tuple[Size, Size, Size, Size, Size] = (96, 192, 384, 384, 192),
        norm: Norm = "bn",
        summary: Pooling = "flatten",
        hidden: SizeOrZero = 4096,
        summary_channels: SizeOrZero = 64,
    ) -> None:
        super().__init__()
        check_channels("alexnet", channels)
        self.channels = channels
        self._levels = [[(3, 1, 1), (3, 2, 0)] if has_pool else [(3, 1, 1)] for has_pool in POOL_AFTER]
        self.strides = compute_level_strides(self._levels)
        self.origins = compute_level_origins(self._levels)
        self.stages = nn.ModuleList()
        for (before, after), has_pool in zip(pairwise((in_channels, *channels)), POOL_AFTER, strict=True):
            stage = build_conv_block(spatial_dims, before, after, 3, 1, norm)
            self.stages.append(stage.append(Pool[Pool.MAX, spatial_dims](3, 2)) if has_pool else stage)
        features = (
            count_flat_features(self.stages, in_channels, input_shape) if summary == "flatten" else 2 * channels[-1]
        )
        self.to_summary = SummaryNetwork(
            features, pooling=summary, hidden=(hidden, hidden) if hidden else (), out_channels=summary_channels
        )
        self.summary_channels = self.to_summary.out_channels

    def forward(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) images into `Features`."""
        maps = compute_maps(self.stages, image)
        return Features(maps, self.to_summary(maps[-1]))

    def receptive_field(self, level: int) -> int:
        """Side of the receptive field of a cell of map `level`, in voxels (5, 13, 21, 29, 45)."""
        return level_receptive_field(self._levels, level)
