"""Lower bounds on mutual information, as pure functions of the scores of a critic.

Scores are (B, G, B, L): summary g of image i against location l of image j. Positive pairs have i = j; negatives are
all locations of all other images, never of the same image (Hjelm et al. 2019, section 3.1). A mask, bool and
broadcastable to the scores, excludes pairs: it selects positives for i = j and negatives elsewhere.

Every bound is in nats and larger is better; the loss is its negative. A bound is 0 if all scores are 0; InfoNCE and DV
are 0 for any equal scores. A bound is 0 without gradient if the mask selects no positive or no negative. The functions
compute in fp32, or in fp64 for fp64 scores.
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
_MAX_BLOCK_SCORES = 2**20  # scores per block


class Estimator(Protocol):
    """Interface of a bound: a scalar from scores (B, G, B, L) and a mask that is broadcastable to them."""

    def __call__(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the bound in nats."""
        ...


def infonce(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018; eq. 5 of Hjelm et al. 2019).

    The classes of a positive are the positive itself and all selected locations of the other images: 1 + (B - 1) L
    classes without a mask. Shift-invariant.

    Returns:
        log(classes) minus the cross-entropy, mean over all positives; at most log(classes).

    Examples:
        >>> scores = 20 * torch.eye(4)[:, None, :, None]  # four images, each similar only to itself
        >>> round(float(infonce(scores)), 3), round(math.log(4), 3)
        (1.386, 1.386)
    """
    positive, negative, positives, negatives = _split_pairs(scores, mask, _LOGSUMEXP)
    log_classes = negatives.to(positive.dtype).log1p()  # (B, G)
    return _masked_mean(log_classes.unsqueeze(-1) - softplus(negative.unsqueeze(-1) - positive), positives)


def jsd(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Jensen-Shannon bound (eq. 4 of Hjelm et al. 2019, shifted to be 0 at equal scores of 0); at most 2 log 2.

    Examples:
        >>> scores = 40 * torch.eye(4)[:, None, :, None] - 20
        >>> round(float(jsd(scores)), 3), round(2 * math.log(2), 3)
        (1.386, 1.386)
    """
    positive, negative, positives, negatives = _split_pairs(scores, mask, _SOFTPLUS)
    loss = _masked_mean(softplus(-positive), positives) + negative.sum() / negatives.sum().clamp_min(1)
    return _zero_unless_both(2 * math.log(2) - loss, positives, negatives)


def dv(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Donsker-Varadhan bound (eq. 2 of Hjelm et al. 2019), log over all negatives of the batch. Shift-invariant.

    Examples:
        >>> scores = 3 * torch.eye(4)[:, None, :, None]
        >>> round(float(dv(scores)), 3)
        3.0
    """
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
    """Number of classes of InfoNCE without a mask, 1 + (B - 1) L.

    Examples:
        >>> count_classes(torch.zeros(8, 1, 8, 27))  # 8 images with 27 locations each
        190
    """
    return 1 + (scores.shape[0] - 1) * scores.shape[3]


def compute_chance(scores: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Cross-entropy of InfoNCE for an uninformed critic: log(classes), mean over all positives."""
    if mask is None:
        return math.log(count_classes(scores))
    positives, negatives = _count_score_pairs(scores, mask)
    return float(_masked_mean(negatives.double().log1p().unsqueeze(-1).expand(positives.shape), positives))


def compute_retrieval(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Share of summaries with the highest mean score for their own image; 1 / B by chance without a mask."""
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
    """Draw the mask that selects the negatives of one scheme.

    Args:
        negatives: `all`; `rolled`: image i + 1 only, as in most tutorials of DIM; `permuted`: at each location one
            randomly drawn other image (a random cycle through the batch; the scheme of the DIM authors' first code,
            which could pair an image with itself).
        batch: number of images B.
        locations: number of locations L.
        generator: source of randomness, on the CPU.

    Returns:
        None (all), or bool of (B, 1, B, 1 or L) that includes every positive; on the CPU.
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
    """Reduction of negatives (rows, G, B, L; excluded: -inf) to one number per summary (rows, G), and its slope."""

    value: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_LOGSUMEXP = _Reduction(
    lambda block: block.logsumexp(dim=(2, 3)),
    lambda block, value: (block - value.masked_fill(value == -math.inf, 0)[..., None, None]).exp_(),
)
_SOFTPLUS = _Reduction(lambda block: softplus(block).sum(dim=(2, 3)), lambda block, value: block.sigmoid())


class _SplitPairs(torch.autograd.Function):
    """Split scores into positives (B, G, L) and reduced negatives (B, G), without a copy of the scores.

    Masking and reducing the scores with autograd would keep four copies of them in memory. Here blocks of rows are
    processed one after the other, and both gradients are written into one tensor.
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
        """Combine the gradients of positives (B, G, L) and reduced negatives (B, G) into (B, G, B, L)."""
        scores, mask, negative = ctx.saved_tensors
        gradient = torch.empty_like(scores)
        for rows, block in _iterate_blocks(scores, mask):
            gradient[rows] = ctx.reduction.slope(block, negative[rows]).mul_(to_negative[rows, :, None, None])
        _select_positives(gradient).copy_(to_positive)
        return gradient, None, None


def _split_pairs(
    scores: torch.Tensor, mask: torch.Tensor | None, reduction: _Reduction
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positives and their mask (B, G, L), reduced negatives (B, G), and the number of negatives (B, G)."""
    if scores.ndim != 4 or scores.shape[0] != scores.shape[2] or scores.shape[0] < 2:
        raise ValueError(f"scores: expected (B, G, B, L) with B of at least 2, got {tuple(scores.shape)}.")
    positives, negatives = _count_score_pairs(scores, mask)
    positive, negative = _SplitPairs.apply(scores, mask, reduction)  # type: ignore[no-untyped-call]
    return positive.masked_fill(~positives, 0), negative, positives, negatives


def _iterate_blocks(scores: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Iterate over copies of blocks of rows of the scores, with -inf for every pair that is not a negative."""
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
    """View (B, G, L) of the pairs (B, G, B, L) with i = j."""
    return pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _count_score_pairs(scores: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask of the selected positives, bool (B, G, L), and number of negatives of each summary, (B, G)."""
    batch, globals_, _, locations = scores.shape
    if mask is None:
        everything = scores.new_ones(batch, globals_, locations, dtype=torch.bool)
        return everything, scores.new_full((batch, globals_), (batch - 1) * locations, dtype=torch.long)
    mask = mask.expand(scores.shape)
    positives = _select_positives(mask)
    return positives, mask.sum(dim=(2, 3)) - positives.sum(dim=2)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the selected values; 0 if none is selected."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


def _zero_unless_both(bound: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """The bound, or 0 if there are no positives or no negatives."""
    return torch.where(positives.any() & negatives.any(), bound, 0)
