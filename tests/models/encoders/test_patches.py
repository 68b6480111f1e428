from __future__ import annotations

from typing import Any

import pytest
import torch

from medim.models.encoders import ENCODERS, PatchEncoder
from medim.models.encoders.patches import unfold_patches
from medim.types import UsageError

SMALL: dict[str, Any] = {
    "name": "convnet",
    "channels": [4, 8],
    "norm": "none",
    "activation": "leaky_relu",  # no rectifier sleeps
    "hidden": 0,
    "summary_channels": 6,
}


@pytest.mark.parametrize(("dims", "stride"), [(2, 0), (2, 3), (3, 0)])
def test_every_cell_sees_its_crop_and_nothing_else(dims: int, stride: int) -> None:
    """The gradient of each cell, in training as in use, is 0 outside its crop and nowhere 0 inside."""
    torch.manual_seed(0)
    net = PatchEncoder(1, dims, ENCODERS, patch=8, stride=stride, encoder=SMALL)
    step = stride or 4
    shape = (18, 13, 12)[:dims]
    image = torch.randn(2, 1, *shape, requires_grad=True)
    map_ = net(image).maps[0]
    assert map_.shape[2:] == tuple((side - 8) // step + 1 for side in shape)
    for cell in torch.cartesian_prod(*(torch.arange(cells) for cells in map_.shape[2:])).tolist():
        (gradient,) = torch.autograd.grad(map_[(1, slice(None), *cell)].sum(), image, retain_graph=True)
        crop = (1, 0, *(slice(step * n, step * n + 8) for n in cell))
        seen = gradient != 0
        assert seen[crop].all()
        assert seen.sum() == 8**dims


@pytest.mark.parametrize(("norm", "leaks"), [("none", False), ("gn", False), ("in", False), ("bn", True)])
def test_in_training_only_batch_norm_lets_crops_see_each_other(norm: str, leaks: bool) -> None:
    """Also the proof that the test above could fail."""
    torch.manual_seed(0)
    net = PatchEncoder(1, 2, ENCODERS, patch=8, encoder={**SMALL, "norm": norm})
    image = torch.randn(2, 1, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(image).maps[0][1, :, 0, 0].square().sum(), image)
    gradient[1, :, :8, :8] = 0
    assert (gradient.abs().max() > 1e-6) == leaks


def test_a_crop_lies_where_its_cell_does() -> None:
    image = torch.arange(2 * 6 * 8.0).view(1, 2, 6, 8)
    crops = unfold_patches(image, 4, 2)
    assert crops.shape == (1, 2, 3, 2, 4, 4)
    for i in range(2):
        for j in range(3):
            assert torch.equal(crops[0, i, j], image[0, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4])


def test_a_cell_is_what_the_encoder_of_crops_makes_of_its_crop() -> None:
    net = PatchEncoder(1, 2, ENCODERS, patch=8, encoder=SMALL).eval()
    image = torch.randn(3, 1, 16, 20)
    alone = net.crop(image[:, :, 4:12, 8:16]).summary
    torch.testing.assert_close(net(image).maps[0][:, :, 1, 2], alone)


@pytest.mark.parametrize("stride", [-1, 9])
def test_a_stride_that_skips_voxels_is_refused(stride: int) -> None:
    with pytest.raises(UsageError, match="patches: expected"):
        PatchEncoder(1, 2, ENCODERS, patch=8, stride=stride, encoder=SMALL)
