"""A cell is kept where enough of it is tissue, whatever the air is normalised to."""

from __future__ import annotations

import pytest
import torch

from medim.objectives.foreground import find_foreground_cells


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 4)])
def test_a_cell_is_foreground_where_its_share_of_voxels_is_above_the_minimum(shape: tuple[int, ...]) -> None:
    image = torch.full((2, 2, *shape), -1.5)
    image[0, 0, :5] = 3.0  # half of the third row of cells
    image[1, 1, :, 4:6] = 2.0  # in the other channel
    noise = 0.1 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    image[[0, 1], [0, 1]] += noise  # in the air too
    grid = tuple(side // 2 for side in shape)
    for share, rows in ((0.4, 3), (0.6, 2)):
        inside = find_foreground_cells(image, grid, share).unflatten(1, grid)
        assert inside[0, :rows].all()
        assert not inside[0, rows:].any()
        assert inside[1, :, 2].all()
        assert inside[1].sum() == inside[1, :, 2].numel()
    assert not find_foreground_cells(torch.ones_like(image), grid, 0.01).any()


def test_neither_scale_nor_offset_of_an_image_plays_a_part() -> None:
    image = torch.randn(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    inside = find_foreground_cells(image, (4, 4), 0.9)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(find_foreground_cells(3 * image - 7, (4, 4), 0.9), inside)
