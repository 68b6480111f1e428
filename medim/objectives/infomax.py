"""Deep InfoMax: maximise the mutual information of features and summary (Hjelm et al. 2019, arXiv 1808.06670).

DIM(L+G) of the paper is `local_dim` and `global_dim` in one run, with beta and alpha (eq. 8) as their weights.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from medim.config import Section, build_from_section
from medim.models.critics import CRITICS
from medim.models.layers import build_unpadded_conv, check_level
from medim.objectives.contrastive_term import contrastive_term
from medim.objectives.foreground import find_foreground_cells
from medim.objectives.mutual_information import EstimatorName, NegativeScheme
from medim.objectives.objective import Encode, Term
from medim.objectives.occlusion import OcclusionBlock, block_size, encode_occluded
from medim.types import Features, UsageError, Views


class LocalDIM(nn.Module):
    """DIM(L): maximise the mutual information of each location of a map and the summary (eq. 6 of the paper).

    With two views, the summary of each view is paired with the map of the other view. With `occlusion`, the summary is
    computed from an image with a hidden part, and the local features from the full image (section 4.3).

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        input_shape: spatial shape of the views.
        receptive_fields: side of the receptive field of a cell of each map, in voxels.
        origins: centre of the first cell of each map, in voxels.
        strides: distance between the cells of each map, in voxels.
        estimator: mutual-information bound: infonce, jsd or dv.
        feature_level: index of the map of the local features (default 1, the second map, as in the paper); negative
            values count from the coarsest map.
        summary_level: index of a map with a summary in each cell (the multiple globals of the paper); none: the single
            summary of the encoder.
        critic: section of CRITICS.
        negatives: locations that a summary is contrasted with: all locations of all other images (all, as in the
            paper), those of the next image in the batch (rolled), or each from one randomly drawn other image
            (permuted).
        foreground: minimum foreground share of a location; locations below it are used neither as positives nor as
            negatives; none uses all locations.
        batch_norm_summary: apply batch normalisation without affine parameters to the summary before the critic;
            preserves the differences between images when another objective pulls the summary towards a position code
            (docs/results.md).
        score_penalty: weight of the mean squared score (AMDIM: 0.04); prevents diverging scores late in training.
        occlusion: side, in voxels, of the block that stays visible and of the block that is hidden; 0 disables
            occlusion, receptive_field uses the receptive field of a local feature, as in the paper.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        input_shape: tuple[int, ...],
        receptive_fields: tuple[int, ...],
        origins: tuple[float, ...],
        strides: tuple[int, ...],
        *,
        estimator: EstimatorName = "jsd",
        feature_level: int = 1,
        summary_level: int | None = None,
        critic: Section = {"name": "encode_and_dot"},  # noqa: B006  (never changed; shown by `medim config show`)
        negatives: NegativeScheme = "all",
        foreground: float | None = None,
        batch_norm_summary: bool = False,
        score_penalty: float = 0.0,
        occlusion: OcclusionBlock = 0,
    ) -> None:
        super().__init__()
        self._level = level = check_level("local_dim.feature_level", feature_level, len(channels))
        if summary_level is not None:
            summary_level = check_level("local_dim.summary_level", summary_level, len(channels))
            summary_channels = channels[summary_level]
        if foreground is not None and not 0 < foreground <= 1:
            raise UsageError(f"local_dim.foreground: expected a share above 0 and at most 1, got {foreground}.")
        self._summary_level = summary_level
        self.reads_summary = summary_level is None
        self._foreground = foreground
        self._origin, self._stride = origins[level], strides[level]
        self._block = block_size(occlusion, input_shape, receptive_fields, level)
        self._contrast = partial(
            contrastive_term, estimator=estimator, negatives=negatives, score_penalty=score_penalty
        )
        # saved weights contain the name of this attribute
        self._standardise = nn.BatchNorm1d(summary_channels, affine=False) if batch_norm_summary else nn.Identity()
        self.critic: Any = build_from_section(
            CRITICS, critic, channels=channels[level], summary_channels=summary_channels
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `local_dim`: cross-entropy for infonce (chance: log of classes), else minus the bound (chance: 0)."""
        local = encode.clean.maps[self._level]  # (N, C, ...)
        grid, foreground_mask = tuple(local.shape[2:]), None
        if self._foreground is not None:
            foreground_mask = find_foreground_cells(
                views.image.flatten(0, 1), grid, self._foreground, origin=self._origin, stride=self._stride
            )
        summary = self._make_summaries(encode_occluded(encode, views, self._block))
        return {"local_dim": self._contrast(self.critic, local.flatten(2), summary, encode, views, foreground_mask)}

    def _make_summaries(self, features: Features) -> torch.Tensor:
        """Compute the summaries (N, S, G) of a batch."""
        level = self._summary_level
        summary = features.summary.unsqueeze(-1) if level is None else features.maps[level].flatten(2)
        output: torch.Tensor = self._standardise(summary)
        return output

    @property
    def feature_level(self) -> int:
        """Index of the map of the local features; 0 is the finest."""
        return self._level

    def score_map(self, features: Features) -> torch.Tensor:
        """Score every location of N images against the summary of its own image: (N, 1, *grid of the local map)."""
        map_ = features.maps[self._level]
        count, _, *grid = map_.shape
        scores, _ = self.critic(map_.flatten(2), self._make_summaries(features))  # (N, G, N, L)
        indices = torch.arange(count, device=map_.device)
        return scores[indices, :, indices].mean(dim=1).reshape(count, 1, *grid)


class GlobalDIM(nn.Module):
    """DIM(G): maximise the mutual information of a whole map and the summary (section 3.1 and figure 2 of the paper).

    Views, occlusion and bounds are as in `LocalDIM`, with one local feature per image: its flattened map.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        spatial_dims: 2 or 3.
        grids: grid of each map at the training shape.
        input_shape: spatial shape of the views.
        receptive_fields: side of the receptive field of a cell of each map, in voxels.
        estimator: mutual-information bound: infonce, jsd or dv.
        feature_level: index of the map; negative values count from the coarsest map.
        reduce: channels of unpadded 3x3 convolutions with ReLU between them, applied to the map before it is flattened;
            empty in the paper, 64 and 32 in most tutorials.
        critic: section of CRITICS; the default is the paper's network of 512, 512 and 1 units.
        negatives: maps that a summary is contrasted with: those of all other images (all), of the next image in the
            batch (rolled), or of one randomly drawn other image (permuted).
        batch_norm_summary: apply batch normalisation without affine parameters to the summary before the critic.
        score_penalty: weight of the mean squared score (AMDIM: 0.04).
        occlusion: side, in voxels, of the block that stays visible and of the block that is hidden; 0 disables
            occlusion, receptive_field uses the receptive field of a cell of the map.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        spatial_dims: int,
        grids: tuple[tuple[int, ...], ...],
        input_shape: tuple[int, ...],
        receptive_fields: tuple[int, ...],
        *,
        estimator: EstimatorName = "jsd",
        feature_level: int = -1,
        reduce: tuple[int, ...] = (),
        critic: Section = {"name": "concat_and_convolve"},  # noqa: B006  (never changed)
        negatives: NegativeScheme = "all",
        batch_norm_summary: bool = False,
        score_penalty: float = 0.0,
        occlusion: OcclusionBlock = 0,
    ) -> None:
        super().__init__()
        self._level = level = check_level("global_dim.feature_level", feature_level, len(channels))
        grid = tuple(side - 2 * len(reduce) for side in grids[level])
        if min(grid) < 1:
            raise UsageError(
                f"global_dim.reduce: the map is too small for {len(reduce)} unpadded 3x3 convolutions, "
                f"got a grid of {grids[level]}. Use fewer convolutions or a finer level."
            )
        self._block = block_size(occlusion, input_shape, receptive_fields, level)
        self._contrast = partial(
            contrastive_term, estimator=estimator, negatives=negatives, score_penalty=score_penalty
        )
        # saved weights contain the name of this attribute
        self._standardise = nn.BatchNorm1d(summary_channels, affine=False) if batch_norm_summary else nn.Identity()
        widths = (channels[level], *reduce)
        layers = [m for w in pairwise(widths) for m in (nn.ReLU(), build_unpadded_conv(spatial_dims, *w))]
        self.flatten = nn.Sequential(*layers[1:], nn.Flatten())
        length = widths[-1] * math.prod(grid)
        self.critic: Any = build_from_section(CRITICS, critic, channels=length, summary_channels=summary_channels)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `global_dim`: cross-entropy for infonce (chance: log of classes), else minus the bound (chance: 0)."""
        local = self.flatten(encode.clean.maps[self._level]).unsqueeze(-1)  # (N, C, 1)
        summary = self._standardise(encode_occluded(encode, views, self._block).summary).unsqueeze(-1)
        return {"global_dim": self._contrast(self.critic, local, summary, encode, views)}
