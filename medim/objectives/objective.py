"""What an objective is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from medim.types import Features, Views


@dataclass(frozen=True, eq=False)
class Term:
    """One loss of an objective.

    Attributes:
        loss: scalar, to be minimised.
        chance: the loss of an uninformed critic or head; None where that means nothing.
        diagnostics: scalars worth watching beside the loss.
    """

    loss: torch.Tensor
    chance: float | None = None
    diagnostics: dict[str, torch.Tensor] = field(default_factory=dict)


class Encode(Protocol):
    """The encoder, as objectives see it.

    Attributes:
        clean: features of the batch's views, computed once and shared: B * V images, the views of an image side by
            side.
        generator: where an objective takes its randomness from; seeded by run and step, so that a step can be replayed.
    """

    clean: Features
    generator: torch.Generator

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode another (corrupted) batch of images (N, C, ...)."""
        ...

    def decode(self, features: Features) -> torch.Tensor:
        """Decode features to (N, out_channels, ...) on the image's grid; the run's config must name a decoder."""
        ...


class Objective(Protocol):
    """One flat `nn.Module` a method; it owns its critics and heads.

    A constructor takes what it needs of `channels`, `summary_channels`, `spatial_dims`, `grids` (the grid of each
    map), `in_channels`, `input_shape`, `receptive_fields`, `decoded_channels` (0 without a decoder), `view_count`
    (views an image), `aligned` (whether a voxel shows one place in all of them); the rest are its own keyword options.
    One that leaves the summary untrained says `reads_summary = False`. An adversarial objective also has
    `adversary_parameters()` and `adversary_loss(encode, views)`: they are stepped first.
    """

    def __call__(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Turn views into losses, each under its own name."""
        ...


def encoder_info(
    encoder: Any, decoder: Any, *, in_channels: int, spatial_dims: int, input_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Constructor arguments for `build(OBJECTIVES, section, **known(...))`; each objective takes those it names.

    Args:
        encoder: whose features it gets; see `medim.models.encoders.Encoder`.
        decoder: for those that decode; or None.
        in_channels: channels of an image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the views.
    """
    training = encoder.training
    with torch.no_grad():
        maps = encoder.eval()(torch.zeros(1, in_channels, *input_shape)).maps
    encoder.train(training)
    return {
        "channels": encoder.channels,
        "summary_channels": encoder.summary_channels,
        "spatial_dims": spatial_dims,
        "grids": tuple(tuple(m.shape[2:]) for m in maps),
        "in_channels": in_channels,
        "input_shape": input_shape,
        "decoded_channels": decoder.out_channels if decoder else 0,
        "receptive_fields": tuple(encoder.receptive_field(level) for level in range(len(maps))),
    }
