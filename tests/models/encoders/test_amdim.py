from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from medim.models.encoders import AMDIMEncoder
from medim.types import UsageError


def test_at_the_start_a_block_only_averages_and_fills_up_with_zeros() -> None:
    """Fixup: the residual branch ends in a convolution of zeros, so that the shortcut alone speaks."""
    net = AMDIMEncoder(1, 2, width=4, depth=3, summary_channels=20).eval()
    maps = net(torch.randn(2, 1, 32, 32)).maps
    assert torch.equal(maps[1], maps[0])
    torch.testing.assert_close(maps[2][:, :4], avg_pool2d(maps[1], 4, 2))
    assert maps[2][:, 4:].count_nonzero() == 0
    assert maps[2].shape[1] == 8


def test_the_summary_is_the_last_cell_after_batch_norm() -> None:
    net = AMDIMEncoder(1, 2, width=4, depth=1, summary_channels=16)
    features = net(torch.randn(8, 1, 32, 32))
    assert features.maps[-1].shape[2:] == (3, 3)
    assert features.summary.shape == (8, 16)
    torch.testing.assert_close(features.summary.mean(0), torch.zeros(16), atol=1e-5, rtol=0)


def test_a_larger_image_has_the_mean_of_its_last_cells() -> None:
    net = AMDIMEncoder(1, 2, width=4, depth=1, summary_channels=16).eval()
    image = torch.randn(1, 1, 36, 32)
    found = net(image).summary
    halves = [net(image[:, :, start : start + 32]).summary for start in (0, 4)]
    torch.testing.assert_close(found, torch.stack(halves).mean(0))


def test_no_border_tells_a_cell_where_it_lies() -> None:
    """An image of one grey has the same features everywhere: nothing is padded but the first layer of size 128."""
    net = AMDIMEncoder(1, 2, width=4, depth=2, summary_channels=16).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    for found in net(torch.ones(1, 1, 40, 32)).maps:
        torch.testing.assert_close(found, found[:, :, :1, :1].expand_as(found))


def test_a_summary_narrower_than_the_last_map_is_refused() -> None:
    with pytest.raises(UsageError, match=r"amdim\.summary_channels: expected at least 16.*got 8"):
        AMDIMEncoder(1, 2, width=4, summary_channels=8)
