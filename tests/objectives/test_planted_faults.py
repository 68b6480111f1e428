"""Each clause of the negative set and of the adversarial step has a check that the real code passes and a fault fails.

The faults are those of other implementations of Deep InfoMax, and near ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from medim.models.critics import Bilinear, ConcatAndConvolve, EncodeAndDot
from medim.objectives.mutual_information import draw_negative_pairs, dv, infonce, jsd
from medim.objectives.occlusion import draw_occlusion_mask
from medim.objectives.prior_matching import PriorMatching
from medim.types import Features, Views

NO_VIEWS = Views(torch.zeros(0), torch.zeros(0))
Bound = Callable[[torch.Tensor], torch.Tensor]


def scores_of(batch: int = 4, globals_: int = 2, locations: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, globals_, batch, locations, generator=generator, dtype=torch.float64)


def slopes(bound: Bound, scores: torch.Tensor) -> torch.Tensor:
    """Gradient of the bound (B, G, B, L)."""
    scores = scores.clone().requires_grad_()
    bound(scores).backward()
    assert scores.grad is not None
    return scores.grad


# --- the negative set: a check is given a bound


def no_image_meets_itself(bound: Bound) -> None:
    """Raising one own score takes nothing from the gradient of the other locations of the same image."""
    scores = scores_of()
    louder = scores.clone()
    louder[1, 0, 1, 2] += 5.0
    change = slopes(bound, louder) - slopes(bound, scores)
    assert change[1, 0, 1, :2].abs().max() < 1e-9


def own_pairs_gain_and_no_other_does(bound: Bound) -> None:
    """With own scores far above the others a negative term that held them would push them down."""
    scores = scores_of()
    own = torch.eye(4, dtype=torch.bool)[:, None, :, None].expand(scores.shape)
    gradient = slopes(bound, scores + 8.0 * own)
    assert (gradient[own] > 0).all()
    assert (gradient[~own] < 0).all()


def a_constant_plays_no_part(bound: Bound) -> None:
    scores = scores_of()
    for shift in (-60.0, -20.0, 20.0):
        assert bound(scores + shift).item() == pytest.approx(bound(scores).item(), abs=1e-6)


def equal_scores_tell_nothing(bound: Bound) -> None:
    assert bound(torch.zeros(4, 2, 4, 3)).item() == pytest.approx(0, abs=1e-6)


def a_summary_is_contrasted_with_locals_and_not_a_local_with_summaries(bound: Bound) -> None:
    """What a summary scores everywhere falls out, of its own as of other images; a local's score does not."""
    scores, row = scores_of(), torch.zeros(4, 1, 1, 1)
    row[2] = 3.0
    assert bound(scores + row).item() == pytest.approx(bound(scores).item(), abs=1e-6)
    assert bound(scores + row.transpose(0, 2)).item() != pytest.approx(bound(scores).item(), abs=1e-3)


def every_location_of_every_other_image_counts(bound: Bound) -> None:
    gradient = slopes(bound, scores_of())
    assert (gradient != 0).all()


def the_summaries_of_an_image_do_not_compete(bound: Bound) -> None:
    """A loud negative of one summary leaves the slopes of the image's other summary as they were."""
    scores = scores_of()
    louder = scores.clone()
    louder[0, 0, 1, 0] += 5.0
    torch.testing.assert_close(slopes(bound, louder)[:, 1], slopes(bound, scores)[:, 1])


def faulty_infonce(
    *, own: float | None = None, transposed: bool = False, keep: slice = slice(None), joint: bool = False
) -> Bound:
    """InfoNCE whose own pairs get `own` instead of -inf (None: their own score), or with other faults."""

    def bound(scores: torch.Tensor) -> torch.Tensor:
        if transposed:
            scores = scores.transpose(0, 2)
        batch = len(scores)
        diagonal = torch.eye(batch, dtype=torch.bool)[:, None, :, None]
        negative = scores if own is None else scores.masked_fill(diagonal, own)
        negative = negative[..., keep]
        positive = scores.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        total = negative.logsumexp(dim=(1, 2, 3) if joint else (2, 3), keepdim=True).flatten(2)
        classes = 1 + (batch - 1) * negative.shape[3] * (scores.shape[1] if joint else 1)
        return math.log(classes) - (torch.logaddexp(positive, total) - positive).mean()

    return bound


def dv_with_own_pairs(scores: torch.Tensor) -> torch.Tensor:
    positive = scores.diagonal(dim1=0, dim2=2)
    return positive.mean() - (scores.flatten().logsumexp(dim=0) - math.log(scores.numel()))


def jsd_with_own_pairs(scores: torch.Tensor) -> torch.Tensor:
    return 2 * math.log(2) - softplus(-scores.diagonal(dim1=0, dim2=2)).mean() - softplus(scores).mean()


def dv_with_a_product_for_a_mask(scores: torch.Tensor) -> torch.Tensor:
    """Own scores times 0, not out: each is a class of score 0, as in the DIM authors' code (dim-spec, 7.2)."""
    others = 1 - torch.eye(len(scores), dtype=scores.dtype)[:, None, :, None]
    count = scores.numel() / len(scores) * (len(scores) - 1)
    positive = scores.diagonal(dim1=0, dim2=2)
    return positive.mean() - ((scores * others).flatten().logsumexp(dim=0) - math.log(count))


NEGATIVE_SET = [
    (no_image_meets_itself, infonce, faulty_infonce(own=None), "same-image-negatives-let-in"),
    (own_pairs_gain_and_no_other_does, dv, dv_with_own_pairs, "dv-over-all-pairs"),
    (own_pairs_gain_and_no_other_does, jsd, jsd_with_own_pairs, "jsd-over-all-pairs"),
    (a_constant_plays_no_part, infonce, faulty_infonce(own=-10.0), "self-pairs-at-minus-ten"),
    (a_constant_plays_no_part, dv, dv_with_a_product_for_a_mask, "self-pairs-times-zero"),
    (equal_scores_tell_nothing, infonce, faulty_infonce(own=0.0), "self-pairs-at-zero"),
    (equal_scores_tell_nothing, dv, dv_with_a_product_for_a_mask, "self-pairs-counted-in-the-log-only"),
    (
        a_summary_is_contrasted_with_locals_and_not_a_local_with_summaries,
        infonce,
        faulty_infonce(own=-math.inf, transposed=True),
        "local-fixed-and-summary-contrasted",
    ),
    (
        every_location_of_every_other_image_counts,
        infonce,
        faulty_infonce(own=-math.inf, keep=slice(0, 1)),
        "first-location-only",
    ),
    (
        the_summaries_of_an_image_do_not_compete,
        infonce,
        faulty_infonce(own=-math.inf, joint=True),
        "summaries-of-an-image-in-one-softmax",
    ),
]


@pytest.mark.parametrize(("check", "real", "faulty"), [pytest.param(*c[:3], id=c[3]) for c in NEGATIVE_SET])
def test_a_fault_in_the_negative_set_is_caught(check: Callable[[Bound], None], real: Bound, faulty: Bound) -> None:
    check(real)
    with pytest.raises(AssertionError):
        check(faulty)


# --- schemes of negatives: a check is given a function that draws the mask


def each_positive_has_one_negative_image(draw: Callable[[int, int], torch.Tensor | None]) -> None:
    mask = draw(5, 40)
    assert mask is not None
    assert (mask.expand(5, 1, 5, 40).sum(dim=2) == 2).all(), "itself and one other"


def permuted(batch: int, locations: int) -> torch.Tensor | None:
    return draw_negative_pairs("permuted", batch, locations, torch.Generator().manual_seed(0))


def permuted_with_self(batch: int, locations: int) -> torch.Tensor:
    """The DIM authors' first code: a permutation a location, which may leave an image where it is."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(batch, generator=generator) for _ in range(locations)], dim=1)
    mask = torch.eye(batch, dtype=torch.bool).unsqueeze(-1).repeat(1, 1, locations)
    return mask.scatter(1, order.unsqueeze(1), True).unsqueeze(1)


def test_a_permutation_that_lets_an_image_meet_itself_is_caught() -> None:
    each_positive_has_one_negative_image(permuted)
    with pytest.raises(AssertionError):
        each_positive_has_one_negative_image(permuted_with_self)


# --- scores: a check is given a critic


def scores_are_fp32_under_autocast(critic: nn.Module) -> None:
    local, summary = torch.randn(3, 6, 4), torch.randn(3, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = critic(local.bfloat16(), summary.bfloat16())
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float()), "nor rounded on the way"


class RoundedScores(nn.Module):
    """Leaves the dot product to autocast; `widened` turns what it gives into fp32, too late."""

    def __init__(self, widened: bool) -> None:
        super().__init__()
        self.weight, self.widened = nn.Linear(5, 6), widened

    def forward(self, local: torch.Tensor, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = self.weight(summary.transpose(1, 2)).transpose(1, 2)
        scores = torch.einsum("acg,bcl->agbl", turned, local)
        return (scores.float() if self.widened else scores), scores.square().mean()


@pytest.mark.parametrize("faulty", [RoundedScores(False), RoundedScores(True)], ids=["bf16", "bf16-widened-late"])
@pytest.mark.parametrize("real", [EncodeAndDot(6, 5, width=8), ConcatAndConvolve(6, 5, hidden=(8,)), Bilinear(6, 5)])
def test_scores_rounded_by_autocast_are_caught(real: nn.Module, faulty: nn.Module) -> None:
    scores_are_fp32_under_autocast(real)
    with pytest.raises(AssertionError):
        scores_are_fp32_under_autocast(faulty)


# --- the adversarial step: a check is given the class of the objective


def encode_of(summary: torch.Tensor) -> Any:
    return SimpleNamespace(clean=Features((), summary), generator=torch.Generator().manual_seed(0))


def made(kind: type[PriorMatching], **options: Any) -> PriorMatching:
    torch.manual_seed(0)
    return kind(4, **{"hidden": (16,), **options})


def summary_of(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


def the_critics_step_does_not_reach_the_encoder(kind: type[PriorMatching]) -> None:
    summary = summary_of()
    made(kind).adversary_loss(encode_of(summary), NO_VIEWS).backward()
    assert summary.grad is None


def the_encoders_step_does_not_reach_the_critic(kind: type[PriorMatching]) -> None:
    objective = made(kind)
    objective(encode_of(summary_of()), NO_VIEWS)["prior_matching"].loss.backward()
    assert all(p.grad is None for p in objective.discriminator.parameters())


def the_two_steps_pull_apart(kind: type[PriorMatching]) -> None:
    """The encoder raises what the discriminator says of summaries; the discriminator lowers it."""
    objective, summary = made(kind, gradient_penalty=0.0), summary_of()

    def said() -> float:
        return objective.discriminator(torch.sigmoid(summary)).mean().item()

    start = said()
    trained, loss = list(objective.parameters()), objective.adversary_loss(encode_of(summary), NO_VIEWS)
    with torch.no_grad():
        for parameter, slope in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter -= 0.05 * slope
    lowered = said()
    (slope,) = torch.autograd.grad(objective(encode_of(summary), NO_VIEWS)["prior_matching"].loss, summary)
    with torch.no_grad():
        summary -= 5.0 * slope
    assert lowered < start
    assert said() > lowered


def every_sample_is_penalised(kind: type[PriorMatching]) -> None:
    """A linear discriminator's gradient is its weight at each sample, whatever the batch."""
    for batch in (2, 7):
        losses = []
        for weight in (0.0, 1.0):
            objective = made(kind, gradient_penalty=weight, hidden=(), prior="gaussian")
            losses.append(objective.adversary_loss(encode_of(summary_of(batch)), NO_VIEWS).item())
        square = objective.discriminator[0].weight.square().sum().item()
        assert losses[1] - losses[0] == pytest.approx(square, rel=1e-4)


def only_the_squashed_summary_is_judged(kind: type[PriorMatching]) -> None:
    objective, seen = made(kind), []
    objective.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    summary = 5 * summary_of().detach()
    objective(encode_of(summary), NO_VIEWS)
    objective.adversary_loss(encode_of(summary), NO_VIEWS)
    assert all((x >= 0).all() and (x <= 1).all() for x in seen)


class Attached(PriorMatching):
    """Its critic's step goes on into the encoder."""

    def adversary_loss(self, encode: Any, views: Views) -> torch.Tensor:
        return softplus(self.discriminator(self._squash(encode.clean.summary))).mean()


class Shared(PriorMatching):
    """Its encoder's step trains the discriminator too."""

    def forward(self, encode: Any, views: Views) -> Any:
        loss = softplus(-self.discriminator(self._squash(encode.clean.summary))).mean()
        return {"prior_matching": SimpleNamespace(loss=loss)}


class Cooperative(PriorMatching):
    """Both minimise the discriminator's loss, so the encoder helps it (dim-spec, 7.1)."""

    def forward(self, encode: Any, views: Views) -> Any:
        loss = softplus(self.discriminator(self._squash(encode.clean.summary))).mean()
        return {"prior_matching": SimpleNamespace(loss=loss)}


class LastSampleOnly(PriorMatching):
    """Penalises the gradient of the batch's last sample alone (dim-spec, 7.5)."""

    def adversary_loss(self, encode: Any, views: Views) -> torch.Tensor:
        fake = self._squash(encode.clean.summary.detach()).requires_grad_()
        on_fake = self.discriminator(fake)
        (gradient,) = torch.autograd.grad(on_fake[-1].sum(), fake, create_graph=True)
        return softplus(on_fake).mean() + self._penalty * gradient.square().sum(dim=1).mean()


class Unsquashed(PriorMatching):
    """Compares raw summaries with the uniform prior (dim-spec, 7.1)."""

    def _squash(self, summary: torch.Tensor) -> torch.Tensor:
        return summary


@pytest.mark.parametrize(
    ("check", "faulty"),
    [
        pytest.param(the_critics_step_does_not_reach_the_encoder, Attached, id="encoder-not-detached"),
        pytest.param(the_encoders_step_does_not_reach_the_critic, Shared, id="critic-trained-in-the-encoders-step"),
        pytest.param(the_two_steps_pull_apart, Cooperative, id="loss-minimised-by-both"),
        pytest.param(every_sample_is_penalised, LastSampleOnly, id="last-sample-penalised"),
        pytest.param(only_the_squashed_summary_is_judged, Unsquashed, id="summary-not-squashed"),
    ],
)
def test_a_fault_in_the_adversarial_step_is_caught(
    check: Callable[[type[PriorMatching]], None], faulty: type[PriorMatching]
) -> None:
    check(PriorMatching)
    with pytest.raises(AssertionError):
        check(faulty)


# --- occlusion: a check is given a function that draws what to hide


def one_block_is_hidden_and_one_visible(draw: Callable[..., torch.Tensor]) -> None:
    hidden = draw(200, (12, 10), 4, torch.Generator().manual_seed(0)).float()
    pool = nn.MaxPool2d(4, stride=1)
    assert (pool(1 - hidden).flatten(1) == 0).any(dim=1).all(), "one block is hidden"
    assert (pool(hidden).flatten(1) == 0).any(dim=1).all(), "one block is visible"


def scattered(count: int, shape: tuple[int, ...], block: int, generator: torch.Generator) -> torch.Tensor:
    """Half of the voxels, one by one."""
    return torch.rand(count, 1, *shape, generator=generator) < 0.5


def slabs_of_any_size(count: int, shape: tuple[int, ...], block: int, generator: torch.Generator) -> torch.Tensor:
    """From the first row to a random one: too few, or nearly all."""
    last = torch.randint(1, shape[0], (count, 1, 1, 1), generator=generator)
    return (torch.arange(shape[0]).view(1, 1, -1, 1) < last).expand(count, 1, *shape)


@pytest.mark.parametrize("faulty", [scattered, slabs_of_any_size])
def test_an_occlusion_that_leaves_no_block_hidden_or_visible_is_caught(faulty: Callable[..., torch.Tensor]) -> None:
    one_block_is_hidden_and_one_visible(draw_occlusion_mask)
    with pytest.raises(AssertionError):
        one_block_is_hidden_and_one_visible(faulty)
