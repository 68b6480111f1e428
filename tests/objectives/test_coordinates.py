"""Where a location lies, axis by axis, on grids that are neither square nor cubic."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from medim.objectives.coordinates import Coordinates
from medim.types import Features, UsageError, Views

GRIDS = [(3, 5), (5, 3), (2, 3, 4), (4, 4, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS)
NO_VIEWS = Views(torch.zeros(0), torch.zeros(0))


def encode_of(local: torch.Tensor, summary: torch.Tensor | None = None, seed: int = 0) -> Any:
    summary = torch.zeros(len(local), 4) if summary is None else summary
    return SimpleNamespace(clean=Features((local,), summary), generator=torch.Generator().manual_seed(seed))


def coordinate_map(grid: tuple[int, ...], count: int = 3) -> torch.Tensor:
    """(N, sum(grid), ...): each location carries the one-hot code of its own coordinates."""
    out = torch.zeros(sum(grid), *grid)
    for place in torch.cartesian_prod(*(torch.arange(cells) for cells in grid)).tolist():
        code = torch.cat([one_hot(torch.tensor(i), cells) for i, cells in zip(place, grid, strict=True)])
        out[(slice(None), *place)] = code.float()
    return out.expand(count, *out.shape)


def objective_of(grid: tuple[int, ...], **options: Any) -> Coordinates:
    torch.manual_seed(0)
    return Coordinates((sum(grid),), 4, (grid,), feature_level=0, **{"hidden": 16, **options})


@every_grid
@pytest.mark.parametrize("points", [0, 4])
def test_logits_that_hold_the_coordinates_cost_nothing(grid: tuple[int, ...], points: int) -> None:
    """The predictor is taken out: targets must fit the map cell by cell and axis by axis."""
    objective = objective_of(grid, use_summary=False, points=points)
    objective.predictor = nn.Identity()  # type: ignore[assignment]
    right = 100 * coordinate_map(grid)
    assert objective(encode_of(right), NO_VIEWS)["coordinates"].loss.item() == pytest.approx(0, abs=1e-4)
    for axis in range(2, right.ndim):
        wrong = right.roll(1, dims=axis)
        assert objective(encode_of(wrong), NO_VIEWS)["coordinates"].loss.item() == pytest.approx(100, rel=1e-3)


@every_grid
def test_equal_logits_cost_the_sum_of_the_axes_entropies(grid: tuple[int, ...]) -> None:
    objective = objective_of(grid, use_summary=False)
    objective.predictor = nn.Identity()  # type: ignore[assignment]
    term = objective(encode_of(torch.zeros(2, sum(grid), *grid)), NO_VIEWS)["coordinates"]
    assert term.chance == pytest.approx(sum(math.log(cells) for cells in grid))
    assert term.loss.item() == pytest.approx(term.chance, rel=1e-5)


@every_grid
def test_planted_coordinates_are_learnt_and_constant_locals_are_not(grid: tuple[int, ...]) -> None:
    found = {}
    for name, local in (("planted", coordinate_map(grid)), ("constant", torch.ones(3, sum(grid), *grid))):
        objective = objective_of(grid)
        optimiser = torch.optim.Adam(objective.parameters(), lr=0.02)
        for _ in range(40):
            term = objective(encode_of(local), NO_VIEWS)["coordinates"]
            optimiser.zero_grad()
            term.loss.backward()
            optimiser.step()
        found[name] = term.loss.item() / (term.chance or math.nan)
    assert found["planted"] < 0.1
    assert found["constant"] == pytest.approx(1, abs=0.05)


def test_points_are_drawn_without_repetition_from_the_generator() -> None:
    objective = objective_of((4, 6), points=24 - 1, use_summary=False)
    seen: list[torch.Tensor] = []
    objective.predictor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    local = torch.arange(24.0).view(1, 1, 4, 6).expand(2, 10, 4, 6)
    for seed in (0, 0, 1):
        objective(encode_of(local, seed=seed), NO_VIEWS)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    for image in seen[0][:, 0].view(2, 23):
        assert len(image.unique()) == 23
    assert not torch.equal(seen[0][:23], seen[0][23:]), "each image has its own points"


def test_without_sight_of_the_summary_no_gradient_reaches_it() -> None:
    for use_summary in (True, False):
        summary = torch.randn(3, 4, requires_grad=True)
        local = torch.randn(3, 8, 3, 5, requires_grad=True)
        term = objective_of((3, 5), use_summary=use_summary)(encode_of(local, summary), NO_VIEWS)["coordinates"]
        grads = torch.autograd.grad(term.loss, (summary, local), allow_unused=True)
        assert (grads[0] is not None) == use_summary
        assert grads[1] is not None
        assert grads[1].abs().sum() > 0


def test_a_grid_it_was_not_built_for_and_a_level_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"built for a grid of \(3, 5\), got \(5, 3\)"):
        objective_of((3, 5))(encode_of(torch.zeros(2, 8, 5, 3)), NO_VIEWS)
    with pytest.raises(UsageError, match=r"coordinates\.feature_level: expected 0 to 0.*got 1"):
        Coordinates((4,), 4, ((3, 5),), feature_level=1)


def test_a_negative_level_counts_from_the_coarsest_map() -> None:
    objective = Coordinates((2, 4, 6), 4, ((12, 20), (6, 10), (3, 5)), feature_level=-2, hidden=8)
    maps = (torch.zeros(2, 2, 12, 20), torch.zeros(2, 4, 6, 10), torch.zeros(2, 6, 3, 5))
    encode = SimpleNamespace(clean=Features(maps, torch.zeros(2, 4)), generator=torch.Generator())
    assert objective(encode, NO_VIEWS)["coordinates"].chance == pytest.approx(math.log(6) + math.log(10))


class Oracle(nn.Module):
    """Reads target and source off their one-hot codes and answers the offset; `sign` -1 mistakes one for the other."""

    def __init__(self, grid: tuple[int, ...], sign: int = 1) -> None:
        super().__init__()
        self.grid, self.sign = grid, sign
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = [code.argmax(dim=1) for code in x.split([*self.grid, *self.grid], dim=1)]
        offsets = [a - b for a, b in zip(codes[: len(self.grid)], codes[len(self.grid) :], strict=True)]
        self.seen.append(torch.stack(offsets))
        logits = [one_hot(self.sign * d + m - 1, 2 * m - 1) for d, m in zip(offsets, self.grid, strict=True)]
        return 100 * torch.cat(logits, dim=1).float()


@every_grid
@pytest.mark.parametrize("points", [0, 4])
def test_the_offset_of_target_from_source_costs_nothing_and_its_opposite_much(
    grid: tuple[int, ...], points: int
) -> None:
    objective = objective_of(grid, kind="relative", use_summary=False, points=points)
    local = coordinate_map(grid, count=64)
    objective.predictor = oracle = Oracle(grid)  # type: ignore[assignment]
    assert objective(encode_of(local), NO_VIEWS)["coordinates"].loss.item() == pytest.approx(0, abs=1e-4)
    (offsets,) = oracle.seen
    for axis, cells in zip(offsets, grid, strict=True):
        assert set(axis.tolist()) == set(range(1 - cells, cells))
    objective.predictor = Oracle(grid, sign=-1)  # type: ignore[assignment]
    assert objective(encode_of(local), NO_VIEWS)["coordinates"].loss.item() > 10


def test_an_image_has_one_source_of_its_own() -> None:
    objective = objective_of((4, 6), kind="relative", use_summary=False)
    seen: list[torch.Tensor] = []
    objective.predictor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    local = torch.arange(24.0).view(1, 1, 4, 6).expand(8, 10, 4, 6)
    for seed in (0, 0, 1):
        objective(encode_of(local, seed=seed), NO_VIEWS)
    targets, sources = seen[0][:, 0].view(8, 24), seen[0][:, 10].view(8, 24)
    assert torch.equal(targets, torch.arange(24.0).expand(8, 24)), "marginalised over all targets"
    assert (sources == sources[:, :1]).all()
    assert len(sources[:, 0].unique()) > 1
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@every_grid
def test_the_chance_of_offsets_is_the_entropy_of_all_pairs_of_places(grid: tuple[int, ...]) -> None:
    """Who knows how frequent each offset is, and nothing else, pays chance on average over the sources."""
    frequent = [Counter(a - b for a in range(cells) for b in range(cells)) for cells in grid]
    shares = [torch.tensor([count[d] / m**2 for d in range(1 - m, m)]) for count, m in zip(frequent, grid, strict=True)]
    entropy = sum(-(share * share.log()).sum().item() for share in shares)
    objective = objective_of(grid, kind="relative", use_summary=False)
    with torch.no_grad():
        objective.predictor[-1].weight.zero_()
        objective.predictor[-1].bias.copy_(torch.cat(shares).log())
    term = objective(encode_of(torch.zeros(2000, sum(grid), *grid)), NO_VIEWS)["coordinates"]
    assert term.chance == pytest.approx(entropy, rel=1e-6)
    assert term.loss.item() == pytest.approx(entropy, rel=0.02)
    assert entropy < sum(math.log(2 * cells - 1) for cells in grid)


def test_planted_coordinates_tell_offsets_and_constant_locals_do_not() -> None:
    grid, found = (3, 5), {}
    for name, local in (("planted", coordinate_map(grid, 8)), ("constant", torch.ones(8, sum(grid), *grid))):
        objective = objective_of(grid, kind="relative", hidden=32)
        optimiser = torch.optim.Adam(objective.parameters(), lr=0.02)
        for step in range(60):
            term = objective(encode_of(local, seed=step), NO_VIEWS)["coordinates"]
            optimiser.zero_grad()
            term.loss.backward()
            optimiser.step()
        with torch.no_grad():
            held_out = [objective(encode_of(local, seed=step), NO_VIEWS)["coordinates"] for step in range(1000, 1030)]
        found[name] = sum(term.loss.item() for term in held_out) / len(held_out) / (held_out[0].chance or math.nan)
    assert found["planted"] < 0.4
    assert found["constant"] == pytest.approx(1, abs=0.1)
