"""The encoder as objectives see it during one step."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from medim.training.chunks import in_chunks
from medim.types import Features, UsageError, Views


class StepEncode:
    """Encodes (and decodes) for one step; the clean features are computed once and shared by all objectives.

    Args:
        encoder: the encoder under training.
        decoder: the decoder under training, where the run has one.
        views: the step's batch.
        generator: the step's randomness.
        chunk: images a chunk; see `medim.training.chunks`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        views: Views,
        generator: torch.Generator,
        *,
        chunk: int | None = None,
    ) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._views = views
        self.generator = generator
        self._chunk = chunk

    @cached_property
    def clean(self) -> Features:
        """Features of the B * V views as they came, the views of an image side by side."""
        return self(self._views.image.flatten(0, 1))

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode (N, C, ...)."""
        return in_chunks(self._encoder, image, self._chunk)

    def decode(self, features: Features) -> torch.Tensor:
        """Decode features to one map (N, out_channels, ...) at the image's grid.

        Raises:
            UsageError: the run's config names no decoder.
        """
        if self._decoder is None:
            raise UsageError("this objective decodes; add a decoder to the config, for example decoder: {name: unet}.")
        return in_chunks(self._decoder, features, self._chunk).maps[0]
