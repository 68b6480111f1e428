"""Deep InfoMax: maximise the mutual information of local features and summary (Hjelm et al. 2019, arXiv 1808.06670)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from medim.config import Section, build
from medim.models.critics import CRITICS
from medim.models.layers import check_level
from medim.objectives.mutual_information import ESTIMATORS, EstimatorName, classes, retrieval
from medim.objectives.objective import Encode, Term
from medim.objectives.occlusion import check_block, draw_hidden, occlude
from medim.types import Features, Views


class LocalDIM(nn.Module):
    """DIM(L): every location of a map against the summary (eq. 6 of the paper).

    With two views the summary of each meets the map of the other. With `occlusion` the summary is made from an image
    of which a part is hidden, while the locals come from the full one (section 4.3).

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        input_shape: spatial shape of the views.
        estimator: the bound: infonce, jsd or dv.
        level: which map gives the locals (1: the second, the paper's choice); below 0: from the coarsest.
        critic: section of CRITICS.
        standardise: batch-standardise the summary without affine parameters before the critic; keeps what differs
            between images alive when another objective pulls the summary towards a position code (docs/results.md).
        score_penalty: weight of the mean squared score (AMDIM: 0.04), which keeps scores from running away late in
            training.
        occlusion: side, in voxels, of the block that stays visible and of the one that is hidden; 0 hides nothing.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        input_shape: tuple[int, ...],
        *,
        estimator: EstimatorName = "jsd",
        level: int = 1,
        critic: Section = {"name": "encode_and_dot"},  # noqa: B006  (never changed; shown by `medim config show`)
        standardise: bool = False,
        score_penalty: float = 0.0,
        occlusion: int = 0,
    ) -> None:
        super().__init__()
        self._level = level = check_level("local_dim.level", level, len(channels))
        if occlusion:
            check_block(input_shape, occlusion)
        self._estimator = estimator
        self._penalty = score_penalty
        self._occlusion = occlusion
        self._standardise = nn.BatchNorm1d(summary_channels, affine=False) if standardise else nn.Identity()
        self.critic: Any = build(CRITICS, critic, channels=channels[level], summary_channels=summary_channels)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `local_dim`: cross-entropy for infonce (chance: log of classes), else minus the bound (chance: 0)."""
        batch, count, _, *shape = views.image.shape
        if self._occlusion:
            hidden = draw_hidden(batch * count, tuple(shape), self._occlusion, encode.generator)
            summary = encode(occlude(views.image.flatten(0, 1), hidden)).summary
        else:
            summary = encode.clean.summary
        summary = self._standardise(summary).reshape(batch, count, -1)  # (B, V, S)
        map_ = encode.clean.maps[self._level]
        local = map_.reshape(batch, count, map_.shape[1], -1)  # (B, V, C, L)
        pairs = [(v, (v + 1) % count) for v in range(count)]
        scored = [self.critic(local[:, other], summary[:, view].unsqueeze(-1)) for view, other in pairs]
        bound = torch.stack([ESTIMATORS[self._estimator](scores) for scores, _ in scored]).mean()
        penalty = self._penalty * torch.stack([square for _, square in scored]).mean()
        chance = math.log(classes(scored[0][0])) if self._estimator == "infonce" else 0.0
        diagnostics = {
            "bound": bound.detach(),
            "retrieval": torch.stack([retrieval(scores) for scores, _ in scored]).mean(),
            "spread": spread(encode.clean.summary),
        }
        return {"local_dim": Term(chance - bound + penalty, chance, diagnostics)}

    @property
    def level(self) -> int:
        """The map that gives the locals, 0 the finest."""
        return self._level

    def score_map(self, features: Features) -> torch.Tensor:
        """Score every location of N images against the summary of its own image: (N, 1, *grid of the local map)."""
        map_ = features.maps[self._level]
        count, _, *grid = map_.shape
        scores, _ = self.critic(map_.flatten(2), self._standardise(features.summary).unsqueeze(-1))  # (N, G, N, L)
        own = torch.arange(count, device=map_.device)
        return scores[own, :, own].mean(dim=1).reshape(count, 1, *grid)


def spread(summary: torch.Tensor) -> torch.Tensor:
    """Standard deviation between images over the root mean square of the summary (N, S); 0 where all look the same."""
    summary = summary.detach().float()
    return summary.std(dim=0).square().mean().sqrt() / summary.square().mean().sqrt().clamp_min(1e-12)
