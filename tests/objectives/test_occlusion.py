"""What is hidden: always a whole block, never all of them; what is filled in: the image's mean."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import max_pool2d, max_pool3d

from medim.objectives.occlusion import check_block, draw_cube_mask, draw_occlusion_mask, occlude_image
from medim.types import UsageError


def blocks(hidden: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) each: does some cube of side `block` lie wholly in the hidden part, and some in the visible one?"""
    pool = max_pool2d if hidden.ndim == 4 else max_pool3d
    some_hidden = pool(hidden.float(), block, stride=1).flatten(1)
    some_visible = pool((~hidden).float(), block, stride=1).flatten(1)
    return (some_visible == 0).any(dim=1), (some_hidden == 0).any(dim=1)


@pytest.mark.parametrize(
    ("shape", "block", "count"),
    [((32, 32), 10, 5000), ((20, 12), 10, 2500), ((11, 7), 3, 2500), ((12, 10, 8), 4, 6000), ((8, 5, 9), 4, 4000)],
)
def test_in_every_draw_one_block_is_hidden_and_one_is_visible(shape: tuple[int, ...], block: int, count: int) -> None:
    hidden = draw_occlusion_mask(count, shape, block, torch.Generator().manual_seed(0))
    assert hidden.shape == (count, 1, *shape)
    assert hidden.dtype == torch.bool
    some_hidden, some_visible = blocks(hidden, block)
    assert some_hidden.all()
    assert some_visible.all()


@pytest.mark.parametrize("shape", [(24, 16), (12, 10, 8)])
def test_draws_are_boxes_and_complements_and_reach_every_voxel(shape: tuple[int, ...]) -> None:
    hidden = draw_occlusion_mask(2000, shape, 4, torch.Generator().manual_seed(1))[:, 0]
    boxes = torch.stack([_is_box(mask) for mask in hidden[:300]])
    complements = torch.stack([_is_box(~mask) for mask in hidden[:300]])
    assert (boxes | complements).all()
    assert 0.4 < boxes.float().mean() < 0.7  # some complements of a slab are boxes themselves
    share = hidden.float().mean(dim=0)
    assert share.min() > 0.2
    assert share.max() < 0.8
    for axis in range(len(shape)):  # no side is preferred
        torch.testing.assert_close(share, share.flip(axis), rtol=0, atol=0.1)


def test_the_same_generator_hides_the_same_and_the_next_draw_something_else() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = draw_occlusion_mask(8, (16, 16), 4, generator), draw_occlusion_mask(8, (16, 16), 4, generator)
    assert torch.equal(first, draw_occlusion_mask(8, (16, 16), 4, torch.Generator().manual_seed(2)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("shape", "block"), [((19, 19), 10), ((32, 9), 10), ((8, 8, 3), 4), ((8, 8), 0)])
def test_a_view_too_small_for_two_blocks_is_refused_with_what_would_do(shape: tuple[int, ...], block: int) -> None:
    with pytest.raises(UsageError, match=f"side {block}.*use larger views or a smaller occlusion block"):
        check_block(shape, block)
    with pytest.raises(UsageError):
        draw_occlusion_mask(1, shape, block, torch.Generator())


def test_a_view_of_exactly_two_blocks_is_split_in_the_middle() -> None:
    hidden = draw_occlusion_mask(50, (8, 4), 4, torch.Generator().manual_seed(3))[:, 0]
    halves = hidden.view(50, 2, 4, 4).flatten(2)
    assert torch.equal(halves.all(dim=2), halves.any(dim=2))
    assert torch.equal(halves[:, 0, 0], ~halves[:, 1, 0])
    assert 0 < halves[:, 0, 0].float().mean() < 1


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 4)])
def test_what_is_hidden_becomes_each_channels_mean_and_the_rest_stays(shape: tuple[int, ...]) -> None:
    image = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(4))
    before = image.clone()
    hidden = draw_occlusion_mask(3, shape, 3, torch.Generator().manual_seed(5))
    out = occlude_image(image, hidden)
    assert torch.equal(image, before)
    for n in range(3):
        for c in range(2):
            assert torch.equal(out[n, c][~hidden[n, 0]], image[n, c][~hidden[n, 0]])
            filled = out[n, c][hidden[n, 0]]
            torch.testing.assert_close(filled, image[n, c].mean().expand(filled.shape))


def _is_box(mask: torch.Tensor) -> torch.Tensor:
    places = mask.nonzero()
    extent = places.max(dim=0).values - places.min(dim=0).values + 1
    return torch.tensor(int(extent.prod()) == len(places))


@pytest.mark.parametrize("shape", [(16, 24), (12, 16, 8)])
def test_cubes_are_whole_and_of_the_share_asked_for(shape: tuple[int, ...]) -> None:
    cubes = draw_cube_mask(200, shape, 4, 0.6, torch.Generator().manual_seed(0))
    assert cubes.shape == (200, 1, *shape)
    assert cubes.float().mean() == pytest.approx(0.6, abs=0.02)
    assert not torch.equal(cubes[0], cubes[1])
    assert cubes.flatten(1).any(dim=1).all()
    assert not cubes.flatten(1).all(dim=1).any()
    edges = cubes[:, :, 1:] != cubes[:, :, :-1]  # along the first axis a change comes every block, at any offset
    rows = edges.flatten(3).any(dim=3).any(dim=1)
    assert rows.float().mean(dim=0).min() > 0.05
    gaps = [torch.nonzero(row).flatten().diff() for row in rows]
    assert all(int(gap) % 4 == 0 for gaps_ in gaps for gap in gaps_)
