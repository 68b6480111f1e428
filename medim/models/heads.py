"""Heads: the last layer of a task and its loss.

To add one, write a class that meets `Head` and add a line to `HEADS` (`docs/how-to/add-head.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from monai.losses.dice import DiceCELoss
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from medim.models.layers import build_pointwise_conv, check_level, pool_features
from medim.types import Features


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardised features: logits are weight @ ((x - mean) / std) + bias.

    Attributes:
        mean: (d,).
        std: (d,), above 0.
        weight: (K, d).
        bias: (K,).
    """

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class Head(Protocol):
    """What every head offers.

    A constructor takes what it needs of `channels`, `summary_channels`, `spatial_dims`, `out_channels`.
    """

    def __call__(self, features: Features) -> torch.Tensor:
        """Logits (N, out_channels) or (N, out_channels, ...) from the encoder's or the decoder's features."""
        ...

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar loss; target (N,) or (N, ...) holds class indices, (N, out_channels) what is known of each finding."""
        ...

    def inputs(self, features: Features) -> torch.Tensor:
        """What the last layer sees, (N, d) or (N, d, ...): a linear probe is fitted to it (`head_init: probe`)."""
        ...

    def start_from(self, probe: LinearProbe) -> None:
        """Set the last layer to a linear probe of `inputs`."""
        ...


class ClassificationHead(nn.Module):
    """A linear layer on the summary and, where asked, on the mean and maximum of some maps; cross-entropy.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        out_channels: number of classes.
        maps: levels whose mean and maximum join the summary; below 0: from the coarsest.
        hidden: widths of layers, each with batch norm and ReLU, before the linear one.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        out_channels: int,
        *,
        maps: tuple[int, ...] = (),
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.maps = tuple(check_level("classification.maps", level, len(channels)) for level in maps)
        widths = (summary_channels + sum(2 * channels[level] for level in self.maps), *hidden)
        self.hidden = nn.Sequential(
            *(
                layer
                for before, after in pairwise(widths)
                for layer in (nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(inplace=True))
            )
        )
        width = widths[-1]
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.linear = nn.Linear(width, out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> torch.Tensor:
        """Logits (N, out_channels)."""
        return self.linear(self.norm(self.inputs(features)))

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats; target (N,) class indices."""
        return nn.functional.cross_entropy(logits.float(), target)

    def inputs(self, features: Features) -> torch.Tensor:
        """Summary, and mean and maximum of the maps asked for, through the hidden layers: (N, d)."""
        inputs: torch.Tensor = self.hidden(pool_features(features, self.maps))
        return inputs

    @torch.no_grad()
    def start_from(self, probe: LinearProbe) -> None:
        """Take over a probe of `inputs`; the norm's statistics become the probe's."""
        self.norm.running_mean, self.norm.running_var = probe.mean.clone(), probe.std.square()
        self.linear.weight.copy_(probe.weight)
        self.linear.bias.copy_(probe.bias)


class MultiLabelHead(ClassificationHead):
    """The network of `classification`, a sigmoid a class: an image has any number of them; binary cross-entropy.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        out_channels: number of classes.
        maps: as in `classification`.
        hidden: as in `classification`.
    """

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over what is known, in nats; target (N, out_channels) of 1 (present), 0 (absent) and NaN (unknown)."""
        unknown = target.isnan()
        costs = binary_cross_entropy_with_logits(logits.float(), target.masked_fill(unknown, 0), reduction="none")
        return costs.masked_fill(unknown, 0).sum() / (~unknown).sum().clamp_min(1)


class SegmentationHead(nn.Module):
    """A 1-wide convolution on the decoded map; Dice and cross-entropy in equal parts (Isensee et al. 2021).

    Args:
        channels: channels of the decoded map, first.
        spatial_dims: 2 or 3.
        out_channels: number of classes, background included.
    """

    def __init__(self, channels: tuple[int, ...], spatial_dims: int, out_channels: int) -> None:
        super().__init__()
        self.conv: Any = build_pointwise_conv(spatial_dims, channels[0], out_channels)
        self._loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)

    def forward(self, features: Features) -> torch.Tensor:
        """Logits (N, out_channels, ...)."""
        return self.conv(self.inputs(features))

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Dice (over the batch, without the background) plus cross-entropy; target (N, ...) class indices."""
        return self._loss(logits.float(), target.unsqueeze(1))

    def inputs(self, features: Features) -> torch.Tensor:
        """The decoded map (N, channels, ...)."""
        return features.maps[0]

    @torch.no_grad()
    def start_from(self, probe: LinearProbe) -> None:
        """Take over a probe of the decoded map's voxels."""
        weight = probe.weight / probe.std
        self.conv.weight.copy_(weight.reshape(self.conv.weight.shape))
        self.conv.bias.copy_(probe.bias - weight @ probe.mean)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "classification": ClassificationHead,
    "multi_label": MultiLabelHead,
    "segmentation": SegmentationHead,
}
