"""Every bound against loops that read like its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from medim.objectives.mutual_information import ESTIMATORS, classes, dv, infonce, jsd, retrieval

SHAPES = [
    pytest.param((batch, globals_, batch, locations), id=f"B{batch}-G{globals_}-L{locations}")
    for batch, globals_, locations in [(2, 1, 1), (3, 1, 4), (4, 3, 5), (8, 1, 6), (5, 2, 2 * 3 * 2), (2, 7, 2)]
]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def scores_of(shape: tuple[int, ...], scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def pairs(scores: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    batch, globals_, _, locations = scores.shape
    positive, negative = [], []
    for i, g, j, k in itertools.product(range(batch), range(globals_), range(batch), range(locations)):
        (positive if i == j else negative).append(scores[i, g, j, k])
    return positive, negative


def loop_infonce(scores: torch.Tensor) -> torch.Tensor:
    batch, globals_, _, locations = scores.shape
    losses = []
    for i, g, k in itertools.product(range(batch), range(globals_), range(locations)):
        others = [scores[i, g, j, m] for j in range(batch) if j != i for m in range(locations)]
        chosen = torch.stack([scores[i, g, i, k], *others])
        losses.append(-torch.log_softmax(chosen, dim=0)[0])
    return math.log(1 + (batch - 1) * locations) - torch.stack(losses).mean()


def loop_jsd(scores: torch.Tensor) -> torch.Tensor:
    positive, negative = pairs(scores)
    gain = sum(math.log(2) - torch.log1p(torch.exp(-t)) for t in positive) / len(positive)
    cost = sum(torch.log1p(torch.exp(-t)) + t - math.log(2) for t in negative) / len(negative)
    return torch.as_tensor(gain - cost)


def loop_dv(scores: torch.Tensor) -> torch.Tensor:
    positive, negative = pairs(scores)
    return sum(positive) / len(positive) - torch.log(sum(torch.exp(t) for t in negative) / len(negative))  # type: ignore[return-value]


LOOPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"infonce": loop_infonce, "jsd": loop_jsd, "dv": loop_dv}


@every_shape
@pytest.mark.parametrize("name", LOOPS)
def test_a_bound_and_its_gradient_equal_the_loops(name: str, shape: tuple[int, ...]) -> None:
    ours, theirs = scores_of(shape).requires_grad_(), scores_of(shape).requires_grad_()
    bound, loop = ESTIMATORS[name](ours), LOOPS[name](theirs)  # type: ignore[index]
    torch.testing.assert_close(bound.double(), loop, rtol=1e-4, atol=1e-5)
    bound.backward(), loop.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


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
def test_extreme_scores_stay_finite_with_finite_gradients(name: str) -> None:
    scores = (1e4 * scores_of((4, 1, 4, 3)).float()).requires_grad_()
    bound = ESTIMATORS[name](scores)  # type: ignore[index]
    bound.backward()
    assert bound.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_other_locations_of_the_same_image_are_in_no_denominator() -> None:
    """An own score of 1e4 settles its own class and leaves the loss of every other positive as it was."""
    scores = scores_of((4, 1, 4, 5)).float()
    chosen = scores.clone()
    chosen[1, 0, 1, 2] = 1e4
    count, top = 4 * 5, math.log(classes(scores))
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
def test_gradients_raise_own_pairs_and_lower_all_others(name: str) -> None:
    scores = scores_of((4, 2, 4, 3), scale=0.5).float().requires_grad_()
    ESTIMATORS[name](scores).backward()  # type: ignore[index]
    assert scores.grad is not None
    own = torch.eye(4, dtype=torch.bool)
    gradient = scores.grad.transpose(1, 2)
    assert (gradient[own] > 0).all()
    assert (gradient[~own] < 0).all()


@pytest.mark.parametrize(("batch", "locations"), [(2, 1), (3, 4), (16, 512)])
def test_the_classes_are_one_positive_and_all_locations_of_the_others(batch: int, locations: int) -> None:
    assert classes(torch.zeros(batch, 1, batch, locations)) == 1 + (batch - 1) * locations


def test_retrieval_counts_summaries_whose_own_image_scores_best() -> None:
    scores = torch.zeros(4, 1, 4, 3)
    scores[torch.arange(4), 0, torch.tensor([0, 1, 2, 0])] = 1.0  # the last one prefers the first image
    assert retrieval(scores).item() == pytest.approx(0.75)
    assert retrieval(torch.zeros(4, 1, 4, 3)).item() == pytest.approx(0.25)


def test_retrieval_takes_the_mean_over_locations_and_globals() -> None:
    scores = torch.zeros(2, 2, 2, 2)
    scores[0, 0, 1, 0] = 3.0  # one loud location of the other image
    scores[0, :, 0, :] = 1.0  # four of its own
    scores[1, :, 1, :] = 1.0
    assert retrieval(scores).item() == 1.0


def _log_posterior(scores: torch.Tensor, image: int, location: int) -> torch.Tensor:
    others = torch.cat([scores[image, 0, j] for j in range(len(scores)) if j != image])
    return torch.log_softmax(torch.cat([scores[image, 0, image, location].view(1), others]), dim=0)[0]
