"""Every bound against loops that read like its definition."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from medim.objectives import mutual_information
from medim.objectives.mutual_information import (
    ESTIMATORS,
    EstimatorName,
    NegativeScheme,
    compute_chance,
    compute_retrieval,
    count_classes,
    draw_negative_pairs,
    dv,
    infonce,
    jsd,
)

SHAPES = [
    pytest.param((batch, globals_, batch, locations), id=f"B{batch}-G{globals_}-L{locations}")
    for batch, globals_, locations in [(2, 1, 1), (3, 1, 4), (4, 3, 5), (8, 1, 6), (5, 2, 2 * 3 * 2), (2, 7, 2)]
]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def scores_of(shape: tuple[int, ...], scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def mask_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A scheme of negatives, or a mask that leaves out locations, or pairs one by one."""
    batch, _, _, locations = shape
    generator = torch.Generator().manual_seed(1 + sum(shape))
    if kind in ("all", "rolled", "permuted"):
        return draw_negative_pairs(kind, batch, locations, generator)  # type: ignore[arg-type]
    of = (1, 1, batch, locations) if kind == "locations" else shape
    return torch.rand(of, generator=generator) < 0.7


MASKS = ("all", "rolled", "permuted", "locations", "pairs")
every_mask = pytest.mark.parametrize("kind", MASKS)


def counts(mask: torch.Tensor | None, *pair: int) -> bool:
    if mask is None:
        return True
    return bool(mask[tuple(min(place, size - 1) for place, size in zip(pair, mask.shape, strict=True))])


def pairs(scores: torch.Tensor, mask: torch.Tensor | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    batch, globals_, _, locations = scores.shape
    positive, negative = [], []
    for i, g, j, k in itertools.product(range(batch), range(globals_), range(batch), range(locations)):
        if counts(mask, i, g, j, k):
            (positive if i == j else negative).append(scores[i, g, j, k])
    return positive, negative


def contrasts(scores: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """For each positive, its score followed by those of its negatives."""
    batch, globals_, _, locations = scores.shape
    for i, g, k in itertools.product(range(batch), range(globals_), range(locations)):
        others = itertools.product((j for j in range(batch) if j != i), range(locations))
        if counts(mask, i, g, i, k):
            yield torch.stack(
                [scores[i, g, i, k], *(scores[i, g, j, m] for j, m in others if counts(mask, i, g, j, m))]
            )


def loop_infonce(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    gains = [math.log(len(c)) + torch.log_softmax(c, dim=0)[0] for c in contrasts(scores, mask)]
    return torch.stack(gains).mean() if gains else 0 * scores.sum()


def loop_jsd(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    positive, negative = pairs(scores, mask)
    if not positive or not negative:
        return 0 * scores.sum()
    gain = sum(math.log(2) - torch.log1p(torch.exp(-t)) for t in positive) / len(positive)
    cost = sum(torch.log1p(torch.exp(-t)) + t - math.log(2) for t in negative) / len(negative)
    return torch.as_tensor(gain - cost)


def loop_dv(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    positive, negative = pairs(scores, mask)
    if not positive or not negative:
        return 0 * scores.sum()
    return torch.stack(positive).mean() - torch.log(torch.stack([torch.exp(t) for t in negative]).mean())


LOOPS: dict[EstimatorName, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "infonce": loop_infonce,
    "jsd": loop_jsd,
    "dv": loop_dv,
}


@every_shape
@every_mask
@pytest.mark.parametrize("name", LOOPS)
def test_a_bound_and_its_gradient_equal_the_loops(name: EstimatorName, kind: str, shape: tuple[int, ...]) -> None:
    ours, theirs, mask = scores_of(shape).requires_grad_(), scores_of(shape).requires_grad_(), mask_of(kind, shape)
    bound, loop = ESTIMATORS[name](ours, mask), LOOPS[name](theirs, mask)
    assert bound.dtype == torch.float64
    torch.testing.assert_close(bound, loop, rtol=1e-6, atol=1e-12)
    bound.backward(), loop.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


@every_mask
@pytest.mark.parametrize("name", LOOPS)
def test_a_gradient_is_the_slope_of_its_bound(name: EstimatorName, kind: str) -> None:
    shape = (3, 2, 3, 2)
    scores, mask = scores_of(shape).requires_grad_(), mask_of(kind, shape)
    assert torch.autograd.gradcheck(lambda s: ESTIMATORS[name](s, mask), (scores,))


@pytest.mark.parametrize("name", LOOPS)
def test_blocks_of_rows_give_what_one_block_gives(name: EstimatorName, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 2 * 2 * 5 * 3, 10**6):  # one row a block, two rows and a rest, all at once
        monkeypatch.setattr(mutual_information, "_MAX_BLOCK_SCORES", size)
        scores = scores_of((5, 2, 5, 3)).requires_grad_()
        bound = ESTIMATORS[name](scores, mask_of("pairs", (5, 2, 5, 3)))
        bound.backward()
        assert scores.grad is not None
        found.append(torch.cat([bound.detach().view(1), scores.grad.flatten()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("left", ["nothing", "positives", "negatives"])
def test_without_positives_or_negatives_a_bound_is_zero_and_moves_nothing(name: EstimatorName, left: str) -> None:
    own = torch.eye(4, dtype=torch.bool)[:, None, :, None]
    mask = {"nothing": own & False, "positives": own, "negatives": ~own}[left]
    scores = scores_of((4, 2, 4, 3)).requires_grad_()
    bound = ESTIMATORS[name](scores, mask)
    bound.backward()
    assert bound.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


@pytest.mark.parametrize("name", LOOPS)
def test_what_is_left_out_may_hold_anything(name: EstimatorName) -> None:
    """A critic leaves the scores of pairs that do not count as they are; no value of them may come through."""
    shape = (4, 2, 4, 3)
    mask, found = mask_of("pairs", shape), []
    assert mask is not None
    for rubbish in (0.0, 1e30, math.nan):
        scores = scores_of(shape).masked_fill(~mask, rubbish).requires_grad_()
        bound = ESTIMATORS[name](scores, mask)
        bound.backward()
        assert scores.grad is not None
        assert not scores.grad[~mask].any()
        found.append(bound.item())
    assert found[0] == found[1] == found[2]


MEASURE = """
import resource, torch
from medim.objectives.mutual_information import ESTIMATORS
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for estimator in ESTIMATORS.values():
    estimator(torch.randn(4, 1, 4, 2, requires_grad=True)).backward()
scores = torch.randn(64, 1, 64, 4096, requires_grad=True)
before = peak()
for estimator in ESTIMATORS.values():
    scores.grad = None
    estimator(scores).backward()
print(peak() - before - scores.numel() * 4 / 2**20)
"""


@pytest.mark.slow
def test_beyond_scores_and_their_gradient_a_bound_needs_little_memory() -> None:
    """The plain form holds the 64 MiB of scores three times more; a block is 4 MiB, whatever their size."""
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 60


@every_shape
def test_every_estimator_has_its_loop_and_all_are_zero_without_information(shape: tuple[int, ...]) -> None:
    assert set(LOOPS) == set(ESTIMATORS)
    assert infonce(torch.full(shape, -7.0)).item() == pytest.approx(0, abs=1e-5)
    assert dv(torch.full(shape, 5.0)).item() == pytest.approx(0, abs=1e-5)
    assert jsd(torch.zeros(shape)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [-60.0, -20.0, 11.0, 500.0])
def test_infonce_and_dv_do_not_see_a_constant(shift: float) -> None:
    """The DIM authors' mask of -10 fails here: 9.17 nats became 52 (dim-spec, 7.3)."""
    scores = scores_of((4, 2, 4, 3)).float()
    for bound in (infonce, dv):
        assert bound(scores + shift).item() == pytest.approx(bound(scores).item(), abs=1e-3)
    assert jsd(scores + shift).item() != pytest.approx(jsd(scores).item(), abs=1e-2)


def test_a_perfect_critic_reaches_the_largest_value_of_each_bound() -> None:
    batch, locations = 6, 5
    scores = torch.full((batch, 1, batch, locations), -1e4)
    scores[torch.arange(batch), 0, torch.arange(batch)] = 1e4
    assert infonce(scores).item() == pytest.approx(math.log(1 + (batch - 1) * locations))
    assert jsd(scores).item() == pytest.approx(2 * math.log(2))
    assert dv(scores).item() == pytest.approx(2e4)


@pytest.mark.parametrize("name", ["infonce", "jsd"])
def test_extreme_scores_stay_finite_with_finite_gradients(name: EstimatorName) -> None:
    scores = (1e4 * scores_of((4, 1, 4, 3)).float()).requires_grad_()
    bound = ESTIMATORS[name](scores)
    bound.backward()
    assert bound.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_other_locations_of_the_same_image_are_in_no_denominator() -> None:
    """An own score of 1e4 settles its own class and leaves the loss of every other positive as it was."""
    scores = scores_of((4, 1, 4, 5)).float()
    chosen = scores.clone()
    chosen[1, 0, 1, 2] = 1e4
    count, top = 4 * 5, math.log(count_classes(scores))
    rest = infonce(scores) * count - (top + _log_posterior(scores, 1, 2))
    assert (infonce(chosen) * count - top).item() == pytest.approx(rest.item(), abs=1e-3)


def test_own_pairs_get_no_gradient_from_the_negatives() -> None:
    """dv's gradient at an own pair is exactly that of the mean of positives: the log-sum holds no own pair."""
    scores = scores_of((3, 2, 3, 4)).float().requires_grad_()
    dv(scores).backward()
    assert scores.grad is not None
    own = scores.grad[torch.arange(3), :, torch.arange(3)]
    torch.testing.assert_close(own, torch.full_like(own, 1 / (3 * 2 * 4)))


@pytest.mark.parametrize("name", LOOPS)
def test_gradients_raise_own_pairs_and_lower_all_others(name: EstimatorName) -> None:
    scores = scores_of((4, 2, 4, 3), scale=0.5).float().requires_grad_()
    ESTIMATORS[name](scores).backward()
    assert scores.grad is not None
    own = torch.eye(4, dtype=torch.bool)
    gradient = scores.grad.transpose(1, 2)
    assert (gradient[own] > 0).all()
    assert (gradient[~own] < 0).all()


@pytest.mark.parametrize(("batch", "locations"), [(2, 1), (3, 4), (16, 512)])
def test_the_classes_are_one_positive_and_all_locations_of_the_others(batch: int, locations: int) -> None:
    assert count_classes(torch.zeros(batch, 1, batch, locations)) == 1 + (batch - 1) * locations


@every_shape
@every_mask
def test_chance_is_the_mean_log_of_the_classes_of_what_counts(kind: str, shape: tuple[int, ...]) -> None:
    scores, mask = scores_of(shape), mask_of(kind, shape)
    sizes = [math.log(len(c)) for c in contrasts(scores, mask)]
    assert compute_chance(scores, mask) == pytest.approx(sum(sizes) / max(len(sizes), 1))


@pytest.mark.parametrize("negatives", ["rolled", "permuted"])
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_a_scheme_gives_each_summary_one_other_image_at_each_location(negatives: NegativeScheme, batch: int) -> None:
    drawn = draw_negative_pairs(negatives, batch, 50, torch.Generator().manual_seed(0))
    assert drawn is not None
    mask = drawn.expand(batch, 1, batch, 50)[:, 0]
    own = torch.eye(batch, dtype=torch.bool)
    assert mask[own].all(), "every positive counts"
    others = mask & ~own.unsqueeze(-1)
    assert (others.sum(dim=1) == 1).all(), "one negative image for each summary and location"
    assert (others.sum(dim=0) == 1).all(), "and each image serves once"
    if negatives == "rolled":
        assert all(others[i, (i + 1) % batch].all() for i in range(batch))
    elif batch > 2:
        assert others[~own].any(dim=1).all(), "every other image gets its turn"
        assert not (others == others[..., :1]).all(), "locations differ"


def test_permuted_negatives_follow_the_generator_and_prefer_nobody() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (draw_negative_pairs("permuted", 4, 3000, generator) for _ in range(2))
    again = draw_negative_pairs("permuted", 4, 3000, torch.Generator().manual_seed(0))
    assert first is not None
    assert second is not None
    assert again is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    share = first[:, 0].float().mean(dim=-1)
    torch.testing.assert_close(share[~torch.eye(4, dtype=torch.bool)], torch.full((12,), 1 / 3), rtol=0, atol=0.04)
    assert draw_negative_pairs("all", 4, 9, generator) is None


def test_retrieval_counts_summaries_whose_own_image_scores_best() -> None:
    scores = torch.zeros(4, 1, 4, 3)
    scores[torch.arange(4), 0, torch.tensor([0, 1, 2, 0])] = 1.0  # the last one prefers the first image
    assert compute_retrieval(scores).item() == pytest.approx(0.75)
    assert compute_retrieval(torch.zeros(4, 1, 4, 3)).item() == pytest.approx(0.25)


def test_retrieval_takes_the_mean_over_locations_and_globals() -> None:
    scores = torch.zeros(2, 2, 2, 2)
    scores[0, 0, 1, 0] = 3.0  # one loud location of the other image
    scores[0, :, 0, :] = 1.0  # four of its own
    scores[1, :, 1, :] = 1.0
    assert compute_retrieval(scores).item() == 1.0


def test_retrieval_among_masked_pairs_looks_at_no_other() -> None:
    scores = torch.zeros(3, 1, 3, 2)
    scores[:, :, :, 1] = 9 * torch.eye(3).roll(1, dims=0)[:, None]  # the second location misleads
    scores[:, :, :, 0] = torch.eye(3)[:, None]
    first = torch.tensor([True, False]).view(1, 1, 1, 2)
    assert compute_retrieval(scores).item() == 0
    assert compute_retrieval(scores, first).item() == 1
    assert compute_retrieval(-scores, first & torch.eye(3, dtype=torch.bool)[:, None, :, None]).item() == 1


def _log_posterior(scores: torch.Tensor, image: int, location: int) -> torch.Tensor:
    others = torch.cat([scores[image, 0, j] for j in range(len(scores)) if j != image])
    return torch.log_softmax(torch.cat([scores[image, 0, image, location].view(1), others]), dim=0)[0]
