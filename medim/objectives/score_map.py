"""The mutual-information map: where an image agrees with its own summary, as the critic of its pretraining sees it.

An objective with `level` and `score_map(features)` can draw one; pretraining saves the first of them as
`encoder/critic.safetensors` and `critic.json`, whose `objective` is the section it is built from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from medim.config import build_from_section
from medim.files import read_json
from medim.models.serialization import load_encoder, load_weights, locate_weights, verify_sha256
from medim.objectives import OBJECTIVES
from medim.objectives.objective import encoder_info


class MutualInformationMap(nn.Module):
    """Image to score at every voxel.

    Args:
        encoder: the encoder.
        objective: the critic's, as trained with this encoder.
        spec: `critic.json`.
    """

    def __init__(self, encoder: nn.Module, objective: nn.Module, spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.objective: Any = objective
        self.spec = spec

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores (N, 1, ...) on the grid of (N, in_channels, ...) images; linear between the places of cells."""
        scores = self.objective.score_map(self.encoder(image))
        level = self.objective.level
        origin, stride = self.encoder.origins[level], self.encoder.strides[level]
        for axis, size in enumerate(image.shape[2:], start=2):
            weights = interpolation_weights(size, scores.shape[axis], origin, stride).to(scores)
            scores = (scores.movedim(axis, -1) @ weights).movedim(-1, axis)
        return scores


def interpolation_weights(size: int, cells: int, origin: float, stride: int) -> torch.Tensor:
    """Weights (cells, size) that bring values of cells, at voxels `origin + c * stride` of an axis, to all its voxels.

    Voxels beyond the outermost cells get the outermost value.
    """
    voxel, cell = (torch.arange(n, dtype=torch.float32) for n in (size, cells))
    voxel = (voxel - origin) / stride  # places in cells, from the first
    return (1 - (voxel.clamp(cell[0], cell[-1]) - cell[:, None]).abs()).clamp_min(0)


def load_score_map(path: Path) -> MutualInformationMap | None:
    """The encoder of a run with the critic saved beside it, in evaluation mode; None where there is none.

    Raises:
        UserError: no run lies at `path`, or its files are damaged.
    """
    folder = locate_weights(path)[0].parent
    spec = read_json(folder / "critic.json") if (folder / "critic.json").is_file() else {}
    if not isinstance(spec.get("objective"), dict):  # runs of early versions kept the name alone
        return None
    encoder: Any = load_encoder(path)
    view_options = {key: encoder.spec[key] for key in ("in_channels", "spatial_dims")}
    build_options = encoder_info(encoder, None, **view_options, input_shape=tuple(encoder.spec["input_shape"]))
    objective = build_from_section(OBJECTIVES, spec["objective"], **build_options)
    load_weights(objective, verify_sha256(folder / "critic.safetensors", spec["sha256"]))
    return MutualInformationMap(encoder, objective, spec).eval()
