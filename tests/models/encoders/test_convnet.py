"""The options that name other papers' nets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medim.models.encoders import ConvNet


def test_a_dcgan_leaves_the_first_norm_out_and_biases_only_what_no_norm_follows() -> None:
    net = ConvNet(1, 3, (16, 16, 16), channels=(4, 8), first_norm=False, activation="leaky_relu", hidden=0)
    kinds = [[type(layer) for layer in stage] for stage in net.stages]
    assert kinds == [[nn.Conv3d, nn.Identity, nn.LeakyReLU], [nn.Conv3d, nn.BatchNorm3d, nn.LeakyReLU]]
    assert [stage[2].negative_slope for stage in net.stages] == [0.2, 0.2]  # type: ignore[index]
    assert [stage[0].bias is None for stage in net.stages] == [False, True]  # type: ignore[index]


@pytest.mark.parametrize(("padding", "side"), [(None, 8), (0, 6), (2, 10)])
def test_padding_decides_the_grid_and_not_the_field(padding: int | None, side: int) -> None:
    net = ConvNet(1, 2, (9, 9), channels=(4,), stride=1, padding=padding, hidden=0)
    assert net(torch.zeros(1, 1, 9, 9)).maps[0].shape[2:] == (side, side)
    assert net.receptive_field(0) == 4


def test_a_summary_of_no_channels_is_the_layer_before_it() -> None:
    net = ConvNet(1, 2, (16, 16), channels=(4, 8), hidden=0, summary_channels=0).eval()
    features = net(torch.randn(2, 1, 16, 16))
    assert net.summary_channels == 8 * 4 * 4
    assert torch.equal(features.summary, features.maps[-1].flatten(1))
    assert ConvNet(1, 2, (16, 16), hidden=12, summary_channels=0).summary_channels == 12
