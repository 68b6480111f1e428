"""The small strided convolutional nets of the Deep InfoMax paper, in 2D and 3D."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from medim.models.layers import Norm, check_channels, conv, pool, receptive_field
from medim.types import Features


class ConvNet(nn.Module):
    """Strided convolutions with batch norm and ReLU, then a summary from the last map.

    The defaults are the paper's 32x32 net (Hjelm et al. 2019, arXiv 1808.06670; layer table in its public code):
    64, 128, 256 channels at strides 2, 4, 8, flatten, Linear 1024, BN, ReLU, Linear 64.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the training views; `summary="flatten"` works at this shape only.
        channels: output channels of each convolution, every one of stride 2.
        kernel_size: side of the kernels.
        norm: batch (bn), instance (in) or group (gn) normalisation.
        summary: `flatten` the last map as the paper does, or `mean_max`, its mean and maximum, which takes any input
            size.
        hidden: width of the layer between map and summary; 0 leaves it out.
        summary_channels: length of the summary Y.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        input_shape: tuple[int, ...],
        *,
        channels: tuple[int, ...] = (64, 128, 256),
        kernel_size: int = 4,
        norm: Norm = "bn",
        summary: Literal["flatten", "mean_max"] = "flatten",
        hidden: int = 1024,
        summary_channels: int = 64,
    ) -> None:
        super().__init__()
        check_channels("convnet", channels)
        self.channels = channels
        self.strides = tuple(2 ** (i + 1) for i in range(len(channels)))
        self.summary_channels = summary_channels
        self._kernel_size = kernel_size
        self._flatten = summary == "flatten"
        widths = (in_channels, *channels)
        self.stages = nn.ModuleList(
            conv(spatial_dims, before, after, kernel_size, 2, norm) for before, after in pairwise(widths)
        )
        if self._flatten:
            with torch.no_grad():
                grid = nn.Sequential(*self.stages).eval()(torch.zeros(1, in_channels, *input_shape)).shape[2:]
            self.stages.train()
            pooled = channels[-1] * math.prod(grid)
        else:
            pooled = 2 * channels[-1]
        middle = (
            [nn.Linear(pooled, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)] if hidden else []
        )
        self.to_summary = nn.Sequential(*middle, nn.Linear(hidden or pooled, summary_channels))

    def forward(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) images; see `Encoder`."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        last = maps[-1].flatten(1) if self._flatten else pool(maps[-1])
        return Features(tuple(maps), self.to_summary(last))

    def receptive_field(self, level: int) -> int:
        """Side of what a cell of map `level` sees, in voxels (4, 10, 22 for the paper's net)."""
        return receptive_field([(self._kernel_size, 2)] * (level + 1))
