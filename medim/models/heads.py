"""Heads: the last layer of a task and its loss.

To add a head, write a class that implements `Head` and add a line to `HEADS` (`docs/how-to/add-head.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol

import torch
from monai.losses.dice import DiceLoss
from pydantic import Field
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from medim.config import Size
from medim.models.layers import build_pointwise_conv, check_level, pool_features
from medim.types import IGNORE_INDEX, Features

_ClassWeight = Annotated[float, Field(ge=1e-6, le=1e6)]  # within the range of fp32, products included
ClassWeights = Literal["balanced"] | Annotated[tuple[_ClassWeight, ...], Field(min_length=1)] | None
FocalGamma = Annotated[float, Field(ge=0, le=10)]
_MIN_ERROR = 1e-12  # of a probability in the focal factor, whose gradient is infinite at 0 for a gamma below 1


@dataclass(frozen=True)
class LinearProbe:
    """Linear classifier of standardised features: logits are weight @ ((x - mean) / std) + bias.

    Attributes:
        mean: (d,).
        std: (d,), above 0.
        weight: (K, d).
        bias: (K,).

    Examples:
        >>> one = torch.ones(2)
        >>> probe = LinearProbe(mean=one, std=one, weight=torch.tensor([[1.0, -1.0]]), bias=torch.zeros(1))
        >>> probe.weight @ ((torch.tensor([3.0, 2.0]) - probe.mean) / probe.std) + probe.bias
        tensor([1.])
    """

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class Head(Protocol):
    """Interface of a head.

    The positional parameters of a constructor are chosen from `channels`, `summary_channels`, `spatial_dims` and
    `out_channels`.
    """

    def __call__(self, features: Features) -> torch.Tensor:
        """Compute logits (N, out_channels) or (N, out_channels, ...) from the features of the encoder or decoder."""
        ...

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar loss; target: class indices (N,) or (N, ...), or the value of each finding (N, out_channels)."""
        ...

    def inputs(self, features: Features) -> torch.Tensor:
        """Input of the last layer, (N, d) or (N, d, ...); a linear probe is fitted to it (`head_init: probe`)."""
        ...

    def start_from(self, probe: LinearProbe) -> None:
        """Set the last layer to a linear probe of `inputs`."""
        ...


class ClassificationHead(nn.Module):
    """Linear layer on the summary and, optionally, on the mean and maximum of some maps; cross-entropy.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        out_channels: number of classes.
        maps: indices of maps, appended to the summary as mean and maximum; negative values count from the coarsest map.
        hidden: widths of layers before the linear layer, each with batch norm and ReLU.
        class_weights: weights of the classes in the cross-entropy, in the order of the classes; `balanced`: a run fits
            them as the inverse frequency of each class in its labelled training images, with mean 1; null: equal ones.
        focal_gamma: exponent of the focal loss, which reduces the weight of images that are already classified well
            (Lin et al. 2017); 0: the cross-entropy.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        out_channels: int,
        *,
        maps: tuple[int, ...] = (),
        hidden: tuple[Size, ...] = (),
        class_weights: ClassWeights = None,
        focal_gamma: FocalGamma = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("_class_weights", to_weights(class_weights, out_channels), persistent=False)
        self._focal_gamma = focal_gamma
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
        """Compute logits (N, out_channels)."""
        return self.linear(self.norm(self.inputs(features)))

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, weighted as configured; target (N,) class indices."""
        weights: Any = self._class_weights
        if weights is None and not self._focal_gamma:
            return nn.functional.cross_entropy(logits.float(), target)
        return focal_cross_entropy(logits.float(), target.unsqueeze(1), weights, self._focal_gamma)

    def inputs(self, features: Features) -> torch.Tensor:
        """Summary, mean and maximum of the selected maps, passed through the hidden layers: (N, d)."""
        inputs: torch.Tensor = self.hidden(pool_features(features, self.maps))
        return inputs

    @torch.no_grad()
    def start_from(self, probe: LinearProbe) -> None:
        """Copy a probe of `inputs`; its mean and standard deviation become the statistics of the norm."""
        self.norm.get_buffer("running_mean").copy_(probe.mean)
        self.norm.get_buffer("running_var").copy_(probe.std.square())
        self.linear.weight.copy_(probe.weight)
        self.linear.bias.copy_(probe.bias)


class MultiLabelHead(ClassificationHead):
    """The network of `classification` for any number of findings per image: sigmoid outputs, binary cross-entropy.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        out_channels: number of classes.
        maps: as in `classification`.
        hidden: as in `classification`.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        out_channels: int,
        *,
        maps: tuple[int, ...] = (),
        hidden: tuple[Size, ...] = (),
    ) -> None:
        super().__init__(channels, summary_channels, out_channels, maps=maps, hidden=hidden)

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over the labelled findings, in nats; target (N, out_channels): 1 present, 0 absent, NaN unlabelled."""
        unknown = target.isnan()
        costs = binary_cross_entropy_with_logits(logits.float(), target.masked_fill(unknown, 0), reduction="none")
        return costs.masked_fill(unknown, 0).sum() / (~unknown).sum().clamp_min(1)


class RegressionHead(ClassificationHead):
    """The network of `classification` with one number per output; mean squared error of the standardised target.

    The linear layer predicts `(target - mean) / std`. Outputs are in the unit of the target, in float64: with a large
    mean and a small standard deviation, float32 would round the differences of targets away.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        out_channels: number of targets.
        mean: mean of the training targets.
        std: standard deviation of the training targets, above 0.
        maps: as in `classification`.
        hidden: as in `classification`.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        out_channels: int,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        maps: tuple[int, ...] = (),
        hidden: tuple[Size, ...] = (),
    ) -> None:
        super().__init__(channels, summary_channels, out_channels, maps=maps, hidden=hidden)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"regression: expected a finite mean and a finite std above 0, got {mean} and {std}")
        self.target_mean, self.target_std = mean, std

    def forward(self, features: Features) -> torch.Tensor:
        """Predictions (N, out_channels), float64."""
        standardised: torch.Tensor = super().forward(features)
        return standardised.double() * self.target_std + self.target_mean

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error in units of `std`; target (N, out_channels)."""
        errors = (logits.double() - target.double()) / self.target_std
        return errors.float().square().mean()

    @torch.no_grad()
    def start_from(self, probe: LinearProbe) -> None:
        """Copy a probe of `inputs` that predicts the target in its own unit."""
        bias = (probe.bias.double() - self.target_mean) / self.target_std
        super().start_from(LinearProbe(probe.mean, probe.std, probe.weight.double() / self.target_std, bias))


class SegmentationHead(nn.Module):
    """1-wide convolution on the decoded map; Dice and cross-entropy in equal parts (Isensee et al. 2021).

    Args:
        channels: channels of the maps, first the decoded map.
        spatial_dims: 2 or 3.
        out_channels: number of classes, background included.
        dice: `batch`: Dice of all voxels of the batch; `image`: mean of the Dice of each image, in which a small
            structure counts as much as a large one in another image.
        class_weights: weights of the classes in the cross-entropy, the background first; `balanced`: a run fits them as
            the inverse frequency of each class in the voxels of its labelled training images, with mean 1; null: equal
            ones. Dice always counts the classes equally.
        focal_gamma: exponent of the focal loss instead of the cross-entropy, which reduces the weight of voxels that
            are already classified well (Lin et al. 2017); 0: the cross-entropy.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        spatial_dims: int,
        out_channels: int,
        *,
        dice: Literal["batch", "image"] = "batch",
        class_weights: ClassWeights = None,
        focal_gamma: FocalGamma = 0.0,
    ) -> None:
        super().__init__()
        self.conv: Any = build_pointwise_conv(spatial_dims, channels[0], out_channels)
        self._dice = DiceLoss(batch=dice == "batch", include_background=False)
        self.register_buffer("_class_weights", to_weights(class_weights, out_channels), persistent=False)
        self._focal_gamma = focal_gamma

    def forward(self, features: Features) -> torch.Tensor:
        """Compute logits (N, out_channels, ...)."""
        return self.conv(self.inputs(features))

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Dice (without the background) plus cross-entropy, weighted as configured.

        Args:
            logits: (N, out_channels, ...).
            target: class indices (N, ...); voxels of `IGNORE_INDEX` count in neither part.
        """
        logits, target = logits.float(), target.unsqueeze(1).long()
        weights: Any = self._class_weights
        is_labelled = target != IGNORE_INDEX
        classes = target.where(is_labelled, 0)
        truth = torch.zeros_like(logits).scatter_(1, classes, 1.0)
        dice: torch.Tensor = self._dice(logits.softmax(dim=1) * is_labelled, truth * is_labelled)
        return dice + focal_cross_entropy(logits, classes, weights, self._focal_gamma, is_labelled)

    def inputs(self, features: Features) -> torch.Tensor:
        """The decoded map (N, channels, ...)."""
        return features.maps[0]

    @torch.no_grad()
    def start_from(self, probe: LinearProbe) -> None:
        """Copy a probe of the voxels of the decoded map."""
        weight = probe.weight / probe.std
        self.conv.weight.copy_(weight.reshape(self.conv.weight.shape))
        self.conv.bias.copy_(probe.bias - weight @ probe.mean)


def focal_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    gamma: float,
    is_labelled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted mean of (1 - p)^gamma * -log(p) over images or voxels, p being the probability of the true class.

    The mean is over the weights of the true classes, as in `torch.nn.functional.cross_entropy`, which has no
    deterministic implementation for masks on CUDA. `FocalLoss` of MONAI divides by the number of classes instead, and
    its gradient at p = 1 is NaN for a gamma below 1.

    Args:
        logits: (N, K) or (N, K, ...).
        target: class indices (N, 1) or (N, 1, ...), 0 to K - 1.
        weights: (K,), above 0; None: equal ones.
        gamma: 0 or more; 0 is the cross-entropy.
        is_labelled: bool, (N, 1) or (N, 1, ...); the others do not count, and without any the mean is 0. None: all.

    Examples:
        >>> round(focal_cross_entropy(torch.zeros(1, 2), torch.ones(1, 1), None, 1.0).item(), 4)  # log(2) / 2
        0.3466
    """
    target = target.long()
    log_probabilities = logits.log_softmax(dim=1).gather(1, target)
    costs = -log_probabilities
    if gamma:
        costs = (-torch.expm1(log_probabilities)).clamp_min(_MIN_ERROR) ** gamma * costs
    target_weights = torch.ones_like(costs) if weights is None else weights[target]
    if is_labelled is not None:
        target_weights = target_weights * is_labelled
    return (target_weights * costs).sum() / target_weights.sum().clamp_min(torch.finfo(costs.dtype).tiny)


def to_weights(class_weights: ClassWeights, out_channels: int) -> torch.Tensor | None:
    """Convert the option `class_weights` to a tensor (out_channels,).

    `balanced`, which a run replaces by numbers before its first step, gives equal weights.

    Raises:
        ValueError: a wrong number of weights.
    """
    if class_weights is None:
        return None
    weights = [1.0] * out_channels if class_weights == "balanced" else class_weights
    if len(weights) != out_channels:
        raise ValueError(f"class_weights: expected {out_channels} numbers, one for each output, got {len(weights)}")
    return torch.tensor(weights, dtype=torch.float32)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "classification": ClassificationHead,
    "multi_label": MultiLabelHead,
    "regression": RegressionHead,
    "segmentation": SegmentationHead,
}
