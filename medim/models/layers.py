"""Layers in 2D and 3D, built by MONAI's factories, and helpers shared by the encoders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Literal

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_norm_layer
from torch import nn
from torch.nn.functional import avg_pool2d

from medim.types import Features, UsageError

Norm = Literal["bn", "in", "gn", "none"]
Activation = Literal["relu", "leaky_relu"]
Pooling = Literal["flatten", "mean_max", "mean"]
ConvGeometry = Sequence[tuple[int, int, int]]  # kernel size, stride and padding of each layer, in order


def norm_spec(norm: Norm) -> str | tuple[str, dict[str, object]]:
    """Name and options of a normalisation in MONAI: batch, instance (affine), group (4 groups) or none."""
    names: dict[Norm, str | tuple[str, dict[str, object]]] = {
        "bn": ("batch", {}),
        "in": ("instance", {"affine": True}),
        "gn": ("group", {"num_groups": 4}),
        "none": "",
    }
    return names[norm]


def build_norm(norm: Norm, spatial_dims: int, channels: int) -> nn.Module:
    """Build a normalisation of maps (N, channels, ...); none is the identity."""
    layer: nn.Module = get_norm_layer(norm_spec(norm), spatial_dims, channels)
    return layer


def build_conv_block(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    norm: Norm,
    *,
    padding: int | None = None,
    padding_mode: str = "zeros",
    activation: Activation = "relu",
) -> nn.Sequential:
    """Convolution (with a bias if no normalisation follows), normalisation, ReLU or LeakyReLU of slope 0.2.

    Padding None is (kernel_size - 1) // 2.
    """
    layer = Conv[Conv.CONV, spatial_dims](
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=(kernel_size - 1) // 2 if padding is None else padding,
        padding_mode=padding_mode,
        bias=norm == "none",
    )
    act = nn.ReLU(inplace=True) if activation == "relu" else nn.LeakyReLU(0.2, inplace=True)
    return nn.Sequential(layer, build_norm(norm, spatial_dims, out_channels), act)


def build_pointwise_conv(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Build a linear layer that is applied to every voxel."""
    layer: nn.Module = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 1)
    return layer


def build_unpadded_conv(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Build a 3x3 convolution without padding; the grid shrinks by one cell on every side."""
    layer: nn.Module = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 3)
    return layer


def check_channels(name: str, channels: Sequence[int], *, option: str = "channels") -> None:
    """Check that a list of channels (or of another `option`) is not empty and positive.

    Raises:
        UsageError: the list is empty, or a number in it is below 1.
    """
    if not channels or min(channels) < 1:
        raise UsageError(f"{name}.{option}: expected one or more numbers above 0, got {list(channels)}.")


def check_level(name: str, level: int, count: int) -> int:
    """Resolve the index of a map to 0 to count - 1; negative indices count from the coarsest map, as in Python.

    Raises:
        UsageError: the index is out of range; the message starts with `name`.
    """
    if not -count <= level < count:
        raise UsageError(
            f"{name}: expected 0 to {count - 1}, or -1 to {-count} from the coarsest map of the encoder, got {level}."
        )
    return level % count


def use_channels_last(module: nn.Module) -> None:
    """Convert the weights of convolutions to the channels-last layout, in place; this speeds up most training steps.

    Measured by `benchmarks/layout_and_precision.py`.
    """
    for weight in module.parameters():
        if weight.ndim in (4, 5):
            layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=layout)


class MeanPool3d(nn.Module):
    """`torch.nn.AvgPool3d`, computed as the mean over two axes, then over the third.

    The gradient of `AvgPool3d` has no deterministic implementation on CUDA; that of `avg_pool2d` has.

    Args:
        kernel_size: side of the window, in cells.
        stride: distance between windows, in cells.

    Examples:
        >>> MeanPool3d(2, 1)(torch.arange(8.0).reshape(1, 1, 2, 2, 2)).item()
        3.5
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, map_: torch.Tensor) -> torch.Tensor:
        """Map (N, C, ...) to (N, C, ...), without padding."""
        planes = avg_pool2d(map_.flatten(1, 2), self.kernel_size, self.stride)  # (N, C * D, ...)
        columns = planes.reshape(*map_.shape[:3], -1)
        means = avg_pool2d(columns, (self.kernel_size, 1), (self.stride, 1))
        return means.reshape(*means.shape[:3], *planes.shape[2:])


def pool_map(map_: torch.Tensor) -> torch.Tensor:
    """Mean and maximum over the grid of a map: (N, C, ...) to (N, 2 C); exportable to ONNX at any size.

    Examples:
        >>> pool_map(torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]]))
        tensor([[2., 5.]])
    """
    axes = tuple(range(2, map_.ndim))
    return torch.cat([map_.mean(axes), map_.amax(axes)], dim=1)


def pool_features(features: Features, maps: Sequence[int]) -> torch.Tensor:
    """Concatenate the summary with the mean and maximum of some maps.

    Args:
        features: features of N images.
        maps: indices of the maps.

    Returns:
        (N, summary_channels + 2 * the channels of these maps).
    """
    return torch.cat([features.summary, *(pool_map(features.maps[level]) for level in maps)], dim=1)


class SummaryNetwork(nn.Sequential):
    """Network from the last map to the summary: pooling, hidden layers (Linear, BN, ReLU), Linear.

    Args:
        features: length of the pooled map: that of `count_flat_features`, its channels for `mean`, or twice its
            channels for `mean_max`.
        pooling: `flatten` (the flattened map), `mean_max` (its mean and maximum over the grid) or `mean`.
        hidden: widths of the hidden layers.
        out_channels: length of the summary; 0 omits the last linear layer.

    Attributes:
        out_channels: length of the summary.
    """

    def __init__(self, features: int, *, pooling: Pooling, hidden: Sequence[int], out_channels: int) -> None:
        widths = (features, *hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        if out_channels:
            layers.append(nn.Linear(widths[-1], out_channels))
        super().__init__(*layers)
        self.out_channels = out_channels or widths[-1]
        self._pooling = pooling

    def forward(self, map_: torch.Tensor) -> torch.Tensor:
        """Map (N, C, ...) to (N, out_channels)."""
        if self._pooling == "mean":
            x = map_.mean(tuple(range(2, map_.ndim)))
        else:
            x = map_.flatten(1) if self._pooling == "flatten" else pool_map(map_)
        for layer in self:
            x = layer(x)
        return x


def compute_maps(stages: Iterable[nn.Module], image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs (N, channels[i], ...) of each stage of a chain of stages, from images (N, C, ...)."""
    return tuple(accumulate(stages, lambda map_, stage: stage(map_), initial=image))[1:]


def count_flat_features(stages: Iterable[nn.Module], in_channels: int, shape: Sequence[int]) -> int:
    """Length of the flattened output of a chain of stages for an image shape, determined by a forward pass."""
    chain = nn.Sequential(*stages).eval()
    with torch.no_grad():
        size = chain(torch.zeros(1, in_channels, *shape)).numel()
    chain.train()
    return size


def compute_level_strides(levels: Sequence[ConvGeometry]) -> tuple[int, ...]:
    """Distance, in voxels, between neighbouring cells of each map of an encoder, from the layers that each map adds.

    Examples:
        >>> compute_level_strides([[(3, 1, 1)], [(3, 2, 1)], [(3, 2, 1)]])  # one convolution per map
        (1, 2, 4)
    """
    return tuple(accumulate((math.prod(stride for _, stride, _ in layers) for layers in levels), mul))


def compute_receptive_field(layers: ConvGeometry) -> tuple[int, float]:
    """Side and centre, in input voxels, of the receptive field of the first output cell of a chain of convolutions.

    The first voxel has position 0; padding shifts the centre towards the front.
    """
    side, middle, jump = 1, 0.0, 1
    for kernel, stride, padding in layers:
        side += (kernel - 1) * jump
        middle += ((kernel - 1) / 2 - padding) * jump
        jump *= stride
    return side, middle


def level_receptive_field(levels: Sequence[ConvGeometry], level: int) -> int:
    """Side of the receptive field of a cell of map `level`, in voxels, from the layers that each map adds.

    Examples:
        >>> level_receptive_field([[(3, 1, 1)], [(3, 2, 1)]], 1)
        5
    """
    return _compute_level_field(levels, level)[0]


def compute_level_origins(levels: Sequence[ConvGeometry]) -> tuple[float, ...]:
    """Centre of the receptive field of the first cell of each map, in voxels, from the layers that each map adds.

    Examples:
        >>> compute_level_origins([[(3, 1, 1)], [(2, 2, 0)]])
        (0.0, 0.5)
    """
    return tuple(_compute_level_field(levels, level)[1] for level in range(len(levels)))


def _compute_level_field(levels: Sequence[ConvGeometry], level: int) -> tuple[int, float]:
    return compute_receptive_field([layer for layers in levels[: level + 1] for layer in layers])


def convert_to_mm(fields: Sequence[int], spacing: Sequence[float] | None) -> list[list[float]] | None:
    """Convert receptive fields to mm.

    Args:
        fields: side of each receptive field, in voxels.
        spacing: voxel spacing along each axis, in mm; None if it differs between images.

    Returns:
        The extent of each receptive field along every axis, or None if the spacing is unknown.
    """
    return None if spacing is None else [[side * step for step in spacing] for side in fields]
