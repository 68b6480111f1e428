"""Features for the out-of-distribution detector as an additional output of a network (`medim.inference.ood`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from medim.models.model import Model, to_numpy
from medim.types import Array, Features

OOD_FEATURES = "watched"  # name of the output


def ood_features(features: Features) -> torch.Tensor:
    """Concatenate the summary with the mean of every map over its grid: (N, summary_channels + sum of channels).

    The summary does not contain the information that its training discarded; the maps still contain it.
    """
    means = [map_.mean(tuple(range(2, map_.ndim))) for map_ in features.maps]
    return torch.cat([features.summary, *means], dim=1)


class WithOODFeatures(nn.Module):
    """Encoder or model with a flat tuple of outputs: its own outputs first, the out-of-distribution features last.

    Args:
        source: encoder (image to `Features`), or a `Model`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name of each output."""
        if isinstance(self.source, Model):
            return ("logits", OOD_FEATURES)
        encoder: Any = self.source
        return ("summary", *(f"map_{level}" for level in range(len(encoder.channels))), OOD_FEATURES)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs for (N, in_channels, ...) images: (logits, features), or (summary, *maps, features) of an encoder."""
        if isinstance(self.source, Model):
            features: Features = self.source.encoder(image)
            return self.source.logits(features), ood_features(features)
        features = self.source(image)
        return features.summary, *features.maps, ood_features(features)


def as_numpy_predictor(source: nn.Module) -> Callable[[Array], tuple[Array, Array]]:
    """Wrap an encoder or model as a function of numpy arrays (N, C, ...): its output, and OOD features (N, F)."""
    network = WithOODFeatures(source)
    device = next(source.parameters()).device

    def run_network(image: Array) -> tuple[Array, Array]:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(np.ascontiguousarray(image, np.float32)).to(device))
        answer, features = (to_numpy(out) for out in (outputs[0], outputs[-1]))
        return answer, features

    return run_network
