"""Each view against the other: the summary and one cell, told from all locals of all other images."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medim.models.encoders import UNetEncoder
from medim.objectives.amdim import AMDIM
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features, UsageError, Views

GRIDS = [((4, 6), (2, 3)), ((2, 4, 3), (1, 2, 3))]  # fine to coarse
BATCH, WIDTH = 3, 8
every_grid = pytest.mark.parametrize("grids", GRIDS)
NO_VIEWS = Views(torch.zeros(0), torch.zeros(0))


def features_of(grids: tuple[tuple[int, ...], ...], summary_channels: int = 5) -> Features:
    """Two views each of `BATCH` images, side by side."""
    generator = torch.Generator().manual_seed(7)
    maps = tuple(torch.randn(2 * BATCH, c, *grid, generator=generator) for c, grid in zip((4, 6), grids, strict=True))
    return Features(maps, torch.randn(2 * BATCH, summary_channels, generator=generator))


def encode_of(features: Features, seed: int = 0) -> Any:
    return SimpleNamespace(clean=features, generator=torch.Generator().manual_seed(seed))


def objective_of(**options: Any) -> AMDIM:
    """With its zero-initialised layers moved, as after a step."""
    torch.manual_seed(0)
    objective = AMDIM((4, 6), 5, 2, **{"width": WIDTH, **options})
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return objective


@torch.no_grad()
def loop(sources: torch.Tensor, targets: torch.Tensor, clip: float, penalty: float) -> float:
    """One pair by its definition: sources (V, B, D), targets (V, B, D, L), mean over both directions."""
    total = 0.0
    for v in (0, 1):
        source, target = sources[v], targets[1 - v]
        raw = torch.tensor([[[s @ x / math.sqrt(len(s)) for x in t.T] for t in target] for s in source])  # (B, B, L)
        score = clip * torch.tanh(raw / clip)
        losses = []
        for i in range(len(source)):
            negatives = [score[i, j, m] for j in range(len(target)) if j != i for m in range(score.shape[2])]
            for k in range(score.shape[2]):
                losses.append(torch.logsumexp(torch.stack([score[i, i, k], *negatives]), dim=0) - score[i, i, k])
        total += (torch.stack(losses).mean() + penalty * raw.square().mean()).item() / 2
    return total


@every_grid
def test_the_loss_equals_the_loop_over_three_pairs_and_both_directions(grids: tuple[tuple[int, ...], ...]) -> None:
    features = features_of(grids)
    objective = objective_of(clip=2.0, score_penalty=0.1)
    term = objective(encode_of(features, seed=4), NO_VIEWS)["amdim"]
    objective.double()
    first, second = (
        head(features.maps[level].double().flatten(2))
        for head, level in zip(objective.heads, (-1, -2), strict=True)  # the first map is the coarser one
    )
    summary = objective.summary(features.summary.double())
    cells = torch.randint(first.shape[2], (2 * BATCH, 1, 1), generator=torch.Generator().manual_seed(4)).flatten()
    source = first[torch.arange(2 * BATCH), :, cells]
    by_view = [torch.stack([x[0::2], x[1::2]]) for x in (summary, source, first, second)]
    summary, source, first, second = by_view
    pairs = [(summary, first), (summary, second), (source, first)]
    assert term.loss.item() == pytest.approx(sum(loop(a, b, 2.0, 0.1) for a, b in pairs), rel=1e-5)


@every_grid
def test_features_that_tell_nothing_cost_chance(grids: tuple[tuple[int, ...], ...]) -> None:
    features = features_of(grids)
    flat = Features(tuple(torch.ones_like(m) for m in features.maps), torch.ones_like(features.summary))
    objective = AMDIM((4, 6), 5, 2, width=WIDTH)
    term = objective(encode_of(flat), NO_VIEWS)["amdim"]
    fine, coarse = (math.log(1 + (BATCH - 1) * math.prod(grid)) for grid in grids)
    assert term.chance == pytest.approx(2 * coarse + fine)
    assert term.loss.item() == pytest.approx(2 * coarse + fine, abs=1e-4)


def known(code: torch.Tensor, size: float = 100.0) -> tuple[Features, AMDIM]:
    """Features that are, at every cell of both maps and in the summary, the (2 B, D) code; embedded as they are."""
    objective = AMDIM((4, 4), 4, 2, width=4, score_penalty=0.0, clip=0.0)
    objective.heads = nn.ModuleList([nn.Identity(), nn.Identity()])
    objective.summary = nn.Sequential(nn.Identity())
    code = size * code
    maps = tuple(code[:, :, None, None].expand(-1, -1, *grid) for grid in ((4, 6), (2, 3)))
    return Features(maps, code), objective


def test_ones_own_image_is_no_negative() -> None:
    """Planted: were the other cells of the same image let in, cells that are all alike would cost the log of them."""
    features, objective = known(torch.eye(4).repeat_interleave(2, dim=0))
    term = objective(encode_of(features), NO_VIEWS)["amdim"]
    assert term.loss.item() == pytest.approx(0, abs=1e-4)
    assert term.diagnostics["retrieval"] == 1
    for name, cells in (("summary_to_first", 6), ("summary_to_second", 24), ("first_to_first", 6)):
        assert term.diagnostics[name].item() == pytest.approx(math.log(1 + 3 * cells), abs=1e-4)


def test_a_view_meets_the_other_one_never_itself() -> None:
    """Planted: views that each know their image, by codes of which the other view's are another's, fail always."""
    code = torch.eye(4)
    other = code.roll(1, dims=0)
    features, objective = known(torch.stack([code, other], dim=1).flatten(0, 1))
    term = objective(encode_of(features), NO_VIEWS)["amdim"]
    assert term.diagnostics["retrieval"] == 0
    assert term.loss.item() > 100


def test_the_source_cell_is_drawn_an_image_from_the_generator() -> None:
    features = features_of(((4, 6), (2, 3)))
    objective = objective_of()
    bounds = [objective(encode_of(features, seed), NO_VIEWS)["amdim"].diagnostics for seed in (0, 0, 1)]
    assert bounds[0]["first_to_first"] == bounds[1]["first_to_first"] != bounds[2]["first_to_first"]
    assert bounds[0]["summary_to_second"] == bounds[2]["summary_to_second"]


def test_a_head_starts_as_a_noisy_copy_and_a_summary_of_the_width_has_none() -> None:
    torch.manual_seed(0)
    objective = AMDIM((4, 6), WIDTH, 2, width=WIDTH)
    x = torch.randn(20, 6, 5)
    alike = objective.heads[0](x)[:, :6]  # the coarser map's
    expected = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True, unbiased=False)
    assert (alike - expected).abs().max() < 0.2
    assert sum(p.numel() for p in objective.summary.parameters()) == 2 * WIDTH, "batch norm alone"


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 8)])
def test_two_noisy_views_are_told_from_other_images(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = UNetEncoder(1, len(shape), channels=(4, 8), norm="bn", summary_channels=8)
    objective = AMDIM(encoder.channels, 8, 2, width=16)
    optimiser = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=0.01)
    image = torch.linspace(-2, 2, 6).view(6, *[1] * (2 + len(shape)))  # told by brightness
    for step in range(30):
        noise = 0.1 * torch.randn(6, 2, 1, *shape)
        views = Views(image + noise, torch.zeros(6, 2, len(shape)))
        encode = StepEncoder(encoder, None, views, torch.Generator().manual_seed(step))
        term = objective(encode, views)["amdim"]
        optimiser.zero_grad()
        term.loss.backward()
        optimiser.step()
    assert term.chance is not None
    assert term.loss.item() < term.chance - 1
    assert term.diagnostics["retrieval"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view_count": 1}, "Set views.count: 2"),
        ({"levels": (1, 1)}, "two different maps"),
        ({"levels": (1, -1)}, "two different maps"),
        ({"levels": (0, 2)}, r"amdim\.levels: expected 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AMDIM(**{"channels": (4, 6), "summary_channels": 5, "view_count": 2, **options})
