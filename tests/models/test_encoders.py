"""The paper's net, number by number, and shapes that the presets use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medim.config import build_from_section
from medim.models.encoders import ENCODERS, ConvNet, UNetEncoder
from medim.models.layers import build_conv_block, compute_receptive_field, convert_to_mm, pool_map
from medim.types import UsageError


def test_the_defaults_are_the_papers_32x32_net() -> None:
    """Hjelm et al. 2019 (layers as in the public code): maps of 16, 8, 4, fields of 4, 10, 22, 1024 hidden, 64 out."""
    net = ConvNet(3, 2, (32, 32))
    features = net(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in features.maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert [net.receptive_field(level) for level in range(3)] == [4, 10, 22]
    assert features.summary.shape == (2, 64)
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256) + 2 * (64 + 128 + 256)
    linear = 4096 * 1024 + 2 * 1024 + 1024 * 64 + 64
    assert sum(p.numel() for p in net.parameters()) == convolutions + linear == 4_921_280


def test_every_hidden_layer_is_normalised_and_rectified_and_the_summary_is_not() -> None:
    net = ConvNet(3, 2, (32, 32))
    for stage in net.stages:
        assert [type(layer) for layer in stage] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert stage[0].bias is None
    assert [type(layer) for layer in net.to_summary] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    features = net(torch.randn(4, 3, 32, 32))
    assert all(m.min() == 0 for m in features.maps)
    assert features.summary.min() < 0


def test_in_3d_the_papers_net_has_the_same_grids_and_fields() -> None:
    net = ConvNet(1, 3, (32, 32, 32), channels=(4, 8, 16), hidden=8)
    assert [tuple(m.shape[2:]) for m in net(torch.zeros(2, 1, 32, 32, 32)).maps] == [(16,) * 3, (8,) * 3, (4,) * 3]
    assert [net.receptive_field(level) for level in range(3)] == [4, 10, 22]


@pytest.mark.parametrize(("kernel_size", "grids"), [(3, (14, 7, 4)), (4, (14, 7, 3)), (5, (14, 7, 4))])
def test_a_side_the_strides_do_not_divide_is_taken(kernel_size: int, grids: tuple[int, ...]) -> None:
    net = ConvNet(1, 2, (28, 28), channels=(4, 4, 4), kernel_size=kernel_size, hidden=0)
    assert tuple(m.shape[-1] for m in net(torch.zeros(2, 1, 28, 28)).maps) == grids


def test_mean_and_max_take_any_size_and_flatten_only_its_own() -> None:
    free = ConvNet(1, 2, (16, 16), channels=(4, 8), summary="mean_max", hidden=0).eval()
    fixed = ConvNet(1, 2, (16, 16), channels=(4, 8), hidden=0).eval()
    image = torch.zeros(1, 1, 24, 20)
    assert free(image).summary.shape == (1, 64)
    with pytest.raises(RuntimeError):
        fixed(image)


def test_flatten_keeps_places_apart_and_mean_and_max_do_not() -> None:
    image = torch.zeros(1, 1, 16, 16)
    image[..., 4:8, 4:8] = 1
    moved = image.roll((4, 4), dims=(2, 3))
    for summary, same in (("mean_max", True), ("flatten", False)):
        torch.manual_seed(0)
        net = ConvNet(1, 2, (16, 16), channels=(4, 8), summary=summary, hidden=0).eval()  # type: ignore[arg-type]
        assert torch.allclose(net(image).summary, net(moved).summary, atol=1e-5) == same


@pytest.mark.parametrize("dims", [2, 3])
def test_the_unet_halves_its_grid_a_level_and_sees_5_11_23_47(dims: int) -> None:
    net = UNetEncoder(1, dims, channels=(2, 4, 4, 8))
    features = net(torch.zeros(1, 1, *(16,) * dims))
    assert [m.shape[2:] for m in features.maps] == [torch.Size((side,) * dims) for side in (16, 8, 4, 2)]
    assert [net.receptive_field(level) for level in range(4)] == [5, 11, 23, 47]
    assert net.strides == (1, 2, 4, 8)


def test_pool_holds_each_channels_mean_then_its_maximum() -> None:
    found = pool_map(torch.arange(24.0).view(1, 2, 3, 4))
    assert found.tolist() == [[5.5, 17.5, 11.0, 23.0]]


def test_a_receptive_field_grows_by_the_kernel_times_the_strides_before_it() -> None:
    assert compute_receptive_field([])[0] == 1
    assert compute_receptive_field([(3, 1, 1)] * 3)[0] == 7
    assert compute_receptive_field([(5, 2, 2), (3, 2, 0), (3, 1, 1), (2, 2, 0)])[0] == 5 + 2 * 2 + 2 * 4 + 1 * 4


def test_the_first_cell_lies_half_a_kernel_in_less_the_padding_at_each_layers_stride() -> None:
    assert compute_receptive_field([])[1] == 0
    assert compute_receptive_field([(3, 2, 1)] * 3)[1] == 0
    assert compute_receptive_field([(4, 2, 1)] * 3)[1] == 0.5 + 2 * 0.5 + 4 * 0.5
    assert compute_receptive_field([(5, 2, 0), (3, 2, 2), (2, 1, 0)])[1] == 2 - 2 * 1 + 4 * 0.5


def test_the_first_cell_of_every_map_lies_where_its_own_layers_put_it() -> None:
    assert UNetEncoder(1, 2, channels=(2, 4, 4, 8)).origins == (0, 0, 0, 0)
    assert ConvNet(1, 2, (32, 32), channels=(2, 4, 4)).origins == (0.5, 1.5, 3.5)
    assert ConvNet(1, 2, (32, 32), channels=(2, 4), stride=1, padding=0).origins == (1.5, 3)


def test_a_receptive_field_in_mm_is_its_voxels_times_their_spacing() -> None:
    assert convert_to_mm([4, 10], [1.0, 0.5, 3.0]) == [[4.0, 2.0, 12.0], [10.0, 5.0, 30.0]]
    assert convert_to_mm([4, 10], None) is None


@pytest.mark.parametrize(("norm", "kind"), [("bn", nn.BatchNorm3d), ("in", nn.InstanceNorm3d), ("gn", nn.GroupNorm)])
def test_a_norms_name_gives_that_norm_with_its_affine_parameters(norm: str, kind: type[nn.Module]) -> None:
    layer = build_conv_block(3, 2, 8, 3, 1, norm)[1]  # type: ignore[arg-type]
    assert isinstance(layer, kind)
    assert [p.shape for p in layer.parameters()] == [(8,), (8,)]


def test_a_misspelt_encoder_or_option_names_the_nearest() -> None:
    given = {"in_channels": 1, "spatial_dims": 2, "input_shape": (8, 8)}
    with pytest.raises(UsageError, match="Did you mean 'convnet'"):
        build_from_section(ENCODERS, {"name": "convnets"}, **given)
    with pytest.raises(UsageError, match="Did you mean 'kernel_size'"):
        build_from_section(ENCODERS, {"name": "convnet", "kernel": 3}, **given)
