"""Context network of CPC: aggregates the rows above each cell."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv, Pad
from torch import nn

from medim.models.layers import build_pointwise_conv


class ContextNetwork(nn.Module):
    """Gated convolutions, causal along the first axis: a cell depends on its own row and the rows above it only.

    This is the vertical stack of the gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, section 2.2), as used
    by CPC on images: 2 x 3 (x 3) kernels over the cell's row and the row above, tanh times sigmoid, a 1x1 convolution
    and a residual connection. Each layer extends the context by one row upwards and by one column to either side. There
    is no normalisation, because statistics over the grid would leak information from lower rows.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the map and of the context.
        layers: number of gated convolutions.
    """

    def __init__(self, spatial_dims: int, channels: int, *, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_GatedConvolution(spatial_dims, channels) for _ in range(layers))

    def forward(self, local: torch.Tensor) -> torch.Tensor:
        """Compute the contexts of a map (N, C, rows, ...), in the same shape."""
        for layer in self.layers:
            local = layer(local)
        return local


class _GatedConvolution(nn.Module):
    """Gated convolution over a cell's row and the row above, added to its input."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        other_dims = spatial_dims - 1
        padding = (1, 1) * other_dims + (
            1,
            0,
        )  # order of axes: last first; both sides of the columns, the upper side of the rows
        self.causal = nn.Sequential(
            Pad[Pad.CONSTANTPAD, spatial_dims](padding, 0.0),
            Conv[Conv.CONV, spatial_dims](channels, 2 * channels, (2, *(3,) * other_dims)),
        )
        self.mix = build_pointwise_conv(spatial_dims, channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, rows, ...) to the same shape."""
        value, gate = self.causal(x).chunk(2, dim=1)
        update: torch.Tensor = self.mix(torch.tanh(value) * torch.sigmoid(gate))
        return x + update
