"""Contrastive predictive coding: predict lower rows of a map from upper rows (van den Oord et al. 2018, 1807.03748)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medim.config import Size, SizeOrZero
from medim.models.cpc_context import CONTEXT_NETWORKS
from medim.models.layers import check_level
from medim.objectives.objective import Encode, Term
from medim.types import UsageError, Views


class CPC(nn.Module):
    """Predict the local features some rows further down, by classification among the local features of the whole batch.

    The first axis of a map is read downwards: rows in 2D, slabs in 3D. From the context of row r, a linear layer W_k
    predicts the local feature at row r + k in the same column, for k = skip + 1, ..., skip + steps. The score of a
    local feature is its dot product with the prediction (eq. 3 of the paper), and the loss is InfoNCE (eq. 4), averaged
    over steps. The classes are all local features of the batch at the predicted rows, including those of the same image
    (Henaff et al. 2020, 1905.09272): N * L classes, so N * L squared scores per step. `negatives` draws a subset
    instead, as in Lowe et al. 2019 (1905.11786), the source of the default steps, skip and context network.

    If the receptive fields of row r and row r + k overlap, the target can be read from the input, and little is learnt.
    The encoder of the paper encodes separate crops (`patches`); with any other, set `skip` by `receptive_field()`. CPC
    trains maps and leaves the summary at its initialisation: probe the maps. Use one view per image; a second view
    counts as another image.

    Args:
        channels: channels of the encoder's maps.
        spatial_dims: 2 or 3.
        grids: grid of each map at the training shape.
        feature_level: index of the map of the local features; negative values count from the coarsest map.
        steps: number of rows to predict from each row; fewer at the end of the grid.
        skip: number of rows to skip below the context, because their receptive fields overlap with it.
        layers: gated convolutions of the context network; each extends its reach by one row upwards.
        context: `vertical`, the vertical stack of the gated PixelCNN, or `pixelcnn`, both stacks as in Lowe et al.
        negatives: local features drawn with replacement for each prediction, except its own; 0 uses all.
        scale_scores: divide scores by sqrt(channels), as AMDIM does.
    """

    reads_summary = False

    def __init__(
        self,
        channels: tuple[int, ...],
        spatial_dims: int,
        grids: tuple[tuple[int, ...], ...],
        *,
        feature_level: int = -1,
        steps: Size = 5,
        skip: SizeOrZero = 1,
        layers: Size = 4,
        context: Literal["vertical", "pixelcnn"] = "vertical",
        negatives: SizeOrZero = 0,
        scale_scores: bool = False,
    ) -> None:
        super().__init__()
        self._level = level = check_level("cpc.feature_level", feature_level, len(channels))
        self._grid = grids[level]
        self._offsets = range(skip + 1, min(skip + steps, self._grid[0] - 1) + 1)
        if skip < 0 or not self._offsets:
            raise UsageError(
                f"cpc: nothing to predict on map {level}, a grid of {self._grid}, with steps {steps} and skip {skip}. "
                f"Expected steps of 1 or more, skip of 0 or more, and at least skip + 2 = {skip + 2} rows: "
                "choose a finer level, larger views or a smaller skip."
            )
        if negatives < 0:
            raise UsageError(f"cpc.negatives: expected 0 (all) or more, got {negatives}.")
        width = channels[level]
        self._negatives = negatives
        self._scale = width**-0.5 if scale_scores else 1.0
        self.context = CONTEXT_NETWORKS[context](spatial_dims, width, layers=layers)
        self.predict = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in self._offsets)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `cpc`: cross-entropy in nats, mean over steps; chance is the mean of log(classes)."""
        local = encode.clean.maps[self._level]  # (N, C, rows, ...)
        if local.shape[2:] != self._grid:
            raise ValueError(f"cpc: built for a grid of {self._grid}, got {tuple(local.shape[2:])}.")
        context = self.context(local)
        losses, hits, chances = [], [], []
        for k, predict in zip(self._offsets, self.predict, strict=True):
            prediction, target = predict(flatten_cells(context[:, :, :-k])), flatten_cells(local[:, :, k:])
            others = draw_others(len(target), self._negatives, encode.generator) if self._negatives else None
            with torch.autocast(local.device.type, enabled=False):
                scores, target_class = score_predictions(prediction.float() * self._scale, target.float(), others)
                losses.append(cross_entropy(scores, target_class))
            hits.append((scores.detach().argmax(dim=1) == target_class).float().mean())
            chances.append(math.log(scores.shape[1]))
        loss, chance = torch.stack(losses).mean(), sum(chances) / len(chances)
        return {"cpc": Term(loss, chance, {"bound": chance - loss.detach(), "retrieval": torch.stack(hits).mean()})}


def flatten_cells(map_: torch.Tensor) -> torch.Tensor:
    """Flatten the cells of a map, image by image: (N, C, ...) to (N * L, C)."""
    return map_.flatten(2).transpose(1, 2).flatten(0, 1)


def score_predictions(
    prediction: torch.Tensor, target: torch.Tensor, others: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score local features by their dot product with predictions; the scores are the logits of InfoNCE.

    Args:
        prediction: (M, C).
        target: (M, C), the correct local feature of each prediction.
        others: (M, n), indices of the negative targets of each prediction; None: all except its own.

    Returns:
        Scores (M, classes), and the index of the correct class (M,).
    """
    if others is None:
        return prediction @ target.T, torch.arange(len(target), device=target.device)
    own_indices = torch.arange(len(target)).unsqueeze(1)
    classes = target[torch.cat([own_indices, others], dim=1).to(target.device)]  # (M, 1 + n, C)
    return torch.einsum("mc,mkc->mk", prediction, classes), own_indices.new_zeros(len(target)).to(target.device)


def draw_others(count: int, number: int, generator: torch.Generator) -> torch.Tensor:
    """For each of `count` (2 or more) items, draw `number` others with replacement, never itself: (count, number)."""
    indices = torch.randint(count - 1, (count, number), generator=generator)
    return indices + (indices >= torch.arange(count).unsqueeze(1))
