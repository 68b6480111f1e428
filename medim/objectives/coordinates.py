"""Predict the absolute or relative position of a local feature (Hjelm et al. 2019, section 4.3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medim.config import SizeOrZero
from medim.models.layers import check_level
from medim.objectives.objective import Encode, Term
from medim.types import Views


class Coordinates(nn.Module):
    """Classify the position of a location along each axis of the grid, from the local feature and the summary.

    With `relative`, the offset from a second location is classified instead, from both local features and the summary.
    Each image has one random source location, and an axis of M cells has 2 M - 1 offsets. The predictor has two hidden
    layers with BN and ReLU (512 units in the paper) and one softmax per axis; cross-entropies are summed over axes.
    Grids need not be square.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        grids: grid of each map at the training shape.
        kind: absolute positions on the grid, or positions relative to a source location.
        feature_level: index of the map of the local features; negative values count from the coarsest map.
        hidden: width of the two hidden layers.
        points: number of locations drawn per image; 0 uses all, as in the paper.
        use_summary: give the summary to the predictor. If false, the objective cannot turn the summary into a position
            code, which on small registered volumes prevents DIM(L) from learning (docs/results.md).
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        grids: tuple[tuple[int, ...], ...],
        *,
        kind: Literal["absolute", "relative"] = "absolute",
        feature_level: int = 1,
        hidden: SizeOrZero = 512,
        points: SizeOrZero = 0,
        use_summary: bool = True,
    ) -> None:
        super().__init__()
        self._level = level = check_level("coordinates.feature_level", feature_level, len(channels))
        self._grid = grid = grids[level]
        self._relative = relative = kind == "relative"
        self.draws_per_image = relative
        self.blind_loss_is_chance = not relative  # offsets are not equally frequent
        self._points = points
        self._use_summary = self.reads_summary = use_summary
        self._classes = [2 * cells - 1 if relative else cells for cells in grid]
        self._chance = sum(compute_offset_entropy(cells) if relative else math.log(cells) for cells in grid)
        width = channels[level] * (2 if relative else 1) + (summary_channels if use_summary else 0)
        self.predictor = nn.Sequential(
            *(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
            *(nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
            nn.Linear(hidden, sum(self._classes)),
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `coordinates`: cross-entropy in nats; chance is the loss of the best uninformed guess, summed over axes.

        Chance is log(cells) for absolute positions. Offsets are not equally frequent, see `compute_offset_entropy`.
        """
        local = encode.clean.maps[self._level]  # (N, C, ...)
        if local.shape[2:] != self._grid:
            raise ValueError(f"coordinates: built for a grid of {self._grid}, got {tuple(local.shape[2:])}.")
        cells, count = math.prod(self._grid), len(local)
        if self._points and self._points < cells:
            index = torch.rand(count, cells, generator=encode.generator).argsort(dim=1)[:, : self._points]
        else:
            index = torch.arange(cells).expand(count, -1)  # (N, points)
        flat = local.flatten(2).transpose(1, 2)  # (N, L, C)
        positions = torch.cartesian_prod(*(torch.arange(side) for side in self._grid))  # (L, dims)
        target, inputs = positions[index], [_gather_locations(flat, index)]
        if self._relative:
            source = torch.randint(cells, (count, 1), generator=encode.generator).expand_as(index)
            target = target - positions[source] + (torch.tensor(self._grid) - 1)  # 0 to 2 M - 2
            inputs.append(_gather_locations(flat, source))
        if self._use_summary:
            inputs.append(encode.clean.summary.unsqueeze(1).expand(-1, index.shape[1], -1))
        logits = self.predictor(torch.cat(inputs, dim=2).flatten(0, 1)).float().split(self._classes, dim=1)
        targets = target.flatten(0, 1).to(local.device).unbind(dim=1)  # (N * points,) per axis
        loss = torch.stack(
            [cross_entropy(axis, axis_target) for axis, axis_target in zip(logits, targets, strict=True)]
        ).sum()
        return {"coordinates": Term(loss, self._chance)}


def compute_offset_entropy(cells: int) -> float:
    """Entropy, in nats, of the offset between two independent uniform positions on an axis: the loss of a blind guess.

    Offset d has probability (cells - |d|) / cells^2, so the entropy is less than log(2 cells - 1).
    """
    shares = [(cells - abs(offset)) / cells**2 for offset in range(1 - cells, cells)]
    return -sum(share * math.log(share) for share in shares)


def _gather_locations(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick locations (N, points) of (N, L, C)."""
    return flat.gather(1, index.to(flat.device).unsqueeze(-1).expand(-1, -1, flat.shape[2]))
