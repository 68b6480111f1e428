"""Layers that exist in 2D and 3D, from MONAI's factories, and what every encoder needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_norm_layer
from torch import nn

from medim.types import Features, UsageError

Norm = Literal["bn", "in", "gn"]


def norm_spec(norm: Norm) -> tuple[str, dict[str, object]]:
    """MONAI's name and options of a normalisation: batch, instance (affine) or group (4 groups)."""
    names: dict[Norm, tuple[str, dict[str, object]]] = {
        "bn": ("batch", {}),
        "in": ("instance", {"affine": True}),
        "gn": ("group", {"num_groups": 4}),
    }
    return names[norm]


def conv(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: Norm
) -> nn.Sequential:
    """Convolution without bias, normalisation, ReLU."""
    layer = Conv[Conv.CONV, spatial_dims]
    return nn.Sequential(
        layer(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False),
        get_norm_layer(norm_spec(norm), spatial_dims, out_channels),
        nn.ReLU(inplace=True),
    )


def pointwise(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A linear layer at every voxel."""
    layer: nn.Module = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 1)
    return layer


def unpadded(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A 3x3 convolution that sees whole neighbourhoods only; the grid loses a cell on every side."""
    layer: nn.Module = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 3)
    return layer


def check_channels(name: str, channels: Sequence[int]) -> None:
    """Refuse a list of channels that no network has.

    Raises:
        UsageError: the list is empty, or a number in it is below 1.
    """
    if not channels or min(channels) < 1:
        raise UsageError(f"{name}.channels: expected one or more numbers above 0, got {list(channels)}.")


def check_level(name: str, level: int, count: int) -> int:
    """The place, 0 to count - 1, of one of an encoder's maps; below 0 it is counted from the coarsest, as in Python.

    Raises:
        UsageError: there are not so many maps; the message starts with `name`.
    """
    if not -count <= level < count:
        raise UsageError(
            f"{name}: expected 0 to {count - 1}, or -1 to {-count} from the coarsest, the encoder's maps, got {level}."
        )
    return level % count


def channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions out channels last, in place, which makes most steps cheaper.

    Measured by `benchmarks/layout_and_precision.py`.
    """
    for weight in module.parameters():
        if weight.ndim in (4, 5):
            layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=layout)


def pool(map_: torch.Tensor) -> torch.Tensor:
    """Mean and maximum over the grid of a map: (N, C, ...) to (N, 2 C); exportable to ONNX at any size."""
    axes = tuple(range(2, map_.ndim))
    return torch.cat([map_.mean(axes), map_.amax(axes)], dim=1)


def pooled(features: Features, maps: Sequence[int]) -> torch.Tensor:
    """The summary, joined by the mean and maximum of some maps.

    Args:
        features: of N images.
        maps: levels.

    Returns:
        (N, summary_channels + 2 * the channels of these maps).
    """
    return torch.cat([features.summary, *(pool(features.maps[level]) for level in maps)], dim=1)


def receptive_field(kernels_and_strides: Sequence[tuple[int, int]]) -> int:
    """Side of what one output cell of a chain of convolutions sees, in input voxels."""
    side, jump = 1, 1
    for kernel, stride in kernels_and_strides:
        side += (kernel - 1) * jump
        jump *= stride
    return side
