"""Lower bounds on mutual information, as pure functions of a critic's scores.

Scores are (B, G, B, L): summary g of image i against location l of image j. Positive pairs are i = j; negatives are
all locations of all other images, never of the same image (Hjelm et al. 2019, section 3.1). Every bound is in nats, 0
where all scores are equal, and larger is better; the loss is its negative. The functions compute in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.functional import softplus

EstimatorName = Literal["infonce", "jsd", "dv"]


def infonce(scores: torch.Tensor) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018; eq. 5 of Hjelm et al. 2019).

    For each positive the classes are itself and all locations of the other images: 1 + (B - 1) L of them.
    Shift-invariant.

    Returns:
        log(classes) minus the cross-entropy, mean over all positives; at most log(classes).
    """
    positive, negative = _pairs(scores)
    total = torch.logaddexp(positive, torch.logsumexp(negative, dim=(2, 3)).unsqueeze(-1))  # (B, G, L)
    return math.log(classes(scores)) - (total - positive).mean()


def jsd(scores: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon bound (eq. 4 of Hjelm et al. 2019, shifted to be 0 at equal scores of 0); at most 2 log 2."""
    positive, negative = _pairs(scores)
    return 2 * math.log(2) - softplus(-positive).mean() - softplus(negative).sum() / _negatives(scores)


def dv(scores: torch.Tensor) -> torch.Tensor:
    """Donsker-Varadhan bound (eq. 2 of Hjelm et al. 2019), its log over all negatives of the batch. Shift-invariant."""
    positive, negative = _pairs(scores)
    return positive.mean() - (torch.logsumexp(negative.flatten(), dim=0) - math.log(_negatives(scores)))


ESTIMATORS: dict[EstimatorName, Callable[[torch.Tensor], torch.Tensor]] = {"infonce": infonce, "jsd": jsd, "dv": dv}


def classes(scores: torch.Tensor) -> int:
    """Number of classes of InfoNCE, 1 + (B - 1) L; its log is what an uninformed critic pays."""
    return 1 + (scores.shape[0] - 1) * scores.shape[3]


def retrieval(scores: torch.Tensor) -> torch.Tensor:
    """Share of summaries whose highest mean score is with their own image; 1 / B by chance."""
    guess = scores.detach().mean(dim=(1, 3)).argmax(dim=1)
    return (guess == torch.arange(len(guess), device=guess.device)).float().mean()


def _pairs(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives (B, G, L), and all scores (B, G, B, L) with minus infinity in the place of every positive."""
    batch, _, others, _ = scores.shape
    if batch != others or batch < 2:
        raise ValueError(f"scores: expected (B, G, B, L) with B of at least 2, got {tuple(scores.shape)}.")
    scores = scores.float()
    positive = scores.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (B, G, L)
    own = torch.eye(batch, dtype=torch.bool, device=scores.device)[:, None, :, None]
    return positive, scores.masked_fill(own, -math.inf)


def _negatives(scores: torch.Tensor) -> int:
    """Number of negative pairs, B (B - 1) G L."""
    return scores.numel() // scores.shape[0] * (scores.shape[0] - 1)
