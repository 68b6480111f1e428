"""Lower bounds on mutual information, as pure functions of a critic's scores.

Scores are (B, G, B, L): summary g of image i against location l of image j. Positive pairs are i = j; negatives are
all locations of all other images, never of the same image (Hjelm et al. 2019, section 3.1). A mask, bool and
broadcastable to the scores, leaves pairs out: where i = j it says which positives count, elsewhere which negatives.

Every bound is in nats and larger is better; the loss is its negative. It is 0 where all scores are 0, that of InfoNCE
and DV wherever they are equal, and, without gradient, where no positive or no negative counts. The functions compute in
fp32, or in fp64 where the scores have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

EstimatorName = Literal["infonce", "jsd", "dv"]
NegativeScheme = Literal["all", "rolled", "permuted"]
_MAX_BLOCK_SCORES = 2**20  # scores in a block


class Estimator(Protocol):
    """A bound: scores (B, G, B, L), and a mask broadcastable to them, to a scalar."""

    def __call__(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The bound in nats."""
        ...


def infonce(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018; eq. 5 of Hjelm et al. 2019).

    For each positive the classes are itself and all counted locations of the other images: 1 + (B - 1) L of them
    without a mask. Shift-invariant.

    Returns:
        log(classes) minus the cross-entropy, mean over all positives; at most log(classes).
    """
    positive, negative, positives, negatives = _split_pairs(scores, mask, _LOGSUMEXP)
    log_classes = negatives.to(positive.dtype).log1p()  # (B, G)
    return _masked_mean(log_classes.unsqueeze(-1) - softplus(negative.unsqueeze(-1) - positive), positives)


def jsd(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Jensen-Shannon bound (eq. 4 of Hjelm et al. 2019, shifted to be 0 at equal scores of 0); at most 2 log 2."""
    positive, negative, positives, negatives = _split_pairs(scores, mask, _SOFTPLUS)
    loss = _masked_mean(softplus(-positive), positives) + negative.sum() / negatives.sum().clamp_min(1)
    return _zero_unless_both(2 * math.log(2) - loss, positives, negatives)


def dv(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Donsker-Varadhan bound (eq. 2 of Hjelm et al. 2019), its log over all negatives of the batch. Shift-invariant."""
    positive, negative, positives, negatives = _split_pairs(scores, mask, _LOGSUMEXP)
    finite = negative.masked_fill(~negatives.any(), 0)  # the slope of a log-sum over -inf alone is NaN
    log_mean = finite.flatten().logsumexp(dim=0) - negatives.sum().to(negative.dtype).log()
    return _zero_unless_both(_masked_mean(positive, positives) - log_mean, positives, negatives)


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "infonce": infonce,
    "jsd": jsd,
    "dv": dv,
}


def count_classes(scores: torch.Tensor) -> int:
    """Number of classes of InfoNCE without a mask, 1 + (B - 1) L."""
    return 1 + (scores.shape[0] - 1) * scores.shape[3]


def compute_chance(scores: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """What an uninformed critic pays as InfoNCE's cross-entropy: log(classes), mean over all positives."""
    if mask is None:
        return math.log(count_classes(scores))
    positives, negatives = _count_score_pairs(scores, mask)
    return float(_masked_mean(negatives.double().log1p().unsqueeze(-1).expand(positives.shape), positives))


def compute_retrieval(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Share of summaries whose highest mean score is with their own image; 1 / B by chance without a mask."""
    scores = scores.detach()
    if mask is None:
        mean = scores.mean(dim=(1, 3))
    else:
        count = mask.expand(scores.shape).sum(dim=(1, 3))
        mean = scores.masked_fill(~mask, 0).sum(dim=(1, 3)) / count.clamp_min(1)
        mean = mean.masked_fill(count == 0, -math.inf)
    return (mean.argmax(dim=1) == torch.arange(len(mean), device=mean.device)).float().mean()


def draw_negative_pairs(
    negatives: NegativeScheme, batch: int, locations: int, generator: torch.Generator
) -> torch.Tensor | None:
    """The mask that leaves each summary the negatives of one scheme.

    Args:
        negatives: `all`; `rolled`: image i + 1 alone, as most tutorials of DIM have it; `permuted`: at each location
            another image, drawn anew (a random cycle through the batch; the scheme of the DIM authors' first code,
            which let an image meet itself).
        batch: number of images B.
        locations: number of locations L.
        generator: source of randomness, on the CPU.

    Returns:
        None (all), or bool of (B, 1, B, 1 or L), with every positive in it; on the CPU.
    """
    if negatives == "all":
        return None
    positives = torch.eye(batch, dtype=torch.bool)
    if negatives == "rolled":
        return (positives | positives.roll(1, dims=1))[:, None, :, None]
    order = torch.rand(locations, batch, generator=generator).argsort(dim=1)
    pairs = positives.repeat(locations, 1, 1)
    pairs[torch.arange(locations).unsqueeze(1), order, order.roll(-1, dims=1)] = True
    return pairs.permute(1, 2, 0).unsqueeze(1)


class _Reduction(NamedTuple):
    """Negatives (rows, G, B, L) to one number a summary (rows, G), and its slope; what is left out is -inf."""

    value: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_LOGSUMEXP = _Reduction(
    lambda block: block.logsumexp(dim=(2, 3)),
    lambda block, value: (block - value.masked_fill(value == -math.inf, 0)[..., None, None]).exp_(),
)
_SOFTPLUS = _Reduction(lambda block: softplus(block).sum(dim=(2, 3)), lambda block, value: block.sigmoid())


class _SplitPairs(torch.autograd.Function):
    """Positives (B, G, L), and negatives reduced to (B, G), without a copy of the scores.

    Masking the scores, reducing them and the way back would hold them four times over. Here blocks of rows come one
    after the other, and both gradients are written into one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, mask: torch.Tensor | None, reduction: _Reduction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split scores (B, G, B, L) into (B, G, L) and (B, G), both in fp32 or wider."""
        negative = scores.new_empty(scores.shape[:2], dtype=_promote_dtype(scores))
        for rows, block in _iterate_blocks(scores, mask):
            negative[rows] = reduction.value(block)
        ctx.reduction = reduction
        ctx.save_for_backward(scores, mask, negative)
        return _select_positives(scores).to(negative.dtype, copy=True), negative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_positive: torch.Tensor, to_negative: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient (B, G, B, L), from those of the positives (B, G, L) and of the reduced negatives (B, G)."""
        scores, mask, negative = ctx.saved_tensors
        gradient = torch.empty_like(scores)
        for rows, block in _iterate_blocks(scores, mask):
            gradient[rows] = ctx.reduction.slope(block, negative[rows]).mul_(to_negative[rows, :, None, None])
        _select_positives(gradient).copy_(to_positive)
        return gradient, None, None


def _split_pairs(
    scores: torch.Tensor, mask: torch.Tensor | None, reduction: _Reduction
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positives (B, G, L) and negatives reduced (B, G), which positives count (B, G, L) and how many negatives."""
    if scores.ndim != 4 or scores.shape[0] != scores.shape[2] or scores.shape[0] < 2:
        raise ValueError(f"scores: expected (B, G, B, L) with B of at least 2, got {tuple(scores.shape)}.")
    positives, negatives = _count_score_pairs(scores, mask)
    positive, negative = _SplitPairs.apply(scores, mask, reduction)  # type: ignore[no-untyped-call]
    return positive.masked_fill(~positives, 0), negative, positives, negatives


def _iterate_blocks(scores: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Copies of some rows of the scores in turn, with -inf for every pair that is no negative."""
    batch = len(scores)
    positives = torch.eye(batch, dtype=torch.bool, device=scores.device)[:, None, :, None]
    rows_at_once = max(1, _MAX_BLOCK_SCORES // scores[0].numel())
    for start in range(0, batch, rows_at_once):
        rows = slice(start, start + rows_at_once)
        exclusion_mask = positives[rows] if mask is None else positives[rows] | ~mask.expand(scores.shape)[rows]
        yield rows, scores[rows].to(_promote_dtype(scores)).masked_fill(exclusion_mask, -math.inf)


def _promote_dtype(scores: torch.Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _select_positives(pairs: torch.Tensor) -> torch.Tensor:
    """The view (B, G, L) of pairs (B, G, B, L) with i = j."""
    return pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _count_score_pairs(scores: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positives count, bool (B, G, L), and how many negatives each summary has, (B, G)."""
    batch, globals_, _, locations = scores.shape
    if mask is None:
        everything = scores.new_ones(batch, globals_, locations, dtype=torch.bool)
        return everything, scores.new_full((batch, globals_), (batch - 1) * locations, dtype=torch.long)
    mask = mask.expand(scores.shape)
    positives = _select_positives(mask)
    return positives, mask.sum(dim=(2, 3)) - positives.sum(dim=2)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of those values that count; 0 where none does."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


def _zero_unless_both(bound: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """The bound, or 0 where there are no positives or no negatives."""
    return torch.where(positives.any() & negatives.any(), bound, 0)
