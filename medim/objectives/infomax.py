"""Deep InfoMax: maximise the mutual information of features and summary (Hjelm et al. 2019, arXiv 1808.06670).

The paper's DIM(L+G) is `local_dim` and `global_dim` in one run, their weights its beta and alpha (eq. 8).
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
from medim.objectives.foreground import find_foreground_cells as foreground_cells
from medim.objectives.mutual_information import EstimatorName, NegativeScheme
from medim.objectives.objective import Encode, Term
from medim.objectives.occlusion import OcclusionBlock, block_size, encode_occluded
from medim.types import Features, UsageError, Views


class LocalDIM(nn.Module):
    """DIM(L): every location of a map against the summary (eq. 6 of the paper).

    With two views the summary of each meets the map of the other. With `occlusion` the summary is made from an image
    of which a part is hidden, while the locals come from the full one (section 4.3).

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        input_shape: spatial shape of the views.
        receptive_fields: side of what a cell of each map sees, in voxels.
        estimator: the bound: infonce, jsd or dv.
        level: which map gives the locals (1: the second, the paper's choice); below 0: from the coarsest.
        summary_level: a map whose every cell is a summary of its own (the paper's multiple globals); none: the
            encoder's one summary.
        critic: section of CRITICS.
        negatives: what a summary is contrasted with: all locations of all other images (all, the paper), of the next
            image in the batch (rolled), or at each location of one other image, drawn anew (permuted).
        foreground: leave out locations of which less than this share lies above the background, in both roles; none
            leaves out nothing.
        standardise: batch-standardise the summary without affine parameters before the critic; keeps what differs
            between images alive when another objective pulls the summary towards a position code (docs/results.md).
        score_penalty: weight of the mean squared score (AMDIM: 0.04), which keeps scores from running away late in
            training.
        occlusion: side, in voxels, of the block that stays visible and of the one that is hidden; 0 hides nothing,
            receptive_field takes what one local sees, as the paper does.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        input_shape: tuple[int, ...],
        receptive_fields: tuple[int, ...],
        *,
        estimator: EstimatorName = "jsd",
        level: int = 1,
        summary_level: int | None = None,
        critic: Section = {"name": "encode_and_dot"},  # noqa: B006  (never changed; shown by `medim config show`)
        negatives: NegativeScheme = "all",
        foreground: float | None = None,
        standardise: bool = False,
        score_penalty: float = 0.0,
        occlusion: OcclusionBlock = 0,
    ) -> None:
        super().__init__()
        self._level = level = check_level("local_dim.level", level, len(channels))
        if summary_level is not None:
            summary_level = check_level("local_dim.summary_level", summary_level, len(channels))
            summary_channels = channels[summary_level]
        if foreground is not None and not 0 < foreground <= 1:
            raise UsageError(f"local_dim.foreground: expected a share above 0 and at most 1, got {foreground}.")
        self._summary_level = summary_level
        self.reads_summary = summary_level is None
        self._foreground = foreground
        self._block = block_size(occlusion, input_shape, receptive_fields, level)
        self._contrast = partial(
            contrastive_term, estimator=estimator, negatives=negatives, score_penalty=score_penalty
        )
        self._standardise = nn.BatchNorm1d(summary_channels, affine=False) if standardise else nn.Identity()
        self.critic: Any = build_from_section(
            CRITICS, critic, channels=channels[level], summary_channels=summary_channels
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `local_dim`: cross-entropy for infonce (chance: log of classes), else minus the bound (chance: 0)."""
        local = encode.clean.maps[self._level]  # (N, C, ...)
        grid, foreground_mask = tuple(local.shape[2:]), None
        if self._foreground is not None:
            foreground_mask = foreground_cells(views.image.flatten(0, 1), grid, self._foreground)  # (N, L)
        summary = self._make_summaries(encode_occluded(encode, views, self._block))
        return {"local_dim": self._contrast(self.critic, local.flatten(2), summary, encode, views, foreground_mask)}

    def _make_summaries(self, features: Features) -> torch.Tensor:
        """(N, S, G)."""
        level = self._summary_level
        summary = features.summary.unsqueeze(-1) if level is None else features.maps[level].flatten(2)
        output: torch.Tensor = self._standardise(summary)
        return output

    @property
    def level(self) -> int:
        """The map that gives the locals, 0 the finest."""
        return self._level

    def score_map(self, features: Features) -> torch.Tensor:
        """Score every location of N images against the summary of its own image: (N, 1, *grid of the local map)."""
        map_ = features.maps[self._level]
        count, _, *grid = map_.shape
        scores, _ = self.critic(map_.flatten(2), self._make_summaries(features))  # (N, G, N, L)
        indices = torch.arange(count, device=map_.device)
        return scores[indices, :, indices].mean(dim=1).reshape(count, 1, *grid)


class GlobalDIM(nn.Module):
    """DIM(G): the whole of a map against the summary (section 3.1 and figure 2 of the paper).

    Views, occlusion and bound are those of `LocalDIM`, with one local an image: its map, flattened.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        spatial_dims: 2 or 3.
        grids: grid of each map at the training shape.
        input_shape: spatial shape of the views.
        receptive_fields: side of what a cell of each map sees, in voxels.
        estimator: the bound: infonce, jsd or dv.
        level: which map; below 0: from the coarsest.
        reduce: channels of unpadded 3x3 convolutions, ReLU between them, that the map goes through before it is
            flattened; none in the paper, 64 and 32 in most tutorials.
        critic: section of CRITICS; the default is the paper's network of 512, 512 and 1 units.
        negatives: what a summary is contrasted with: the maps of all other images (all), of the next image in the batch
            (rolled), or of one other image, drawn anew (permuted).
        standardise: batch-standardise the summary without affine parameters before the critic.
        score_penalty: weight of the mean squared score (AMDIM: 0.04).
        occlusion: side, in voxels, of the block that stays visible and of the one that is hidden; 0 hides nothing,
            receptive_field takes what one cell of the map sees.
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
        level: int = -1,
        reduce: tuple[int, ...] = (),
        critic: Section = {"name": "concat_and_convolve"},  # noqa: B006  (never changed)
        negatives: NegativeScheme = "all",
        standardise: bool = False,
        score_penalty: float = 0.0,
        occlusion: OcclusionBlock = 0,
    ) -> None:
        super().__init__()
        self._level = level = check_level("global_dim.level", level, len(channels))
        grid = tuple(side - 2 * len(reduce) for side in grids[level])
        if min(grid) < 1:
            raise UsageError(
                f"global_dim.reduce: expected a map for which {len(reduce)} unpadded 3x3 convolutions leave something, "
                f"got one of {grids[level]}. Use fewer, or a finer level."
            )
        self._block = block_size(occlusion, input_shape, receptive_fields, level)
        self._contrast = partial(
            contrastive_term, estimator=estimator, negatives=negatives, score_penalty=score_penalty
        )
        self._standardise = nn.BatchNorm1d(summary_channels, affine=False) if standardise else nn.Identity()
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
