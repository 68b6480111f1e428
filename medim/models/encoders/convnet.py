"""The small strided convolutional networks of the Deep InfoMax paper, in 2D and 3D."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from medim.config import Size, SizeOrZero
from medim.models.layers import (
    Activation,
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


class ConvNet(nn.Module):
    """Strided convolutions with batch norm and ReLU, then a summary from the last map.

    The defaults are the paper's 32x32 network (Hjelm et al. 2019, arXiv 1808.06670; layer table in its public code):
    64, 128, 256 channels at strides 2, 4, 8, flatten, Linear 1024, BN, ReLU, Linear 64. docs/reference/config.md lists
    the options for its other networks, for Fedorov's 3D network and for the network of most tutorials.

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the training views; `summary="flatten"` works at this shape only.
        channels: output channels of each convolution.
        kernel_size: side of the kernels.
        stride: stride of every convolution.
        padding: zero padding on each side of the input of a convolution; None is (kernel_size - 1) // 2, 0 shrinks the
            maps.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.
        first_norm: normalise the first convolution too (a DCGAN does not).
        activation: relu, or leaky_relu of slope 0.2.
        summary: input of the summary: `flatten` (the flattened last map, as in the paper) or `mean_max` (its mean and
            maximum, for any input size).
        hidden: width of the layer between map and summary; 0 omits it.
        summary_channels: length of the summary Y; 0 omits the last linear layer.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        input_shape: tuple[int, ...],
        *,
        channels: tuple[Size, ...] = (64, 128, 256),
        kernel_size: Size = 4,
        stride: Size = 2,
        padding: int | None = None,
        norm: Norm = "bn",
        first_norm: bool = True,
        activation: Activation = "relu",
        summary: Pooling = "flatten",
        hidden: SizeOrZero = 1024,
        summary_channels: SizeOrZero = 64,
    ) -> None:
        super().__init__()
        check_channels("convnet", channels)
        self.channels = channels
        padding = (kernel_size - 1) // 2 if padding is None else padding
        self._levels = [[(kernel_size, stride, padding)]] * len(channels)
        self.strides = compute_level_strides(self._levels)
        self.origins = compute_level_origins(self._levels)
        norms: list[Norm] = [norm if first_norm else "none", *[norm] * (len(channels) - 1)]
        self.stages = nn.ModuleList(
            build_conv_block(
                spatial_dims, before, after, kernel_size, stride, norm, padding=padding, activation=activation
            )
            for (before, after), norm in zip(pairwise((in_channels, *channels)), norms, strict=True)
        )
        features = (
            count_flat_features(self.stages, in_channels, input_shape) if summary == "flatten" else 2 * channels[-1]
        )
        self.to_summary = SummaryNetwork(
            features, pooling=summary, hidden=(hidden,) if hidden else (), out_channels=summary_channels
        )
        self.summary_channels = self.to_summary.out_channels

    def forward(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) images into `Features`."""
        maps = compute_maps(self.stages, image)
        return Features(maps, self.to_summary(maps[-1]))

    def receptive_field(self, level: int) -> int:
        """Side of the receptive field of a cell of map `level`, in voxels (4, 10, 22 for the paper's network)."""
        return level_receptive_field(self._levels, level)
