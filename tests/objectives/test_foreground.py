"""A cell is kept where enough of it is tissue, whatever the air is normalised to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medim.models.encoders.convnet import ConvNet
from medim.objectives.foreground import area_weights, find_foreground_cells

HALVES: dict[str, Any] = {"origin": 0.5, "stride": 2}  # cell c covers the voxels 2 c and 2 c + 1


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 4)])
def test_a_cell_is_foreground_where_its_share_of_voxels_is_above_the_minimum(shape: tuple[int, ...]) -> None:
    image = torch.full((2, 2, *shape), -1.5)
    image[0, 0, :5] = 3.0  # half of the third row of cells
    image[1, 1, :, 4:6] = 2.0  # in the other channel
    noise = 0.1 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    image[[0, 1], [0, 1]] += noise  # in the air too
    grid = tuple(side // 2 for side in shape)
    for share, rows in ((0.4, 3), (0.6, 2)):
        inside = find_foreground_cells(image, grid, share, **HALVES).unflatten(1, grid)
        assert inside[0, :rows].all()
        assert not inside[0, rows:].any()
        assert inside[1, :, 2].all()
        assert inside[1].sum() == inside[1, :, 2].numel()
    assert not find_foreground_cells(torch.ones_like(image), grid, 0.01, **HALVES).any()


def test_neither_scale_nor_offset_of_an_image_plays_a_part() -> None:
    image = torch.randn(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    inside = find_foreground_cells(image, (4, 4), 0.9, origin=0.5, stride=2)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(find_foreground_cells(3 * image - 7, (4, 4), 0.9, origin=0.5, stride=2), inside)


@pytest.mark.parametrize("kernel_size", [3, 4])
@pytest.mark.parametrize("padding", [None, 0])
def test_a_cell_is_foreground_where_its_receptive_field_is_centred_on_tissue(
    kernel_size: int, padding: int | None
) -> None:
    """The encoder itself is the oracle: its constant weights sum the voxels around the centre of each cell."""
    options: dict[str, Any] = {"channels": (1, 1), "summary": "mean_max", "hidden": 0, "norm": "none"}
    encoder = ConvNet(1, 2, (32, 32), kernel_size=kernel_size, padding=padding, **options)
    for name, parameter in encoder.named_parameters():
        torch.nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    image = torch.zeros(1, 1, 32, 32)
    image[..., 12:14, 18:20] = 1.0
    level = encoder(image).maps[1][0, 0]
    mass = level / level.sum()
    place = {"origin": encoder.origins[1], "stride": encoder.strides[1]}
    shares = find_foreground_cells(image, tuple(level.shape), 0.01, **place).reshape(level.shape).double()
    for axis in (0, 1):
        centre = torch.arange(len(level)) * place["stride"] + place["origin"]
        of_encoder, of_cells = ((centre * part.sum(1 - axis)).sum() / part.sum() for part in (mass, shares))
        assert (of_encoder - (12.5, 18.5)[axis]).abs() < 1
        assert (of_cells - (12.5, 18.5)[axis]).abs() <= place["stride"] / 2


def test_the_mean_over_a_cell_counts_whole_and_partial_voxels_once() -> None:
    weights = area_weights(12, 3, origin=1.0, stride=4)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(3))
    torch.testing.assert_close(weights[:, 1], torch.tensor([0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]) / 8)
