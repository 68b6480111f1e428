"""Encoders: an image in, `Features` (maps fine to coarse, and a summary) out.

To add one, write a module beside this file whose class meets `Encoder`, and add a line to `ENCODERS`
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
    """What every encoder offers.

    A constructor takes `in_channels`, `spatial_dims` and, where it needs it, `input_shape`; the rest are its own
    keyword options.

    Attributes:
        channels: channels of each map, fine to coarse.
        strides: voxels from a cell of each map to the next, along every axis. The grid is the image's over it, rounded
            either way, less what convolutions without padding cut off: ask a forward pass.
        origins: the voxel, perhaps between two, in the middle of what the first cell of each map sees, along every
            axis; cell c of map i lies at `origins[i] + c * strides[i]`.
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
        """Side, in voxels, of the part of the image that a cell of map `level` sees."""
        ...


ENCODERS: dict[str, Callable[..., torch.nn.Module]] = {
    "convnet": ConvNet,
    "alexnet": AlexNet,
    "resnet": ResNet,
    "amdim": AMDIMEncoder,
    "patches": PatchEncoder,
    "unet": UNetEncoder,
}
