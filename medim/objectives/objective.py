"""Interface of an objective: its inputs, its constructor arguments and its losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import torch

from medim.types import Features, Views


@dataclass(frozen=True, eq=False)
class Term:
    """One loss of an objective.

    Attributes:
        loss: scalar, to be minimised.
        chance: loss of an uninformed critic or head; None if the loss has no chance level.
        diagnostics: scalars to log together with the loss.

    Examples:
        >>> logits = torch.zeros(2, 4)
        >>> term = Term(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])), chance=1.386)
        >>> round(float(term.loss), 3)
        1.386
    """

    loss: torch.Tensor
    chance: float | None = None
    diagnostics: dict[str, torch.Tensor] = field(default_factory=dict)


class Encode(Protocol):
    """Interface of the encoder that objectives use.

    Attributes:
        clean: features of the views of the batch, computed once and shared by all objectives: B * V images, the views
            of one image next to each other.
        generator: source of randomness for objectives; seeded by run and step, so that a step can be repeated exactly.

    Examples:
        >>> from types import SimpleNamespace
        >>> def compute_norm_loss(encode: Encode) -> Term:
        ...     return Term(encode.clean.summary.square().mean())
        >>> encode = SimpleNamespace(clean=Features(maps=(), summary=torch.full((2, 4), 2.0)))
        >>> float(compute_norm_loss(encode).loss)
        4.0
    """

    clean: Features
    generator: torch.Generator

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode another (corrupted) batch of images (N, C, ...)."""
        ...

    def decode(self, features: Features) -> torch.Tensor:
        """Decode features to (N, out_channels, ...) on the grid of the image; needs a decoder in the configuration."""
        ...


class Objective(Protocol):
    """Interface of an objective: one flat `nn.Module` that owns its critics and heads.

    The positional parameters of a constructor are chosen from `channels`, `summary_channels`, `spatial_dims`, `grids`
    (the grid of each map), `in_channels`, `input_shape`, `receptive_fields`, `decoded_channels` (0 without a decoder),
    `view_count` (views per image) and `aligned` (whether a voxel shows the same position in all views of an image). The
    keyword parameters are the options of the objective. An adversarial objective also has `adversary_parameters()` and
    `adversary_loss(encode, views)`; the adversary is updated first in each step.

    These attributes are optional. `view_counts` is an attribute of the class; the others may depend on the options and
    be set in the constructor.

    Attributes:
        view_counts: accepted numbers of views per image; `(1, 2)` by default. The constructor raises `UsageError` for
            any other `view_count`.
        reads_summary: whether the loss trains the summary; true by default.
        draws_per_image: whether random numbers are drawn for each image, so that the losses depend on the order of the
            batch; false by default.
        blind_loss_is_chance: whether the loss equals the chance level if all parameters are 0; true by default.
    """

    def __call__(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Compute the losses of a batch of views, by name."""
        ...


class EncoderInfo(TypedDict):
    """Constructor arguments that an objective can request from the encoder and decoder of a run."""

    channels: tuple[int, ...]
    summary_channels: int
    spatial_dims: int
    grids: tuple[tuple[int, ...], ...]
    in_channels: int
    input_shape: tuple[int, ...]
    decoded_channels: int
    receptive_fields: tuple[int, ...]
    origins: tuple[float, ...]
    strides: tuple[int, ...]


def encoder_info(
    encoder: Any, decoder: Any, *, in_channels: int, spatial_dims: int, input_shape: tuple[int, ...]
) -> EncoderInfo:
    """Collect the constructor arguments that an objective can request from the encoder and decoder of a run.

    Args:
        encoder: encoder that computes the features; see `medim.models.encoders.Encoder`.
        decoder: decoder of the run, or None.
        in_channels: number of image channels.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the views.

    Returns:
        Keyword arguments for `build_from_section`, which passes to each objective the ones in its signature.
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
        "origins": encoder.origins,
        "strides": encoder.strides,
    }
