"""What the out-of-distribution guard looks at, as one more output of a network; see `medim.inference.ood`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from medim.models.model import Model
from medim.types import Array, Features

OOD_FEATURES = "watched"  # name of the output


def ood_features(features: Features) -> torch.Tensor:
    """The summary, joined by the mean of every map over its grid: (N, summary_channels + sum of channels).

    The summary alone does not tell what its training had it ignore; the maps still hold it.
    """
    means = [map_.mean(tuple(range(2, map_.ndim))) for map_ in features.maps]
    return torch.cat([features.summary, *means], dim=1)


class WithOODFeatures(nn.Module):
    """An encoder or a model with a flat tuple of outputs: the answer first, what is watched last.

    Args:
        source: image -> `Features`, or a `Model`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    @property
    def outputs(self) -> tuple[str, ...]:
        """A name for each output."""
        if isinstance(self.source, Model):
            return ("logits", OOD_FEATURES)
        encoder: Any = self.source
        return ("summary", *(f"map_{level}" for level in range(len(encoder.channels))), OOD_FEATURES)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(logits, watched) of a model, (summary, *maps, watched) of an encoder, for (N, in_channels, ...)."""
        if isinstance(self.source, Model):
            features: Features = self.source.encoder(image)
            return self.source.logits(features), ood_features(features)
        features = self.source(image)
        return features.summary, *features.maps, ood_features(features)


def as_numpy_predictor(source: nn.Module) -> Callable[[Array], tuple[Array, Array]]:
    """An encoder or model as a function of numpy arrays (N, C, ...): the answer, and what is watched (N, F)."""
    network = WithOODFeatures(source)
    device = next(source.parameters()).device

    def run_network(image: Array) -> tuple[Array, Array]:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(np.ascontiguousarray(image, np.float32)).to(device))
        answer, features = (np.asarray(out.float().cpu().numpy()) for out in (outputs[0], outputs[-1]))
        return answer, features

    return run_network
