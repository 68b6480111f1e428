"""One term of contrast: summaries against locals, scored by a critic and bounded by an estimator."""

from __future__ import annotations

import torch
from torch import nn

from medim.objectives.mutual_information import (
    ESTIMATORS,
    EstimatorName,
    Negatives,
    chance,
    negative_pairs,
    retrieval,
)
from medim.objectives.objective import Encode, Term
from medim.types import Views


def contrast(
    critic: nn.Module,
    local: torch.Tensor,
    summary: torch.Tensor,
    encode: Encode,
    views: Views,
    inside: torch.Tensor | None = None,
    *,
    estimator: EstimatorName,
    negatives: Negatives,
    score_penalty: float,
) -> Term:
    """Score the summary of each view against the locals of the next, and bound what they share.

    Args:
        critic: an entry of CRITICS.
        local: (B * V, C, L).
        summary: (B * V, S, G).
        encode: gives the randomness, and the summaries to watch.
        views: the B * V views.
        inside: (B * V, L) bool, which locations count; None: all.
        estimator: the bound.
        negatives: the scheme of negatives.
        score_penalty: weight of the mean squared score.
    """
    batch, count = views.location.shape[:2]  # small to gather, where images are not
    chances, bounds, squares, found = [], [], [], []
    for view in range(count):
        other = slice((view + 1) % count, None, count)
        drawn = negative_pairs(negatives, batch, local.shape[2], encode.generator)
        pairs = None if drawn is None else drawn.to(local.device)
        if inside is not None:
            drawn = pairs = inside[other] if pairs is None else pairs & inside[other]
        scores, square = critic(local[other], summary[view::count], pairs)
        chances.append(chance(scores, drawn) if estimator == "infonce" else 0.0)
        bounds.append(ESTIMATORS[estimator](scores, pairs))
        squares.append(square)
        found.append(retrieval(scores, pairs))
    uninformed, bound = sum(chances) / count, torch.stack(bounds).mean()
    loss = uninformed - bound
    if score_penalty:
        loss = loss + score_penalty * torch.stack(squares).mean()
    diagnostics = {
        "bound": bound.detach(),
        "retrieval": torch.stack(found).mean(),
        "spread": spread(encode.clean.summary),
    }
    return Term(loss, uninformed, diagnostics)


def spread(summary: torch.Tensor) -> torch.Tensor:
    """Standard deviation between images over the root mean square of the summary (N, S); 0 where all look the same."""
    summary = summary.detach().float()
    return summary.std(dim=0).square().mean().sqrt() / summary.square().mean().sqrt().clamp_min(1e-12)
