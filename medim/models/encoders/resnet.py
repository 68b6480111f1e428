"""The residual networks of the Deep InfoMax paper, built from MONAI's bottlenecks, and that of CPC, in 2D and 3D."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from monai.networks.nets.resnet import ResNetBottleneck
from torch import nn

from medim.config import Size, SizeOrZero
from medim.models.layers import (
    Norm,
    Pooling,
    SummaryNetwork,
    build_conv_block,
    build_norm,
    check_channels,
    compute_level_origins,
    compute_level_strides,
    compute_maps,
    count_flat_features,
    level_receptive_field,
    norm_spec,
)
from medim.types import Features, UsageError


class ResNet(nn.Module):
    """A strided convolution, stages of bottleneck blocks that halve the grid (except the first stage), and the summary.

    `resnet19` of the Deep InfoMax authors' code (configs/resnets.py). The maps are numbered as in that code: the first
    convolution, the first stage, then for every other stage the output of its strided first block and, if it has more
    blocks, of its last block. The authors' local map is level 2: 512 channels, 8x8 for a 32x32 image.

    With `preactivation`, `norm="none"`, `kernel_size=5`, `first_stride=1`, `blocks=(3, 4, 6)`, `summary="mean"` and no
    layers after it: the encoder of the crops of CPC in Lowe et al. 2019 (1905.11786, `Resnet_Encoder.py`).

    Args:
        in_channels: channels of the image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the training views; `summary="flatten"` works at this shape only.
        widths: channels inside the blocks of each stage; their output has four times as many.
        blocks: blocks of each stage ([3, 4, 6] gives a ResNet-50 without its last stage).
        kernel_size: of the first convolution.
        first_stride: of the first convolution.
        preactivation: norm and ReLU before each convolution of a block instead of after it (He et al. 2016,
            1603.05027); nothing follows the first convolution and the last block.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.
        summary: input of the summary: `flatten` (the flattened last map, as in the paper), `mean_max` (its mean and
            maximum, for any input size) or `mean`.
        hidden: width of the layer between map and summary; 0 omits it.
        summary_channels: length of the summary; 0 omits the last linear layer.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_dims: int,
        input_shape: tuple[int, ...],
        *,
        widths: tuple[Size, ...] = (64, 128, 256),
        blocks: tuple[Size, ...] = (2, 2, 2),
        kernel_size: Size = 3,
        first_stride: Size = 2,
        preactivation: bool = False,
        norm: Norm = "bn",
        summary: Pooling = "flatten",
        hidden: SizeOrZero = 1024,
        summary_channels: SizeOrZero = 64,
    ) -> None:
        super().__init__()
        check_channels("resnet", widths, option="widths")
        if len(blocks) != len(widths) or min(blocks) < 1:
            raise UsageError(f"resnet.blocks: expected 1 or more for each of the widths {widths}, got {blocks}.")
        groups = _plan_block_groups(widths, blocks)
        self.channels = (widths[0], *(4 * width for width, _, _ in groups))
        first_layer = (kernel_size, first_stride, (kernel_size - 1) // 2)
        self._levels = [[first_layer], *([(3, stride, 1), *[(3, 1, 1)] * (count - 1)] for _, count, stride in groups)]
        self.strides = compute_level_strides(self._levels)
        self.origins = compute_level_origins(self._levels)
        stem: nn.Module = (
            Conv[Conv.CONV, spatial_dims](in_channels, widths[0], *first_layer)
            if preactivation
            else build_conv_block(spatial_dims, in_channels, widths[0], kernel_size, first_stride, norm)
        )
        build_block = PreactivationBottleneck if preactivation else _build_bottleneck
        self.stages = nn.ModuleList([stem])
        for before, (width, count, stride) in zip(self.channels, groups, strict=False):
            first = build_block(spatial_dims, before, width, stride, norm)
            rest = (build_block(spatial_dims, 4 * width, width, 1, norm) for _ in range(count - 1))
            self.stages.append(nn.Sequential(first, *rest))
        features = (
            count_flat_features(self.stages, in_channels, input_shape)
            if summary == "flatten"
            else self.channels[-1] * (2 if summary == "mean_max" else 1)
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
        """Side of the receptive field of a cell of map `level`, in voxels (3, 11, 15, 23, 31, 47)."""
        return level_receptive_field(self._levels, level)


class PreactivationBottleneck(nn.Module):
    """Bottleneck with norm and ReLU before each convolution (He et al. 2016, 1603.05027, figure 4e).

    MONAI has only the block with ReLU after the sum. A shortcut whose shape differs is a 1-wide convolution of the
    activated input. Convolutions have biases if there is no norm.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the input.
        width: channels inside the block; the output has four times as many.
        stride: of the middle convolution and the shortcut.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.
    """

    def __init__(self, spatial_dims: int, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        layer, bias = Conv[Conv.CONV, spatial_dims], norm == "none"
        self.activate = nn.Sequential(build_norm(norm, spatial_dims, channels), nn.ReLU())
        self.block = nn.Sequential(
            layer(channels, width, 1, bias=bias),
            *(build_norm(norm, spatial_dims, width), nn.ReLU(inplace=True)),
            layer(width, width, 3, stride, 1, bias=bias),
            *(build_norm(norm, spatial_dims, width), nn.ReLU(inplace=True)),
            layer(width, 4 * width, 1, bias=bias),
        )
        is_same = stride == 1 and channels == 4 * width
        self.shortcut = None if is_same else layer(channels, 4 * width, 1, stride, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, ...) to (N, 4 * width, ...)."""
        activated = self.activate(x)
        output: torch.Tensor = self.block(activated) + (x if self.shortcut is None else self.shortcut(activated))
        return output


def _plan_block_groups(widths: tuple[int, ...], blocks: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Width, number of blocks and stride of the first block, for the blocks that each map adds."""
    groups = [(widths[0], blocks[0], 1)]
    for width, count in zip(widths[1:], blocks[1:], strict=True):
        groups += [(width, 1, 2), (width, count - 1, 1)] if count > 1 else [(width, 1, 2)]
    return groups


def _build_bottleneck(spatial_dims: int, channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    """Build a bottleneck; its shortcut is a strided 1-wide convolution if the shapes differ."""
    shortcut = None
    if stride > 1 or channels != 4 * width:
        layer = Conv[Conv.CONV, spatial_dims](channels, 4 * width, 1, stride, bias=False)
        shortcut = nn.Sequential(layer, build_norm(norm, spatial_dims, 4 * width))
    return ResNetBottleneck(channels, width, spatial_dims, stride, shortcut, norm=norm_spec(norm))
