"""Context networks of CPC: aggregate the rows above each cell."""

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


class PixelCNNContextNetwork(nn.Module):
    """Gated PixelCNN with a vertical and a horizontal stack, as CPC of Lowe et al. 2019 (1905.11786) uses it.

    `PixelCNN_Autoregressor.py` of loeweX/Greedy_InfoMax with `mask_mode="only_vert"`: unlike the PixelCNN of van den
    Oord et al. (1606.05328), the horizontal stack has no mask, so that a cell depends on its own row to both sides and
    on the rows above it. Their 3x3 kernels with a masked lower row are 2x3 kernels here. The output is a 1x1
    convolution of the horizontal stack.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the map and of the context.
        layers: number of gated layers; the first one has no residual connections.
    """

    def __init__(self, spatial_dims: int, channels: int, *, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_PixelCNNLayer(spatial_dims, channels, number > 0) for number in range(layers))
        self.output = build_pointwise_conv(spatial_dims, channels, channels)

    def forward(self, local: torch.Tensor) -> torch.Tensor:
        """Compute the contexts of a map (N, C, rows, ...), in the same shape."""
        vertical = horizontal = local
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        context: torch.Tensor = self.output(horizontal)
        return context


class _PixelCNNLayer(nn.Module):
    """Layer of both stacks; the vertical one feeds the horizontal one."""

    def __init__(self, spatial_dims: int, channels: int, is_residual: bool) -> None:
        super().__init__()
        kernel, padding = (1, *(3,) * (spatial_dims - 1)), (0, *(1,) * (spatial_dims - 1))
        self.vertical = build_causal_conv(spatial_dims, channels, 2 * channels)
        self.vertical_to_horizontal = build_pointwise_conv(spatial_dims, 2 * channels, 2 * channels)
        self.horizontal = Conv[Conv.CONV, spatial_dims](channels, 2 * channels, kernel, padding=padding)
        self.residual = build_pointwise_conv(spatial_dims, channels, 2 * channels) if is_residual else None
        self.mix = build_pointwise_conv(spatial_dims, channels, channels)

    def forward(self, vertical: torch.Tensor, horizontal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the inputs of both stacks, each (N, C, rows, ...), to outputs of the same shape."""
        above = self.vertical(vertical)
        row = self.mix(_gate(self.horizontal(horizontal) + self.vertical_to_horizontal(above)))
        if self.residual is None:
            return _gate(above), row
        return _gate(above + self.residual(vertical)), horizontal + row


def build_causal_conv(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Build a 2 x 3 (x 3) convolution over a cell's row and the row above."""
    other_dims = spatial_dims - 1
    padding = (1, 1) * other_dims + (1, 0)  # last axis first: both sides of the columns, the upper side of the rows
    return nn.Sequential(
        Pad[Pad.CONSTANTPAD, spatial_dims](padding, 0.0),
        Conv[Conv.CONV, spatial_dims](in_channels, out_channels, (2, *(3,) * other_dims)),
    )


def _gate(x: torch.Tensor) -> torch.Tensor:
    """Multiply tanh of the first half of the channels by the sigmoid of the second half."""
    value, gate = x.chunk(2, dim=1)
    return torch.tanh(value) * torch.sigmoid(gate)


class _GatedConvolution(nn.Module):
    """Gated convolution over a cell's row and the row above, added to its input."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.causal = build_causal_conv(spatial_dims, channels, 2 * channels)
        self.mix = build_pointwise_conv(spatial_dims, channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, rows, ...) to the same shape."""
        update: torch.Tensor = self.mix(_gate(self.causal(x)))
        return x + update


CONTEXT_NETWORKS = {"vertical": ContextNetwork, "pixelcnn": PixelCNNContextNetwork}
