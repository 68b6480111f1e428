"""The published networks, named by their options alone: maps, fields and parameters as in their authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Conv2d, ConvTranspose2d
from torch.nn.functional import conv2d, relu

from medim.config import load_config
from medim.models.model import build_encoder
from medim.objectives.amdim import AMDIM
from medim.training.pretrain.config import build_objectives
from tests.specs import make_spec

ALEX = 9 * (3 * 96 + 96 * 192 + 192 * 384 + 384 * 384 + 384 * 192) + 2 * (96 + 192 + 384 + 384 + 192)
TUTORIAL = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 64 + 2 * (128 + 256 + 512)
DCGAN_3D = 64 * (32 + 32 * 64 + 64 * 128 + 128 * 256) + 32 + 2 * (64 + 128 + 256)


def block(before: int, width: int) -> int:
    """Weights and batch norms of a bottleneck, and of its shortcut where the channels change."""
    shortcut = (before + 2) * 4 * width if before != 4 * width else 0
    return before * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width) + shortcut


RESNET19 = 3 * 9 * 64 + 2 * 64 + sum(block(*b) for b in [(64, 64), (256, 64), (256, 128), (512, 128), (512, 256)])
RESNET19 += block(1024, 256)

PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, ...], list[tuple[int, int]], list[int], int | None]] = {
    # encoder, image, (channels, side) of each map, receptive fields, parameters (None: the convolutions vary)
    "32x32": (
        {"name": "convnet"},
        (3, 32, 32),
        [(64, 16), (128, 8), (256, 4)],
        [4, 10, 22],
        4_921_280,
    ),
    "64x64": (
        {"name": "convnet", "channels": [64, 128, 256, 512]},
        (3, 64, 64),
        [(64, 32), (128, 16), (256, 8), (512, 4)],
        [4, 10, 22, 46],
        16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 2 * 960 + 8192 * 1024 + 2 * 1024 + 1024 * 64 + 64,
    ),
    "28x28": (
        {"name": "convnet", "channels": [64, 128], "kernel_size": 5},
        (1, 28, 28),
        [(64, 14), (128, 7)],
        [5, 13],
        25 * (64 + 64 * 128) + 2 * 192 + 6272 * 1024 + 2 * 1024 + 1024 * 64 + 64,
    ),
    "tutorial": (
        {
            "name": "convnet",
            "channels": [64, 128, 256, 512],
            "stride": 1,
            "padding": 0,
            "first_norm": False,
            "hidden": 0,
        },
        (3, 32, 32),
        [(64, 29), (128, 26), (256, 23), (512, 20)],
        [4, 7, 10, 13],
        TUTORIAL + 204_800 * 64 + 64,
    ),
    "fedorov 3D": (
        {
            "name": "convnet",
            "channels": [32, 64, 128, 256],
            "first_norm": False,
            "activation": "leaky_relu",
            "hidden": 0,
        },
        (1, 64, 64, 64),
        [(32, 32), (64, 16), (128, 8), (256, 4)],
        [4, 10, 22, 46],
        DCGAN_3D + 256 * 64 * 64 + 64,  # a 4-wide unpadded convolution on 4x4x4 is a linear layer
    ),
    "alexnet": (
        {"name": "alexnet"},
        (3, 64, 64),
        [(96, 31), (192, 15), (384, 15), (384, 15), (192, 7)],
        [5, 13, 21, 29, 45],
        ALEX + 9408 * 4096 + 2 * 4096 + 4096**2 + 2 * 4096 + 4096 * 64 + 64,
    ),
    "resnet19": (
        {"name": "resnet"},
        (3, 32, 32),
        [(64, 16), (256, 16), (512, 8), (512, 8), (1024, 4), (1024, 4)],
        [3, 11, 15, 23, 31, 47],
        RESNET19 + 16_384 * 1024 + 2 * 1024 + 1024 * 64 + 64,
    ),
    "amdim 32": (
        {"name": "amdim"},
        (3, 32, 32),
        [(128, 30), (128, 30), (256, 14), (512, 7), (512, 5), (512, 3)],
        [3, 3, 6, 8, 16, 24],
        None,
    ),
    "amdim 64": (
        {"name": "amdim", "size": 64},
        (3, 64, 64),
        [(128, 62), (256, 30), (512, 14), (1024, 7), (1024, 5), (1024, 3)],
        [3, 6, 12, 16, 32, 48],
        None,
    ),
    "amdim 128": (
        {"name": "amdim", "size": 128},
        (3, 128, 128),
        [(128, 64), (128, 62), (256, 30), (512, 14), (1024, 7), (1024, 5), (1024, 3)],
        [5, 9, 15, 27, 35, 67, 99],
        None,
    ),
    "folded 64x64": ({"name": "patches"}, (3, 64, 64), [(256, 7)], [16], None),
    "folded 32x32": ({"name": "patches", "patch": 8}, (3, 32, 32), [(256, 7)], [8], None),
    "folded AlexNet": (
        {
            "name": "patches",
            "encoder": {"name": "alexnet", "norm": "none", "hidden": 0, "summary_channels": 0},
        },
        (3, 64, 64),
        [(192, 7)],
        [16],
        None,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_its_maps_and_fields(name: str) -> None:
    section, (channels, *shape), maps, fields, parameters = PUBLISHED[name]
    spec = {"encoder": section, "in_channels": channels, "spatial_dims": len(shape), "input_shape": shape}
    with torch.device("meta"):  # shapes alone
        encoder: Any = build_encoder(make_spec(spec))
        features = encoder(torch.zeros(2, channels, *shape))
    assert [tuple(m.shape[1:]) for m in features.maps] == [(n, *[side] * len(shape)) for n, side in maps]
    assert [encoder.receptive_field(level) for level in range(len(maps))] == fields
    assert features.summary.shape == (2, 1024 if section["name"] == "amdim" else 64)
    if parameters is not None:
        assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("alexnet", {"hidden": 8}, (32, 32, 32)),
        ("resnet", {"hidden": 8}, (16, 16, 16)),
        ("amdim", {"size": 64}, (64, 64, 64)),
        ("amdim", {"size": 128}, (128, 128, 128)),
        ("patches", {"patch": 8}, (32, 24, 16)),
    ],
)
def test_the_same_layers_have_the_same_fields_in_3d(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    grids, fields = [], []
    for dims in (2, 3):
        section = {"name": name, **options}
        spec = {"encoder": section, "in_channels": 1, "spatial_dims": dims, "input_shape": shape[:dims]}
        with torch.device("meta"):
            encoder: Any = build_encoder(make_spec(spec))
            grids.append([tuple(m.shape[2:4]) for m in encoder(torch.zeros(2, 1, *shape[:dims])).maps])
        fields.append([encoder.receptive_field(level) for level in range(len(grids[-1]))])
    assert grids[0] == grids[1]
    assert fields[0] == fields[1]


def test_the_vae_preset_has_the_generator_of_the_authors_code() -> None:
    _, objective = build_preset_networks("vae", 3)
    decoder: Any = objective.decoder
    shapes = [tuple(layer.weight.shape) for layer in decoder.modules() if isinstance(layer, Conv2d | ConvTranspose2d)]
    assert decoder.to_grid.weight.shape == (256 * 4 * 4, 64)
    assert shapes == [(256, 128, 4, 4), (128, 64, 4, 4), (64, 64, 4, 4), (3, 64, 3, 3)]
    linear, norms = 64 * 256 * 16, 2 * (256 + 128 + 64 + 64)
    convolutions = 16 * (256 * 128 + 128 * 64 + 64 * 64) + 9 * 64 * 3 + 3
    assert sum(p.numel() for p in decoder.parameters()) == linear + norms + convolutions


def build_preset_networks(preset: str, in_channels: int) -> tuple[Any, Any]:
    """Build the encoder of a preset and its first objective."""
    config = load_config("pretrain", preset)
    shape = config.views.shape
    spec = {"encoder": config.encoder, "in_channels": in_channels, "spatial_dims": len(shape), "input_shape": shape}
    encoder: Any = build_encoder(make_spec(spec))
    (objective, _), *_ = build_objectives(config, encoder, None, in_channels).values()
    return encoder, objective


def list_shapes(network: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters()]


def test_the_cpc_preset_has_the_encoder_and_the_context_of_lowe_et_al() -> None:
    with torch.device("meta"):
        encoder, objective = build_preset_networks("cpc", 1)
        maps = encoder.crop(torch.zeros(2, 1, 16, 16)).maps
        features = encoder(torch.zeros(2, 1, 64, 64))
    assert sum(parameter.numel() for parameter in encoder.crop.parameters()) == 8_520_192
    assert [tuple(map_.shape[1:]) for map_ in maps[:2]] == [(64, 16, 16), (256, 16, 16)]
    assert tuple(maps[-1].shape[1:]) == (1024, 4, 4)
    assert tuple(features.maps[0].shape[1:]) == (1024, 7, 7)
    width = 1024
    vertical, horizontal = (2 * width, width, 2, 3), (2 * width, width, 1, 3)  # their lower row of 3x3 is masked
    layer = [vertical, (2 * width, 2 * width, 1, 1), horizontal]
    last = [(width, width, 1, 1)]
    weights = [shape for shape in list_shapes(objective.context) if len(shape) == 4]
    assert weights == [*layer, *last, *3 * [*layer, (2 * width, width, 1, 1), *last], *last]
    assert list_shapes(objective.predict) == 5 * [(width, width)]


def test_a_preactivation_network_is_that_of_lowe_et_al() -> None:
    """Compare with their equations: relu, then 1x1, relu, 3x3, relu, 1x1, plus the input or a 1x1 of the activated."""
    torch.manual_seed(0)
    spec = {"in_channels": 1, "spatial_dims": 2, "input_shape": (16, 16)}
    options = {"widths": [4, 8], "blocks": [2, 1], "kernel_size": 5, "first_stride": 1, "preactivation": True}
    summary = {"norm": "none", "summary": "mean", "hidden": 0, "summary_channels": 0}
    encoder: Any = build_encoder(make_spec({"encoder": {"name": "resnet", **options, **summary}, **spec}))
    weights = list(encoder.parameters())
    image = torch.randn(3, 1, 16, 16)
    x = conv2d(image, *weights[:2], padding=2)
    start, stem = 2, x
    for stride, is_projected in ((1, True), (1, False), (2, True)):
        out = relu(x)
        first, second, third = (weights[start + 2 * k : start + 2 * k + 2] for k in range(3))
        shortcut = conv2d(out, *weights[start + 6 : start + 8], stride=stride) if is_projected else x
        out = relu(conv2d(out, *first))
        x = conv2d(relu(conv2d(out, *second, stride=stride, padding=1)), *third) + shortcut
        start += 8 if is_projected else 6
    assert start == len(weights)
    features = encoder(image)
    torch.testing.assert_close(features.maps[0], stem)
    torch.testing.assert_close(features.maps[-1], x)
    torch.testing.assert_close(features.summary, x.mean((2, 3)))


def test_the_fedorov_preset_has_the_heads_of_the_authors_code() -> None:
    _, objective = build_preset_networks("fedorov-3d", 1)
    critic = objective.critic
    assert list_shapes(critic.summary) == [(64, 64, 1), (64,), (64,), (64, 64, 1)]  # Linear, BN, ReLU, Linear
    assert list_shapes(critic.local) == [
        *[(64, 128, 1), (64,), (64,), (64, 64, 1)],
        *[(64, 128, 1), (64,), (64,)],  # shortcut, and batch norm with its affine part
    ]


def test_the_amdim_preset_normalises_f1_once_and_trains_that_norm() -> None:
    config = load_config("pretrain", "amdim")
    section = {**config.encoder, "width": 4, "depth": 1, "summary_channels": 32}
    encoder: Any = build_encoder(
        make_spec({"encoder": section, "in_channels": 1, "spatial_dims": 2, "input_shape": (32, 32)})
    )
    options = {key: value for key, value in config.objectives[0].items() if key not in ("name", "width")}
    objective = AMDIM(encoder.channels, 32, 2, width=32, **options)
    assert not list(objective.summary.parameters())
    features = encoder(torch.randn(8, 1, 32, 32))
    torch.testing.assert_close(objective.summary(features.summary), features.summary, rtol=0, atol=0)
    (weight,) = torch.autograd.grad(objective.summary(features.summary)[:, 0].square().sum(), encoder.f1_norm.weight)
    assert weight[0] != 0


def test_views_of_the_amdim_preset_change_contrast_by_up_to_40_percent() -> None:
    steps = {step["op"]: step for step in load_config("pretrain", "amdim").views.augmentations}
    assert steps["intensity_scale"]["factor"] == steps["intensity_shift"]["offset"] == 0.4
    assert steps["affine"]["padding"] == "reflection"
