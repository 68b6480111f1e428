"""MLflow model of an encoder: loaded from safetensors and JSON, never from a pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from medim.models.serialization import load_encoder
from medim.types import Array


class EncoderPyfunc:
    """Model that computes summaries of images preprocessed by the steps in `encoder.json`.

    Args:
        folder: folder with `encoder.safetensors` and `encoder.json`.
    """

    def __init__(self, folder: Path) -> None:
        self._encoder = load_encoder(folder)

    def predict(self, images: Array, params: dict[str, object] | None = None) -> Array:
        """Compute the summaries (N, summary_channels) float32 of images (N, C, ...)."""
        with torch.no_grad():
            summary = self._encoder(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))).summary
        return np.asarray(summary.numpy(), dtype=np.float32)


def load_encoder_pyfunc(folder: Path) -> EncoderPyfunc:
    """Load the encoder of a folder."""
    return EncoderPyfunc(folder)


def _load_pyfunc(path: str) -> EncoderPyfunc:
    """Load the model; MLflow calls this function by its name."""
    return load_encoder_pyfunc(Path(path))
