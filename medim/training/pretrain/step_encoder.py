"""Encoder interface of the objectives during one step."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from medim.training.engine.gather import GatheredFeatures, GatheredViews
from medim.training.engine.gradient_cache import encode_in_chunks
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.types import Features, UsageError, Views


class StepEncoder:
    """Encoder (and decoder) of one step; the clean features are computed once and shared by all objectives.

    Images and features are those of the global batch. In a run of several processes, each process computes an equal,
    contiguous part of the images, and the parts are gathered.

    Args:
        encoder: encoder being trained.
        decoder: decoder being trained, or None.
        views: batch of the step, of all processes.
        generator: random generator of the step, the same in all processes.
        group: the processes of the run.
        chunk: images per chunk; see `medim.training.engine.gradient_cache`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        views: Views,
        generator: torch.Generator,
        group: ProcessGroup = SINGLE_PROCESS,
        *,
        chunk: int | None = None,
    ) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._views = views
        self._group = group
        self.generator = generator
        self._chunk = chunk

    @cached_property
    def clean(self) -> Features:
        """Features of the B * V unchanged views; the views of an image are adjacent."""
        if not isinstance(self._views, GatheredViews):
            return self(self._views.image.flatten(0, 1))
        own = self._views.own.image.flatten(0, 1)
        return self._gather_features(self._encode_local(own), len(own) * self._group.count)

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode images (N, C, ...)."""
        return self._gather_features(self._encode_local(self._group.local_shard(image)), len(image))

    def decode(self, features: Features) -> torch.Tensor:
        """Decode features to one map (N, out_channels, ...) on the grid of the image.

        Raises:
            UsageError: the configuration has no decoder.
        """
        if self._decoder is None:
            raise UsageError(
                "this objective needs a decoder; add one to the configuration, for example decoder: {name: unet}."
            )
        if self._group.count == 1:
            own, count = features, 0
        elif isinstance(features, GatheredFeatures):
            own, count = features.own, features.count
        else:
            take_shard = self._group.local_shard
            own, count = (
                Features(tuple(map(take_shard, features.maps)), take_shard(features.summary)),
                len(features.summary),
            )
        return self._gather_tensor(encode_in_chunks(self._decoder, own, self._chunk).maps[0], count)

    def _encode_local(self, image: torch.Tensor) -> Features:
        """Encode the images of this process; all calls of the encoder go through this method."""
        return encode_in_chunks(self._encoder, image, self._chunk)

    def _gather_features(self, own: Features, count: int) -> Features:
        """Build the features of `count` images from the part that this process has encoded."""
        return own if self._group.count == 1 else GatheredFeatures(own, count, self._gather_tensor)

    def _gather_tensor(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """Gather (count, ...), without the entries repeated as padding; `part` itself in a run of one process."""
        return part if self._group.count == 1 else self._group.gather(part)[:count]
