"""A context knows the rows up to its own, as far as its layers reach, and nothing below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from medim.models.cpc_context import CONTEXT_NETWORKS, PixelCNNContextNetwork

GRIDS = [(6, 5), (5, 3, 4)]
every_grid = pytest.mark.parametrize("grid", GRIDS)


every_network = pytest.mark.parametrize("network", CONTEXT_NETWORKS)


def context_of(grid: tuple[int, ...], layers: int, network: str = "vertical") -> Any:
    torch.manual_seed(0)
    return CONTEXT_NETWORKS[network](len(grid), 3, layers=layers)


def dependence(context: Callable[[torch.Tensor], torch.Tensor], grid: tuple[int, ...]) -> torch.Tensor:
    """(rows, rows) bool: whether the context at row r moves with the map at row r', by the gradient."""
    generator = torch.Generator().manual_seed(1)
    local = torch.randn(2, 3, *grid, generator=generator, requires_grad=True)
    out = context(local)
    weight = torch.randn(out.shape, generator=generator)
    rows = []
    for row in range(grid[0]):
        (found,) = torch.autograd.grad((out * weight)[:, :, row].sum(), local, retain_graph=True)
        rows.append((found != 0).transpose(0, 2).flatten(1).any(dim=1))
    return torch.stack(rows)


def expected(rows: int, layers: int) -> torch.Tensor:
    up = torch.arange(rows).unsqueeze(1) - torch.arange(rows)
    return (up >= 0) & (up <= layers)


@every_grid
@every_network
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_context_depends_on_the_rows_above_within_reach_and_on_no_row_below(
    grid: tuple[int, ...], layers: int, network: str
) -> None:
    assert torch.equal(dependence(context_of(grid, layers, network), grid), expected(grid[0], layers))


@every_grid
def test_a_convolution_that_sees_below_and_a_norm_over_the_grid_are_caught(grid: tuple[int, ...]) -> None:
    unmasked = context_of(grid, 2)
    kind = nn.Conv2d if len(grid) == 2 else nn.Conv3d
    unmasked.layers[1].causal = kind(3, 6, 3, padding=1)
    assert dependence(unmasked, grid).triu(1).any()
    normed = context_of(grid, 2)
    assert dependence(nn.Sequential(nn.GroupNorm(1, 3), normed), grid).triu(1).any()


@every_grid
@every_network
def test_a_context_sees_columns_to_both_sides(grid: tuple[int, ...], network: str) -> None:
    local = torch.randn(1, 3, *grid, requires_grad=True)
    middle = tuple(side // 2 for side in grid[1:])
    cell = context_of(grid, 1, network)(local)[(0, slice(None), 2, *middle)]
    (found,) = torch.autograd.grad(cell.square().sum(), local)
    seen = (found[0] != 0).any(dim=0)
    assert seen.sum() == 2 * 3 ** (len(grid) - 1)
    for axis, place in enumerate(middle, start=1):
        columns = seen.transpose(0, axis).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert columns == [place - 1, place, place + 1]


def test_both_stacks_are_those_of_the_gated_pixelcnn() -> None:
    """Compare with the layers of Lowe et al.: 3x3 kernels with a masked lower row, and 1x3 kernels."""
    torch.manual_seed(0)
    network = PixelCNNContextNetwork(2, 3, layers=2)
    local = torch.randn(2, 3, 4, 5)
    vertical = horizontal = local

    def gate(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x[:, :3]) * torch.sigmoid(x[:, 3:])

    for number, layer in enumerate(network.layers):
        part: Any = layer
        masked = torch.cat([part.vertical[1].weight, torch.zeros(6, 3, 1, 3)], dim=2)
        above = conv2d(vertical, masked, part.vertical[1].bias, padding=1)
        row = conv2d(horizontal, part.horizontal.weight, part.horizontal.bias, padding=(0, 1))
        hidden = part.mix(gate(row + part.vertical_to_horizontal(above)))
        vertical = gate(above + part.residual(vertical)) if number else gate(above)
        horizontal = horizontal + hidden if number else hidden
    torch.testing.assert_close(network(local), network.output(horizontal))
