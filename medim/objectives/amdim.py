"""Augmented multiscale Deep InfoMax: views tell each other, at two scales (Bachman et al. 2019, arXiv 1906.00910)."""

from __future__ import annotations

import math

import torch
from torch import nn

from medim.models.layers import check_level
from medim.objectives.mutual_information import compute_retrieval, count_classes, infonce
from medim.objectives.objective import Encode, Term
from medim.types import UsageError, Views


class AMDIM(nn.Module):
    """InfoNCE between two independently augmented views: summary to two maps, and the first map to itself.

    The paper's 1 -> 5, 1 -> 7 and 5 -> 5 (its 1x1, 5x5 and 7x7 maps), on whatever grids the encoder has; in both
    directions between the views. A source (the summary, or one random cell of the first map an image) is told the
    locals of the other view from all locals of all other images. Scores are divided by sqrt(width), penalised, and
    clipped. The views are to differ: set `views.augmentations`, and `views.same_place: false` for crops of their own.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        view_count: views an image; it takes two.
        levels: the two maps, first and second; below 0: from the coarsest.
        width: of the space of the scores. A summary of this length enters through batch norm alone, as the paper's,
            else through a linear layer before it.
        score_penalty: weight of the mean squared score before clipping (0.04 in the paper, 0.05 in later code).
        clip: bound scores softly by clip * tanh(score / clip); 0 does not.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        view_count: int,
        *,
        levels: tuple[int, int] = (-1, -2),
        width: int = 1024,
        score_penalty: float = 0.04,
        clip: float = 20.0,
    ) -> None:
        super().__init__()
        if view_count != 2:
            raise UsageError(f"amdim: expected two views of an image, got {view_count}. Set views.count: 2.")
        self._levels = [check_level("amdim.levels", level, len(channels)) for level in levels]
        if self._levels[0] == self._levels[1]:
            raise UsageError(f"amdim.levels: expected two different maps, got {list(levels)}.")
        self._penalty, self._clip = score_penalty, clip
        same = summary_channels == width
        linear = nn.Identity() if same else nn.Linear(summary_channels, width, bias=False)
        self.summary = nn.Sequential(linear, nn.BatchNorm1d(width))
        self.heads = nn.ModuleList(_ProjectionHead(channels[level], width) for level in self._levels)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `amdim`: the sum of three cross-entropies in nats, each the mean of both directions, and the penalty.

        Chance is the sum of the logs of their classes. Diagnostics: each bound, and the share of sources whose highest
        mean score is with their own image.
        """
        maps = [encode.clean.maps[level].flatten(2) for level in self._levels]
        first, second = (head(map_) for head, map_ in zip(self.heads, maps, strict=True))  # (2 B, width, L)
        summary = self.summary(encode.clean.summary).unsqueeze(2)  # (2 B, width, 1)
        cell = torch.randint(first.shape[2], (len(first), 1, 1), generator=encode.generator).to(first.device)
        source = first.gather(2, cell.expand(-1, first.shape[1], -1))  # (2 B, width, 1)
        pairs = {
            "summary_to_first": (summary, first),
            "summary_to_second": (summary, second),
            "first_to_first": (source, first),
        }
        loss, chance = torch.zeros((), device=first.device), 0.0
        diagnostics, hit_rates = {}, []
        for name, (sources, targets) in pairs.items():
            score_pairs = [self._score(sources[v::2], targets[1 - v :: 2]) for v in (0, 1)]
            bound = torch.stack([infonce(scores) for scores, _ in score_pairs]).mean()
            log_classes = math.log(count_classes(score_pairs[0][0]))
            loss = (
                loss + log_classes - bound + self._penalty * torch.stack([square for _, square in score_pairs]).mean()
            )
            chance += log_classes
            diagnostics[name] = bound.detach()
            hit_rates += [compute_retrieval(scores) for scores, _ in score_pairs]
        diagnostics["retrieval"] = torch.stack(hit_rates).mean()
        return {"amdim": Term(loss, chance, diagnostics)}

    def _score(self, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B, 1, B, L) of sources (B, width, 1) and targets (B, width, L); mean square before clipping."""
        with torch.autocast(source.device.type, enabled=False):
            scores = torch.einsum("aug,bul->agbl", source.float(), target.float()) / math.sqrt(source.shape[1])
            square = scores.square().mean()
            return (self._clip * torch.tanh(scores / self._clip) if self._clip else scores), square


class _ProjectionHead(nn.Module):
    """1x1 conv, ReLU, 1x1 conv that starts at 0, plus a linear shortcut that starts as a noisy copy; then BN.

    `FakeRKHSConvNet` of the AMDIM authors' code (model.py), over flattened locations; biases that BN takes out again
    are left out.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        last_layer = nn.Conv1d(width, width, 1, bias=False)
        nn.init.zeros_(last_layer.weight)
        self.block = nn.Sequential(nn.Conv1d(in_channels, width, 1, bias=False), nn.ReLU(inplace=True), last_layer)
        self.shortcut = nn.Conv1d(in_channels, width, 1, bias=False)
        if width >= in_channels:
            nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
            with torch.no_grad():
                self.shortcut.weight[range(in_channels), range(in_channels)] = 1.0
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, L) to (N, width, L)."""
        return self.norm(self.block(x) + self.shortcut(x))
