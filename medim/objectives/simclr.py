"""SimCLR: the summaries of two views of an image find each other in the batch (Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import normalize

from medim.models.layers import check_channels
from medim.objectives.contrastive_term import compute_spread
from medim.objectives.mutual_information import compute_retrieval, infonce
from medim.objectives.objective import Encode, Term
from medim.types import UsageError, Views


class SimCLR(nn.Module):
    """NT-Xent between two independently augmented views (algorithm 1 and eq. 1 of the paper).

    A small network projects every summary; each projection is told its other view from the 2 (B - 1) views of all other
    images, by the cosine over a temperature. The network is thrown away: the summary in front of it is what is learnt.
    What the views differ in is what the summary may forget: set `views.augmentations`, and `views.same_place: false`
    for crops of their own.

    Args:
        summary_channels: length of the summary.
        view_count: views an image; it takes two.
        width: of the projections (128 in the paper).
        hidden: units of the projection's one hidden layer; 0 takes the summary's length, as the paper does.
        temperature: what cosines are divided by (0.1 in the paper, 0.5 for its CIFAR-10).
    """

    def __init__(
        self,
        summary_channels: int,
        view_count: int,
        *,
        width: int = 128,
        hidden: int = 0,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        hidden = hidden or summary_channels
        check_channels("simclr", (width,), option="width")
        check_channels("simclr", (hidden,), option="hidden")
        if view_count != 2:
            raise UsageError(f"simclr: expected two views of an image, got {view_count}. Set views.count: 2.")
        if not temperature > 0:
            raise UsageError(f"simclr.temperature: expected above 0, got {temperature}.")
        self._temperature = temperature
        self.project = nn.Sequential(
            nn.Linear(summary_channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `simclr`: cross-entropy in nats, mean over all views; chance is log(2 B - 1).

        Diagnostics: the bound, the share of images that are nearest to themselves, each meeting the views that it is
        not, and the spread of the summaries between images.
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
    """Scores of every view against every view, as `medim.objectives.mutual_information.infonce` takes them.

    Args:
        projection: (2 B, D), the two views of an image side by side.
        temperature: what cosines are divided by.

    Returns:
        Scores (B, 2, B, 2) in fp32, and the pairs that count, bool of the same shape: all but a view and itself.
    """
    with torch.autocast(projection.device.type, enabled=False):
        unit = normalize(projection.to(torch.promote_types(projection.dtype, torch.float32)), dim=1)
        scores = unit @ unit.T / temperature  # (2 B, 2 B)
    shape = (len(unit) // 2, 2, len(unit) // 2, 2)
    is_same_view = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return scores.reshape(shape), ~is_same_view.reshape(shape)
