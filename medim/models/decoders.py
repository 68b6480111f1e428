"""Decoders: the maps of an encoder in, one map on the image's own grid out."""

from __future__ import annotations

from collections.abc import Callable

from monai.networks.blocks.dynunet_block import UnetUpBlock
from torch import nn

from medim.models.layers import Norm, norm_spec
from medim.types import Features


class UNetDecoder(nn.Module):
    """The expanding half of a U-Net: upsample by transposed convolution, join the encoder's map, two convolutions.

    Args:
        channels: channels of the encoder's maps, fine to coarse.
        strides: strides of the encoder's maps; the finest must be 1 or a power of two.
        spatial_dims: 2 or 3.
        norm: batch (bn), instance (in), group (gn) or no (none) normalisation.

    Attributes:
        out_channels: channels of the decoded map.
    """

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], spatial_dims: int, *, norm: Norm = "in"
    ) -> None:
        super().__init__()
        if strides[0] != 1:
            raise ValueError(
                f"UNetDecoder: expected an encoder whose finest map has stride 1, got strides {strides}. "
                "Use the unet encoder."
            )
        self.out_channels = channels[0]
        steps = range(len(channels) - 2, -1, -1)
        self.levels = nn.ModuleList(
            UnetUpBlock(spatial_dims, channels[i + 1], channels[i], 3, 1, strides[i + 1] // strides[i], norm_spec(norm))
            for i in steps
        )

    def forward(self, features: Features) -> Features:
        """Decode maps (N, channels[i], ...) to one map (N, out_channels, ...) at stride 1; the summary is passed on."""
        *finer, x = features.maps
        for level, skip in zip(self.levels, reversed(finer), strict=True):
            x = level(x, skip)
        return Features((x,), features.summary)


DECODERS: dict[str, Callable[..., nn.Module]] = {"unet": UNetDecoder}
