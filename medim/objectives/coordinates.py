"""Predict where a local feature lies (Hjelm et al. 2019, section 4.3, absolute coordinates)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medim.models.layers import check_level
from medim.objectives.objective import Encode, Term
from medim.types import Views


class Coordinates(nn.Module):
    """Classify each axis of a location's place on the grid, from the local feature and the summary.

    Two hidden layers with BN and ReLU (the paper's are 512 wide), one softmax an axis, cross-entropies summed over
    axes. Grids need not be square.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        grids: grid of each map at the training shape.
        level: which map gives the locals; below 0: from the coarsest.
        hidden: width of the two hidden layers.
        points: locations drawn an image; 0 takes all, as the paper does.
        see_summary: give the summary to the predictor. Off, the objective cannot turn the summary into a position
            code, which on small registered volumes kills DIM(L) (docs/results.md).
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        grids: tuple[tuple[int, ...], ...],
        *,
        level: int = 1,
        hidden: int = 512,
        points: int = 0,
        see_summary: bool = True,
    ) -> None:
        super().__init__()
        self._level = level = check_level("coordinates.level", level, len(channels))
        self._grid = grids[level]
        self._points = points
        self._see_summary = see_summary
        width = channels[level] + (summary_channels if see_summary else 0)
        self.predictor = nn.Sequential(
            *(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
            *(nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
            nn.Linear(hidden, sum(self._grid)),
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `coordinates`: cross-entropy in nats; chance is the uniform guess's, log(cells) summed over axes."""
        local = encode.clean.maps[self._level]  # (N, C, ...)
        if local.shape[2:] != self._grid:
            raise ValueError(f"coordinates: built for a grid of {self._grid}, got {tuple(local.shape[2:])}.")
        axes = torch.meshgrid(*(torch.arange(cells) for cells in self._grid), indexing="ij")
        target = torch.stack([axis.flatten() for axis in axes])  # (dims, L)
        count = len(local)
        if self._points and self._points < target.shape[1]:
            index = torch.rand(count, target.shape[1], generator=encode.generator).argsort(dim=1)[
                :, : self._points
            ]  # (N, points)
        else:
            index = torch.arange(target.shape[1]).expand(count, -1)
        index_on_device = index.to(local.device)
        flat = local.flatten(2).transpose(1, 2)  # (N, L, C)
        x = flat.gather(1, index_on_device.unsqueeze(-1).expand(-1, -1, flat.shape[2]))
        if self._see_summary:
            x = torch.cat([x, encode.clean.summary.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=2)
        logits = self.predictor(x.flatten(0, 1)).float().split(self._grid, dim=1)
        targets = target[:, index.flatten()].to(local.device)  # (dims, N * points)
        loss = torch.stack([cross_entropy(axis, place) for axis, place in zip(logits, targets, strict=True)]).sum()
        return {"coordinates": Term(loss, sum(math.log(cells) for cells in self._grid))}
