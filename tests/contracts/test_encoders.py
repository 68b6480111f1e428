"""What every entry of ENCODERS promises, in 2D and 3D. A new entry is tested by its line in the table."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medim.models.encoders import ENCODERS
from medim.models.model import build_encoder
from medim.models.serialization import load_encoder, save_model
from medim.objectives.score_map import MutualInformationMap
from tests.specs import make_spec

# Small versions, and the variants whose behaviour differs. An entry that is not named here runs at its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "convnet": [
        {"channels": [4, 8, 8], "hidden": 16, "summary_channels": 8},
        {"channels": [4, 8], "kernel_size": 3, "norm": "gn", "summary": "mean_max", "hidden": 0, "summary_channels": 6},
        {"channels": [4, 8], "stride": 1, "padding": 0, "first_norm": False, "hidden": 0, "activation": "leaky_relu"},
    ],
    "alexnet": [
        {"channels": [4, 8, 8, 8, 4], "hidden": 16},
        {"channels": [4, 4, 4, 4, 4], "norm": "in", "summary": "mean_max", "hidden": 0},
    ],
    "resnet": [
        {"widths": [4, 4], "blocks": [2, 2], "hidden": 16},
        {"widths": [4, 4, 8], "blocks": [1, 1, 2], "norm": "gn", "summary": "mean_max", "hidden": 0},
    ],
    "amdim": [
        {"width": 4, "depth": 2, "summary_channels": 16},
        {"width": 4, "depth": 1, "norm": "bn", "summary_channels": 20},
    ],
    "patches": [
        {"patch": 8, "encoder": {"name": "convnet", "channels": [4, 8], "norm": "none", "hidden": 0}},
        {
            "patch": 8,
            "stride": 8,
            "encoder": {"name": "resnet", "widths": [4, 8], "blocks": [1, 1], "norm": "gn", "hidden": 0},
        },
    ],
    "unet": [
        {"channels": [4, 8, 8], "summary_channels": 8},
        {"channels": [4, 8], "norm": "bn", "summary_channels": 6},
    ],
}
CASES = [
    pytest.param({"name": name, **options}, dims, id=f"{name}-{n}-{dims}d")
    for name in ENCODERS
    for n, options in enumerate(VARIANTS.get(name, [{}]))
    for dims in (2, 3)
]
SHAPES: dict[int, tuple[int, ...]] = {2: (16, 24), 3: (16, 24, 16)}
LARGER: dict[str, dict[int, tuple[int, ...]]] = {"amdim": {2: (32, 40), 3: (32, 40, 32)}}  # it takes none below 32
NORM_KINDS = {"bn": "BatchNorm", "in": "InstanceNorm", "gn": "GroupNorm"}
every_encoder = pytest.mark.parametrize(("section", "dims"), CASES)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def shape_of(section: dict[str, Any], dims: int) -> tuple[int, ...]:
    return LARGER.get(section["name"], SHAPES)[dims]


def spec_of(section: dict[str, Any], dims: int, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    shape = shape or shape_of(section, dims)
    return {"encoder": section, "in_channels": 2, "spatial_dims": dims, "input_shape": list(shape)}


def make(section: dict[str, Any], dims: int, shape: tuple[int, ...] | None = None) -> Any:
    torch.manual_seed(0)
    return build_encoder(make_spec(spec_of(section, dims, shape)))


def images(section: dict[str, Any], dims: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, *shape_of(section, dims), generator=torch.Generator().manual_seed(1))


def outputs(encoder: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    features = encoder(image)
    return [*features.maps, features.summary]


@every_encoder
def test_maps_and_summary_have_the_promised_channels_and_strides(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims)
    features = encoder(images(section, dims))
    assert len(features.maps) == len(encoder.channels) == len(encoder.strides)
    assert list(encoder.strides) == sorted(encoder.strides), "fine to coarse"
    for level, (found, channels, stride) in enumerate(
        zip(features.maps, encoder.channels, encoder.strides, strict=True)
    ):
        assert found.shape[:2] == (4, channels)
        for cells, side in zip(found.shape[2:], shape_of(section, dims), strict=True):
            unpadded = (side - encoder.receptive_field(level)) // stride + 1
            assert unpadded <= cells <= -(-side // stride)
    assert features.summary.shape == (4, encoder.summary_channels)


@every_encoder
def test_gradients_reach_every_parameter(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)  # a fixup branch starts at zero
    weights = torch.Generator().manual_seed(2)
    sum(
        (out * torch.randn(out.shape, generator=weights)).sum() for out in outputs(encoder, images(section, dims))
    ).backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@every_encoder
@pytest.mark.parametrize("training", [True, False])
def test_reordering_a_batch_reorders_its_features(section: dict[str, Any], dims: int, training: bool) -> None:
    encoder = make(section, dims).train(training)
    order = torch.tensor([2, 0, 3, 1])
    for straight, shuffled in zip(
        outputs(encoder, images(section, dims)), outputs(encoder, images(section, dims)[order]), strict=True
    ):
        torch.testing.assert_close(shuffled, straight[order], rtol=1e-3, atol=1e-4)


@every_encoder
def test_an_image_has_the_same_features_alone_and_in_company(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims).eval()
    for together, alone in zip(
        outputs(encoder, images(section, dims)), outputs(encoder, images(section, dims)[:1]), strict=True
    ):
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@every_encoder
def test_bf16_changes_the_features_by_rounding_only(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims).eval()
    exact = outputs(encoder, images(section, dims))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs(encoder, images(section, dims))
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b.float()).norm() < 0.05 * a.norm()


@every_encoder
def test_a_fresh_encoder_follows_from_the_seed_and_is_ready_to_train(section: dict[str, Any], dims: int) -> None:
    one, two = make(section, dims), make(section, dims)
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    assert all(module.training for module in one.modules())


@every_encoder
def test_a_saved_encoder_comes_back_bit_for_bit(section: dict[str, Any], dims: int, tmp_path: Path) -> None:
    encoder = make(section, dims)
    encoder(images(section, dims))  # moves running statistics, which have to travel too
    save_model(tmp_path / "encoder", "encoder", encoder, make_spec({"kind": "encoder", **spec_of(section, dims)}))
    again = load_encoder(tmp_path)
    assert not again.training
    assert again.spec.encoder == section
    for a, b in zip(outputs(encoder.eval(), images(section, dims)), outputs(again, images(section, dims)), strict=True):
        assert torch.equal(a, b)


@every_encoder
def test_a_side_the_strides_do_not_divide_is_taken(section: dict[str, Any], dims: int) -> None:
    shape = tuple(side + 1 + 2 * axis for axis, side in enumerate(shape_of(section, dims)))
    encoder = make(section, dims, shape)
    features = encoder(torch.zeros(2, 2, *shape))
    assert features.summary.shape == (2, encoder.summary_channels)
    assert [m.shape[1] for m in features.maps] == list(encoder.channels)


@pytest.mark.parametrize("norm", ["bn", "in", "gn", "none"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ENCODERS)
def test_norm_names_the_norm_of_the_maps(name: str, dims: int, norm: str) -> None:
    section = {"name": name, **VARIANTS.get(name, [{}])[0]}
    if "norm" not in inspect.signature(ENCODERS[name]).parameters and name != "patches":
        pytest.skip("this encoder has no option `norm`")
    if name == "patches":
        section["encoder"] = {**section["encoder"], "norm": norm}
    else:
        section["norm"] = norm
    encoder = make(section, dims)
    kinds = {type(m).__name__.rstrip("23d") for m in encoder.modules() if isinstance(m, NORMS)} - {"BatchNorm1"}
    assert kinds == ({NORM_KINDS[norm]} if norm != "none" else set())
    assert all(found.isfinite().all() for found in outputs(encoder, images(section, dims)))


def linear(section: dict[str, Any], dims: int, odd: int) -> tuple[Any, int]:
    """An encoder all weights of which are alike, and the side of an image whose middle cells see no border."""
    last = make(section, dims)
    stride = last.strides[-1]
    side = (-(-last.receptive_field(len(last.channels) - 1) // stride) + 2) * stride + odd
    encoder = make(section, dims, (side,) * dims).eval()
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, NORMS):  # statistics over the image would see all of it
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d | nn.MaxPool3d):  # one voxel wins; any may
                mean = nn.AvgPool2d if dims == 2 else nn.AvgPool3d
                setattr(module, name, mean(child.kernel_size, child.stride))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0.1)  # no rectifier sleeps, and no side of a kernel weighs more
    return encoder, side


@every_encoder
@pytest.mark.parametrize("odd", [0, 1])
def test_the_receptive_field_and_its_middle_are_what_the_gradient_sees(
    section: dict[str, Any], dims: int, odd: int
) -> None:
    encoder, side = linear(section, dims, odd)
    image = torch.ones(1, 2, *(side,) * dims, requires_grad=True)
    maps = encoder(image).maps
    assert len(encoder.origins) == len(maps)
    for level, found in enumerate(maps):
        centre = tuple(cells // 2 for cells in found.shape[2:])
        (gradient,) = torch.autograd.grad(found[(0, 0, *centre)], image, retain_graph=True)
        seen = gradient[0, 0].nonzero()
        first, last = seen.min(dim=0).values, seen.max(dim=0).values
        assert (last - first + 1).tolist() == [encoder.receptive_field(level)] * dims
        assert len(seen) == encoder.receptive_field(level) ** dims
        place = [encoder.origins[level] + cell * encoder.strides[level] for cell in centre]
        assert ((first + last) / 2).tolist() == place
        if section["name"] != "patches":  # inside a crop, its encoder may weigh one half more
            torch.testing.assert_close(centroid(gradient[0, 0]), torch.tensor(place), atol=0.01, rtol=0)


@every_encoder
@pytest.mark.parametrize("odd", [0, 1])
def test_the_score_of_a_cell_is_drawn_in_the_middle_of_what_it_sees(
    section: dict[str, Any], dims: int, odd: int
) -> None:
    encoder, side = linear(section, dims, odd)
    image = torch.ones(1, 2, *(side,) * dims, requires_grad=True)
    for level, found in enumerate(encoder(image).maps):
        cell = tuple(cells // 2 for cells in found.shape[2:])
        (gradient,) = torch.autograd.grad(found[(0, 0, *cell)], image, retain_graph=True)
        alone = torch.zeros(1, 1, *found.shape[2:])
        alone[(0, 0, *cell)] = 1.0
        critic: Any = SimpleNamespace(feature_level=level, score_map=lambda _, alone=alone: alone)
        with torch.no_grad():
            drawn = MutualInformationMap(encoder, critic, {})(image)
        seen = gradient[0, 0].nonzero()
        middle = (seen.min(dim=0).values + seen.max(dim=0).values) / 2
        torch.testing.assert_close(centroid(drawn[0, 0]), middle, atol=0.01, rtol=0)


def centroid(weights: torch.Tensor) -> torch.Tensor:
    """The centre of mass of a map, in voxels."""
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in weights.shape), indexing="ij"))
    return (places * weights).flatten(1).sum(dim=1) / weights.sum()
