"""What every entry of ESTIMATORS promises: a lower bound in nats, 0 without information, larger is better."""

from __future__ import annotations

import math

import pytest
import torch

from medim.objectives.mutual_information import ESTIMATORS, EstimatorName

GRIDS = {2: (3, 4), 3: (2, 3, 2)}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
both_dims = pytest.mark.parametrize("dims", [2, 3])


def scores_of(dims: int, batch: int = 5) -> torch.Tensor:
    locations = math.prod(GRIDS[dims])
    return torch.randn(batch, 2, batch, locations, generator=torch.Generator().manual_seed(dims))


@every_estimator
@both_dims
def test_equal_scores_of_zero_carry_no_information(name: EstimatorName, dims: int) -> None:
    assert ESTIMATORS[name](torch.zeros_like(scores_of(dims))).item() == pytest.approx(0, abs=1e-5)


@every_estimator
@both_dims
def test_the_bound_ignores_the_order_of_images_globals_and_locations(name: EstimatorName, dims: int) -> None:
    scores = scores_of(dims)
    images, places = torch.tensor([4, 2, 0, 1, 3]), torch.randperm(scores.shape[3])
    shuffled = scores[images][:, :, images].flip(1)[..., places]
    torch.testing.assert_close(ESTIMATORS[name](shuffled), ESTIMATORS[name](scores))


@every_estimator
@both_dims
def test_a_volume_scores_as_its_flattened_locations(name: EstimatorName, dims: int) -> None:
    """A strided view, as a permuted grid leaves it, is as good as a copy."""
    grid = scores_of(dims).unflatten(3, GRIDS[dims])
    turned = grid.movedim(-1, 3).flatten(3)
    torch.testing.assert_close(ESTIMATORS[name](turned), ESTIMATORS[name](grid.flatten(3)))


@every_estimator
@both_dims
def test_telling_own_pairs_from_others_raises_the_bound(name: EstimatorName, dims: int) -> None:
    scores = scores_of(dims)
    own = torch.eye(len(scores)).view(len(scores), 1, len(scores), 1)
    bounds = [ESTIMATORS[name](scores + gap * (own - 0.5)).item() for gap in (-2.0, 0.0, 2.0, 6.0)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1] - 1


@every_estimator
@both_dims
def test_scores_in_bf16_are_computed_in_fp32(name: EstimatorName, dims: int) -> None:
    scores = scores_of(dims).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        bound = ESTIMATORS[name](scores)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound, ESTIMATORS[name](scores.float()))


@every_estimator
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (3, 1, 2, 4)])
def test_scores_without_others_are_refused(name: EstimatorName, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, G, B, L\) with B of at least 2, got"):
        ESTIMATORS[name](torch.zeros(shape))
