"""Contrastive loss term between summaries and local features, for a given critic and mutual-information bound."""

from __future__ import annotations

import torch
from torch import nn

from medim.objectives.mutual_information import (
    ESTIMATORS,
    EstimatorName,
    NegativeScheme,
    compute_chance,
    compute_retrieval,
    draw_negative_pairs,
)
from medim.objectives.objective import Encode, Term
from medim.types import Views


def contrastive_term(
    critic: nn.Module,
    local: torch.Tensor,
    summary: torch.Tensor,
    encode: Encode,
    views: Views,
    foreground_mask: torch.Tensor | None = None,
    *,
    estimator: EstimatorName,
    negatives: NegativeScheme,
    score_penalty: float,
) -> Term:
    """Score the summary of each view against the local features of the next view, and bound their mutual information.

    Args:
        critic: an entry of CRITICS.
        local: (B * V, C, L).
        summary: (B * V, S, G).
        encode: source of randomness, and of the clean summaries for the diagnostics.
        views: the B * V views.
        foreground_mask: (B * V, L) bool, locations to use; None: all.
        estimator: mutual-information bound.
        negatives: scheme of the negatives.
        score_penalty: weight of the mean squared score.
    """
    batch, count = views.location.shape[:2]  # cheap to gather across processes, in contrast to the images
    chances, bounds, squares, hit_rates = [], [], [], []
    for view in range(count):
        next_views = slice((view + 1) % count, None, count)
        pair_mask = draw_negative_pairs(negatives, batch, local.shape[2], encode.generator)
        pairs = None if pair_mask is None else pair_mask.to(local.device)
        if foreground_mask is not None:
            pair_mask = pairs = foreground_mask[next_views] if pairs is None else pairs & foreground_mask[next_views]
        scores, square = critic(local[next_views], summary[view::count], pairs)
        chances.append(compute_chance(scores, pair_mask) if estimator == "infonce" else 0.0)
        bounds.append(ESTIMATORS[estimator](scores, pairs))
        squares.append(square)
        hit_rates.append(compute_retrieval(scores, pairs))
    chance_loss, bound = sum(chances) / count, torch.stack(bounds).mean()
    loss = chance_loss - bound
    if score_penalty:
        loss = loss + score_penalty * torch.stack(squares).mean()
    diagnostics = {
        "bound": bound.detach(),
        "retrieval": torch.stack(hit_rates).mean(),
        "spread": compute_spread(encode.clean.summary),
    }
    return Term(loss, chance_loss, diagnostics)


def compute_spread(summary: torch.Tensor) -> torch.Tensor:
    """Standard deviation between images over the root mean square of the summary (N, S); 0 if all are equal."""
    summary = summary.detach().float()
    return summary.std(dim=0).square().mean().sqrt() / summary.square().mean().sqrt().clamp_min(1e-12)
