"""Augmented multiscale Deep InfoMax: InfoNCE between views at two scales (Bachman et al. 2019, arXiv 1906.00910)."""

from __future__ import annotations

import math

import torch
from torch import nn

from medim.config import Size
from medim.models.layers import check_level
from medim.objectives.mutual_information import compute_retrieval, count_classes, infonce
from medim.objectives.objective import Encode, Term
from medim.types import UsageError, Views


class AMDIM(nn.Module):
    """InfoNCE between two independently augmented views: summary to two maps, and the first map to itself.

    These are the pairs 1 -> 5, 1 -> 7 and 5 -> 5 of the paper (its 1x1, 5x5 and 7x7 maps), on the grids of the encoder
    at hand and in both directions between the views. A source is the summary, or one random cell of the first map per
    image. Its positives are the local features of the other view, its negatives all local features of all other images.
    Scores are divided by sqrt(width), penalised and clipped. The two views must differ: set `views.augmentations`, and
    `views.same_crop: false` for independent crops.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        view_count: views per image; must be 2.
        levels: indices of the first and the second map; negative values count from the coarsest map.
        width: width of the score space. A summary of this length enters through batch norm only, as in the paper,
            otherwise through a linear layer and batch norm.
        summary_norm: batch norm of the summary; false for an encoder whose summary has one, such as `amdim`.
        score_penalty: weight of the mean squared score before clipping (0.04 in the paper, 0.05 in later code).
        clip: soft bound of the scores, clip * tanh(score / clip); 0 disables it.
    """

    view_counts = (2,)
    draws_per_image = True

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        view_count: int,
        *,
        levels: tuple[int, int] = (-1, -2),
        width: Size = 1024,
        summary_norm: bool = True,
        score_penalty: float = 0.04,
        clip: float = 20.0,
    ) -> None:
        super().__init__()
        if view_count not in self.view_counts:
            raise UsageError(f"amdim: expected two views of an image, got {view_count}. Set views.count: 2.")
        self._levels = [check_level("amdim.levels", level, len(channels)) for level in levels]
        if self._levels[0] == self._levels[1]:
            raise UsageError(f"amdim.levels: expected two different maps, got {list(levels)}.")
        self._penalty, self._clip = score_penalty, clip
        same = summary_channels == width
        linear = nn.Identity() if same else nn.Linear(summary_channels, width, bias=False)
        self.summary = nn.Sequential(linear, nn.BatchNorm1d(width) if summary_norm else nn.Identity())
        self.heads = nn.ModuleList(_ProjectionHead(channels[level], width) for level in self._levels)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `amdim`: the sum of three cross-entropies in nats, each the mean of both directions, and the penalty.

        Chance is the sum of the logarithms of their numbers of classes. Diagnostics: each bound, and the share of
        sources with the highest mean score for their own image.
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
    """1x1 conv, ReLU, 1x1 conv initialised to 0, plus a linear shortcut initialised as a noisy copy; then BN.

    `FakeRKHSConvNet` of the AMDIM authors' code (model.py), over flattened locations. Biases that BN would cancel are
    omitted.
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
        """Project (N, C, L) to (N, width, L)."""
        return self.norm(self.block(x) + self.shortcut(x))
