"""An encoder as MLflow's generic Python model: loaded from safetensors and JSON, never from a pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from medim.models.serialization import load_encoder
from medim.types import Array


class EncoderPyfunc:
    """Gives the summary of images that went through the steps in `encoder.json`.

    Args:
        folder: holds `encoder.safetensors` and `encoder.json`.
    """

    def __init__(self, folder: Path) -> None:
        self._encoder = load_encoder(folder)

    def predict(self, images: Array, params: dict[str, object] | None = None) -> Array:
        """Summaries (N, summary_channels) float32 of images (N, C, ...)."""
        with torch.no_grad():
            summary = self._encoder(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))).summary
        return np.asarray(summary.numpy(), dtype=np.float32)


def load_encoder_pyfunc(folder: Path) -> EncoderPyfunc:
    """The encoder of a folder."""
    return EncoderPyfunc(folder)


def _load_pyfunc(path: str) -> EncoderPyfunc:
    """What MLflow calls."""
    return load_encoder_pyfunc(Path(path))
