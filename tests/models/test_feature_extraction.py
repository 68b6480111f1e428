"""Features of many images."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from medim.models.feature_extraction import extract_features
from medim.types import Features


class Sums(nn.Module):
    """The mean of each channel, doubled in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: torch.Tensor) -> Features:
        return Features(maps=(), summary=image.flatten(2).mean(2) * self.weight * (2 if self.training else 1))


def test_extract_keeps_the_order_of_the_batches_and_the_mode_of_the_encoder() -> None:
    encoder = Sums().train()
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    features = extract_features(encoder, [images[:2], images[2:]])
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, np.repeat(np.arange(5.0)[:, None], 3, axis=1))
    assert encoder.training


def test_extract_of_nothing_is_empty() -> None:
    assert extract_features(Sums(), []).shape == (0, 0)
