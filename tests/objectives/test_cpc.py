"""CPC: which local each context predicts, what it is told from, and that it learns what is there and nothing else."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medim.objectives.cpc import CPC, draw_others, flatten_cells, score_predictions
from medim.types import Features, UsageError, Views

GRIDS = [(6, 4), (5, 2, 3)]
every_grid = pytest.mark.parametrize("grid", GRIDS)
NO_VIEWS = Views(torch.zeros(0), torch.zeros(0))


def encode_of(local: torch.Tensor, seed: int = 0) -> Any:
    return SimpleNamespace(clean=Features((local,), torch.zeros(1)), generator=torch.Generator().manual_seed(seed))


def objective_of(grid: tuple[int, ...], channels: int = 4, **options: Any) -> CPC:
    torch.manual_seed(0)
    return CPC((channels,), len(grid), (grid,), **options)


def local_of(grid: tuple[int, ...], count: int = 3, channels: int = 4) -> torch.Tensor:
    return torch.randn(count, channels, *grid, generator=torch.Generator().manual_seed(1))


def at(map_: torch.Tensor, image: int, row: int, place: tuple[int, ...]) -> torch.Tensor:
    cell: Any = (image, slice(None), row, *place)
    return map_[cell]


def brute_force(prediction: torch.Tensor, target: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
    losses = []
    for i in range(len(target)):
        rivals = [j for j in range(len(target)) if j != i] if others is None else others[i].tolist()
        positive = (prediction[i] * target[i]).sum().exp()
        total = positive + torch.stack([(prediction[i] * target[j]).sum().exp() for j in rivals]).sum()
        losses.append(-(positive / total).log())
    return torch.stack(losses).mean()


class TestContrast:
    @pytest.mark.parametrize("number", [0, 5])
    def test_it_equals_a_loop_in_float64_value_and_gradient(self, number: int) -> None:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        others = draw_others(7, number, generator) if number else None
        fast, slow = cross_entropy(*score_predictions(made[0], made[1], others)), brute_force(made[0], made[1], others)
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
        for one, other in zip(torch.autograd.grad(fast, made), torch.autograd.grad(slow, made), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    def test_others_are_never_ones_own_and_all_equally_often(self) -> None:
        drawn = draw_others(5, 4000, torch.Generator().manual_seed(0))
        for own, row in enumerate(drawn):
            counts = torch.bincount(row, minlength=5)
            assert counts[own] == 0
            assert counts[torch.arange(5) != own].float() == pytest.approx(1000, rel=0.15)


@every_grid
@pytest.mark.parametrize("negatives", [0, 3])
def test_the_loss_is_that_of_a_loop_over_images_rows_and_columns(grid: tuple[int, ...], negatives: int) -> None:
    objective, local = objective_of(grid, steps=2, negatives=negatives, scale_scores=True), local_of(grid)
    encode = encode_of(local, seed=4)
    term = objective(encode, NO_VIEWS)["cpc"]
    context, draw = objective.context(local), torch.Generator().manual_seed(4)
    places: list[tuple[int, ...]] = list(product(*(range(side) for side in grid[1:])))
    losses, chances = [], []
    for k, predict in zip((2, 3), objective.predict, strict=True):
        wanted = list(product(range(3), range(grid[0] - k), places))
        prediction = torch.stack([predict(at(context, n, r, p)) for n, r, p in wanted]) / 2
        target = torch.stack([at(local, n, r + k, p) for n, r, p in wanted])
        others = draw_others(len(target), negatives, draw) if negatives else None
        losses.append(brute_force(prediction, target, others))
        chances.append(math.log(1 + negatives if negatives else len(target)))
    assert term.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert term.chance == pytest.approx(sum(chances) / 2)
    assert term.diagnostics["bound"].item() == pytest.approx(term.chance - term.loss.item(), abs=1e-5)


@every_grid
def test_no_prediction_of_a_row_moves_with_what_lies_below_it(grid: tuple[int, ...]) -> None:
    """What is predicted at row r + k must be made from rows up to r alone."""
    objective = objective_of(grid)
    seen: dict[int, torch.Tensor] = {}
    for place, predict in enumerate(objective.predict):
        predict.register_forward_hook(lambda _, __, out, place=place: seen.update({place: out}))
    local = local_of(grid).requires_grad_()
    objective(encode_of(local), NO_VIEWS)
    assert len(seen) == grid[0] - 2
    for place, out in seen.items():
        by_row = out.reshape(3, grid[0] - 2 - place, -1)
        for row in range(by_row.shape[1]):
            (found,) = torch.autograd.grad(by_row[:, row].square().sum(), local, retain_graph=True)
            assert found[:, :, : row + 1].abs().sum() > 0
            assert not found[:, :, row + 1 :].any()


@every_grid
def test_rows_that_follow_from_those_above_are_learnt_and_random_ones_are_not(grid: tuple[int, ...]) -> None:
    """A row is the one above with its channels moved on by one; fresh images each step, so none is learnt by heart."""
    found = {}
    for follow in (True, False):
        objective = objective_of(grid, channels=8, steps=2, layers=1)
        optimiser = torch.optim.Adam(objective.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(0)
        for _ in range(120):
            local = torch.randn(8, 8, *grid, generator=generator)
            if follow:
                local = torch.stack([local[:, :, 0].roll(row, dims=1) for row in range(grid[0])], dim=2)
            term = objective(encode_of(local), NO_VIEWS)["cpc"]
            optimiser.zero_grad()
            term.loss.backward()
            optimiser.step()
        assert term.chance is not None
        found[follow] = term.loss.item() / term.chance
        assert (term.diagnostics["retrieval"] > 0.5) == follow
    assert found[True] < 0.6
    assert found[False] > 0.95


def test_steps_end_where_the_grid_does() -> None:
    assert [len(objective_of((rows, 3)).predict) for rows in (3, 4, 7, 20)] == [1, 2, 5, 5]
    assert len(objective_of((3, 3), skip=0).predict) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": 5}, r"grid of \(6, 4\).*skip \+ 2 = 7 rows"),
        ({"skip": -1}, "skip of 0 or more"),
        ({"steps": 0}, "steps of 1 or more"),
        ({"negatives": -1}, r"cpc\.negatives"),
        ({"feature_level": 1}, r"cpc\.feature_level"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective_of((6, 4), **options)


def test_a_grid_it_was_not_built_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"built for a grid of \(6, 4\), got \(4, 6\)"):
        objective_of((6, 4))(encode_of(local_of((4, 6))), NO_VIEWS)


def test_cells_keep_image_row_and_column_in_order() -> None:
    map_ = torch.arange(2 * 3 * 4.0).reshape(2, 1, 3, 4)
    assert torch.equal(flatten_cells(map_), torch.arange(24.0).unsqueeze(1))
    assert isinstance(objective_of((6, 4)).predict[0], nn.Linear)
