"""Mutual-information map: agreement of each voxel with the summary of its image, scored by the pretraining critic.

Objectives with `feature_level` and `score_map(features)` support this map. Pretraining saves the first of them as
`encoder/critic.safetensors` and `critic.json`; the key `objective` contains its configuration section.
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
from medim.renamed_keys import translate_section
from medim.types import UserError


class MutualInformationMap(nn.Module):
    """Map an image to a score per voxel.

    Args:
        encoder: the encoder.
        objective: objective with the critic that was trained with this encoder.
        spec: content of `critic.json`.
    """

    def __init__(self, encoder: nn.Module, objective: nn.Module, spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.objective: Any = objective
        self.spec = spec

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores (N, 1, ...) on the grid of (N, in_channels, ...) images, interpolated linearly between cells."""
        scores = self.objective.score_map(self.encoder(image))
        level = self.objective.feature_level
        origin, stride = self.encoder.origins[level], self.encoder.strides[level]
        for axis, size in enumerate(image.shape[2:], start=2):
            weights = interpolation_weights(size, scores.shape[axis], origin, stride).to(scores)
            scores = (scores.movedim(axis, -1) @ weights).movedim(-1, axis)
        return scores


def interpolation_weights(size: int, cells: int, origin: float, stride: int) -> torch.Tensor:
    """Weights (cells, size) of a linear interpolation from the cells to all voxels of an axis.

    Cell c has its centre at voxel `origin + c * stride`. Voxels beyond the outermost cells get the outermost value.
    """
    voxel, cell = (torch.arange(n, dtype=torch.float32) for n in (size, cells))
    voxel = (voxel - origin) / stride  # position in cells, relative to the first
    return (1 - (voxel.clamp(cell[0], cell[-1]) - cell[:, None]).abs()).clamp_min(0)


def load_score_map(path: Path) -> MutualInformationMap | None:
    """Load the encoder of a run with its critic, in evaluation mode; None if the run has no critic.

    Raises:
        UserError: there is no run at `path`, or its files are damaged.
    """
    folder = locate_weights(path)[0].parent
    if not (folder / "critic.json").is_file():
        return None
    spec = read_json(folder / "critic.json")
    section = spec.get("objective")
    if isinstance(section, str):  # runs of early versions contain the name only
        return None
    if not isinstance(section, dict):
        value = "no such key" if section is None else repr(section)[:100]
        raise UserError(
            f"{folder / 'critic.json'}: expected a mapping as 'objective', got {value}. Copy the file again."
        )
    encoder: Any = load_encoder(path)
    view_options = {"in_channels": encoder.spec.in_channels, "spatial_dims": encoder.spec.spatial_dims}
    build_options = encoder_info(encoder, None, **view_options, input_shape=encoder.spec.input_shape)
    section = translate_section(section, warn=False)  # earlier versions wrote old names
    try:
        objective = build_from_section(OBJECTIVES, section, **build_options)
    except UserError as error:
        raise UserError(f"{folder / 'critic.json'}: {error} Copy the file again.") from error
    load_weights(objective, verify_sha256(folder / "critic.safetensors", str(spec.get("sha256"))))
    return MutualInformationMap(encoder, objective, spec).eval()
