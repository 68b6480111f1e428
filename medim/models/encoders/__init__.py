"""Encoders: compute `Features` (maps from fine to coarse, and a summary) of an image.

To add an encoder, write a module in this folder with a class that implements `Encoder`, and add a line to `ENCODERS`
(`docs/how-to/add-encoder.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from medim.models.encoders.alexnet import AlexNet
from medim.models.encoders.amdim import AMDIMEncoder
from medim.models.encoders.convnet import ConvNet
from medim.models.encoders.patches import PatchEncoder
from medim.models.encoders.resnet import ResNet
from medim.models.encoders.unet import UNetEncoder
from medim.types import Features


class Encoder(Protocol):
    """Interface of an encoder.

    A constructor takes `in_channels`, `spatial_dims` and, if needed, `input_shape` or `encoders` (the table) by
    position; its keyword parameters are the options of the encoder.

    Attributes:
        channels: channels of each map, fine to coarse.
        strides: distance, in voxels, between neighbouring cells of each map, along every axis. The side of a grid is
            the side of the image divided by the stride, rounded up or down, minus cells lost to convolutions without
            padding; run a forward pass to get the exact grid.
        origins: centre of the receptive field of the first cell of each map, in voxels along every axis (may be
            fractional); cell c of map i has its centre at `origins[i] + c * strides[i]`.
        summary_channels: length of the summary.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    origins: tuple[float, ...]
    summary_channels: int

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode (N, in_channels, ...) into maps (N, channels[i], ...) and a summary (N, summary_channels)."""
        ...

    def receptive_field(self, level: int) -> int:
        """Side of the receptive field of a cell of map `level`, in voxels."""
        ...


ENCODERS: dict[str, Callable[..., torch.nn.Module]] = {
    "convnet": ConvNet,
    "alexnet": AlexNet,
    "resnet": ResNet,
    "amdim": AMDIMEncoder,
    "patches": PatchEncoder,
    "unet": UNetEncoder,
}
