"""Decoders: from the maps of an encoder to one map on the grid of the image, or from a summary to an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetUpBlock
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_norm_layer
from torch import nn

from medim.models.layers import Norm, check_channels, norm_spec
from medim.types import Features


class MapShapeError(ValueError):
    """The maps of an encoder do not divide the image by their strides, as a decoder requires.

    Attributes:
        requirement: the message without its subject.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> None:
        got, want = (", ".join("x".join(map(str, shape)) for shape in part) for part in (shapes, expected))
        self.requirement = (
            f"requires an encoder with maps of {want} cells for these views, got {got}. Pretrain an encoder whose "
            "convolutions are padded (unet, convnet or resnet), such as --config mri-crop or --config xray."
        )
        super().__init__(f"UNetDecoder {self.requirement}")


def check_map_shapes(maps: Sequence[torch.Tensor], strides: Sequence[int], shape: Sequence[int]) -> None:
    """Check that the maps of an encoder fit a decoder.

    Args:
        maps: maps (N, C, ...) of the encoder, fine to coarse.
        strides: their strides.
        shape: spatial shape of the image.

    Raises:
        MapShapeError: a map is not the image divided by its stride.
    """
    shapes = [tuple(level.shape[2:]) for level in maps]
    expected = [tuple(side // stride for side in shape) for stride in strides]
    if shapes != expected:
        raise MapShapeError(shapes, expected)


class UNetDecoder(nn.Module):
    """The expanding half of a U-Net: transposed convolution, concatenation with the encoder's map, two convolutions.

    If the finest map of the encoder has a stride above 1, a last transposed convolution and two convolutions lead to
    the grid of the image, without a map to concatenate.

    Args:
        channels: channels of the encoder's maps, fine to coarse.
        strides: strides of the encoder's maps, fine to coarse.
        spatial_dims: 2 or 3.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.

    Attributes:
        out_channels: channels of the decoded map.
    """

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], spatial_dims: int, *, norm: Norm = "in"
    ) -> None:
        super().__init__()
        self.out_channels = channels[0]
        steps = range(len(channels) - 2, -1, -1)
        self.levels = nn.ModuleList(
            UnetUpBlock(spatial_dims, channels[i + 1], channels[i], 3, 1, strides[i + 1] // strides[i], norm_spec(norm))
            for i in steps
        )
        self.full = nn.Identity() if strides[0] == 1 else _build_upsampling(spatial_dims, channels[0], strides[0], norm)

    def forward(self, features: Features) -> Features:
        """Decode maps (N, channels[i], ...) to one map (N, out_channels, ...) at stride 1; the summary is unchanged."""
        *finer, x = features.maps
        for level, skip in zip(self.levels, reversed(finer), strict=True):
            x = level(x, skip)
        return Features((self.full(x),), features.summary)


def _build_upsampling(spatial_dims: int, channels: int, stride: int, norm: Norm) -> nn.Module:
    """Build a transposed convolution by the stride and two convolutions, as a level of the decoder without its skip."""
    return nn.Sequential(
        Conv[Conv.CONVTRANS, spatial_dims](channels, channels, stride, stride, bias=False),
        UnetBasicBlock(spatial_dims, channels, channels, 3, 1, norm_spec(norm)),
    )


class ImageDecoder(nn.Module):
    """The generator of DCGAN: decode a summary to an image (Radford et al. 2016, arXiv 1511.06434).

    A linear layer maps the summary to the coarsest grid. Transposed convolutions (kernel 4, stride 2) follow, each with
    normalisation and ReLU, and a 3-wide convolution to the image. The defaults are the decoder of the Deep InfoMax
    paper for 32x32, without its tanh, because images here are not limited to [-1, 1]. Any shape is possible: the grid
    is cropped at its far end to the shape of the image.

    Args:
        summary_channels: length of the summary.
        out_channels: channels of the image.
        shape: spatial shape of the image, in voxels.
        channels: channels of each step, coarse to fine; each but the first doubles the grid.
        norm: batch (bn), instance (in) or group (gn) normalisation.
    """

    def __init__(
        self,
        summary_channels: int,
        out_channels: int,
        shape: tuple[int, ...],
        *,
        channels: tuple[int, ...] = (512, 256, 128, 64),
        norm: Norm = "bn",
    ) -> None:
        super().__init__()
        check_channels("image_decoder", channels)
        dims, stride = len(shape), 2 ** (len(channels) - 1)
        self._shape = shape
        self._grid = (channels[0], *(math.ceil(side / stride) for side in shape))
        self.to_grid = nn.Linear(summary_channels, math.prod(self._grid), bias=False)
        layers = [_build_norm_relu(dims, channels[0], norm)]
        for before, after in pairwise(channels):
            layers += [
                Conv[Conv.CONVTRANS, dims](before, after, 4, 2, 1, bias=False),
                _build_norm_relu(dims, after, norm),
            ]
        self.layers = nn.Sequential(*layers, Conv[Conv.CONV, dims](channels[-1], out_channels, 3, padding=1))

    def forward(self, summary: torch.Tensor) -> torch.Tensor:
        """Decode (N, summary_channels) to images (N, out_channels, ...)."""
        image: torch.Tensor = self.layers(self.to_grid(summary).unflatten(1, self._grid))
        return image[(slice(None), slice(None), *(slice(side) for side in self._shape))]


def _build_norm_relu(spatial_dims: int, channels: int, norm: Norm) -> nn.Module:
    return nn.Sequential(get_norm_layer(norm_spec(norm), spatial_dims, channels), nn.ReLU(inplace=True))


DECODERS: dict[str, Callable[..., nn.Module]] = {"unet": UNetDecoder}
