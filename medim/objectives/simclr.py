"""SimCLR: contrastive learning between the summaries of two views of an image (Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import normalize

from medim.config import PositiveNumber, Size, SizeOrZero
from medim.models.layers import check_channels
from medim.objectives.contrastive_term import compute_spread
from medim.objectives.mutual_information import compute_retrieval, infonce
from medim.objectives.objective import Encode, Term
from medim.types import UsageError, Views


class SimCLR(nn.Module):
    """NT-Xent between two independently augmented views (algorithm 1 and eq. 1 of the paper).

    A small network projects every summary. The positive of a projection is the other view of the same image, its
    negatives are the 2 (B - 1) views of all other images; scores are cosines divided by a temperature. The projection
    network is discarded after pretraining, only the encoder with its summary is saved. The summary becomes invariant to
    the differences between the views: set `views.augmentations`, and `views.same_crop: false` for independent crops.

    Args:
        summary_channels: length of the summary.
        view_count: views per image; must be 2.
        width: length of the projections (128 in the paper).
        hidden: units of the single hidden layer of the projection; 0 uses the length of the summary, as in the paper.
        temperature: divisor of the cosines (0.1 in the paper, 0.5 for its CIFAR-10).
    """

    view_counts = (2,)

    def __init__(
        self,
        summary_channels: int,
        view_count: int,
        *,
        width: Size = 128,
        hidden: SizeOrZero = 0,
        temperature: PositiveNumber = 0.1,
    ) -> None:
        super().__init__()
        hidden = hidden or summary_channels
        check_channels("simclr", (width,), option="width")
        check_channels("simclr", (hidden,), option="hidden")
        if view_count not in self.view_counts:
            raise UsageError(f"simclr: expected two views of an image, got {view_count}. Set views.count: 2.")
        if not temperature > 0:
            raise UsageError(f"simclr.temperature: expected above 0, got {temperature}.")
        self._temperature = temperature
        self.project = nn.Sequential(
            nn.Linear(summary_channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `simclr`: cross-entropy in nats, mean over all views; chance is log(2 B - 1).

        Diagnostics: the bound, the share of images with the highest mean score for their own other view, and the spread
        of the summaries between images.
        """
        scores, pairs = score_views(self.project(encode.clean.summary), self._temperature)
        chance_loss, bound = math.log(2 * len(scores) - 1), infonce(scores, pairs)
        diagnostics = {
            "bound": bound.detach(),
            "retrieval": compute_retrieval(scores, pairs),
            "spread": compute_spread(encode.clean.summary),
        }
        return {"simclr": Term(chance_loss - bound, chance_loss, diagnostics)}


def score_views(projection: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every view against every view, in the format of `medim.objectives.mutual_information.infonce`.

    Args:
        projection: (2 B, D), the two views of an image next to each other.
        temperature: divisor of the cosines.

    Returns:
        Scores (B, 2, B, 2) in fp32, and a bool mask of the same shape that excludes the pairs of a view with itself.
    """
    with torch.autocast(projection.device.type, enabled=False):
        unit = normalize(projection.to(torch.promote_types(projection.dtype, torch.float32)), dim=1)
        scores = unit @ unit.T / temperature  # (2 B, 2 B)
    shape = (len(unit) // 2, 2, len(unit) // 2, 2)
    is_same_view = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return scores.reshape(shape), ~is_same_view.reshape(shape)
