"""Heads: the last layer of a task and its loss.

To add one, write a class that meets `Head` and add a line to `HEADS` (`docs/how-to/add-head.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from monai.losses.dice import DiceCELoss
from monai.networks.layers.factories import Conv
from torch import nn

from medim.models.layers import check_level, pool
from medim.types import Features


class Head(Protocol):
    """What every head offers.

    A constructor takes what it needs of `channels`, `summary_channels`, `spatial_dims`, `out_channels`.
    """

    def __call__(self, features: Features) -> torch.Tensor:
        """Logits (N, out_channels) or (N, out_channels, ...) from the encoder's or the decoder's features."""
        ...

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar loss; target (N,) or (N, ...) holds class indices."""
        ...


class ClassificationHead(nn.Module):
    """A linear layer on the summary and, where asked, on the mean and maximum of some maps; cross-entropy.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        out_channels: number of classes.
        maps: levels whose mean and maximum join the summary; below 0: from the coarsest.
    """

    def __init__(
        self, channels: tuple[int, ...], summary_channels: int, out_channels: int, *, maps: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.maps = tuple(check_level("classification.maps", level, len(channels)) for level in maps)
        width = summary_channels + sum(2 * channels[level] for level in self.maps)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.linear = nn.Linear(width, out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> torch.Tensor:
        """Logits (N, out_channels)."""
        return self.linear(
            self.norm(torch.cat([features.summary, *(pool(features.maps[level]) for level in self.maps)], dim=1))
        )

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats; target (N,) class indices."""
        return nn.functional.cross_entropy(logits.float(), target)


class SegmentationHead(nn.Module):
    """A 1-wide convolution on the decoded map; Dice and cross-entropy in equal parts (Isensee et al. 2021).

    Args:
        channels: channels of the decoded map, first.
        spatial_dims: 2 or 3.
        out_channels: number of classes, background included.
    """

    def __init__(self, channels: tuple[int, ...], spatial_dims: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](channels[0], out_channels, 1)
        self._loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)

    def forward(self, features: Features) -> torch.Tensor:
        """Logits (N, out_channels, ...)."""
        return self.conv(features.maps[0])

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Dice (over the batch, without the background) plus cross-entropy; target (N, ...) class indices."""
        return self._loss(logits.float(), target.unsqueeze(1))


HEADS: dict[str, Callable[..., nn.Module]] = {"classification": ClassificationHead, "segmentation": SegmentationHead}
