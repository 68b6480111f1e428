"""What every entry of ENCODERS promises, in 2D and 3D. A new entry is tested by its line in the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medim.models.encoders import ENCODERS
from medim.models.model import build_encoder
from medim.models.saved import load_encoder, save

# Small versions, and the variants whose behaviour differs. An entry that is not named here runs at its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "convnet": [
        {"channels": [4, 8, 8], "hidden": 16, "summary_channels": 8},
        {"channels": [4, 8], "kernel_size": 3, "norm": "gn", "summary": "mean_max", "hidden": 0, "summary_channels": 6},
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
every_encoder = pytest.mark.parametrize(("section", "dims"), CASES)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def spec_of(section: dict[str, Any], dims: int, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"encoder": section, "in_channels": 2, "spatial_dims": dims, "input_shape": list(shape or SHAPES[dims])}


def make(section: dict[str, Any], dims: int, shape: tuple[int, ...] | None = None) -> Any:
    torch.manual_seed(0)
    return build_encoder(spec_of(section, dims, shape))


def images(dims: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, *SHAPES[dims], generator=torch.Generator().manual_seed(1))


def outputs(encoder: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    features = encoder(image)
    return [*features.maps, features.summary]


@every_encoder
def test_maps_and_summary_have_the_promised_channels_and_strides(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims)
    features = encoder(images(dims))
    assert len(features.maps) == len(encoder.channels) == len(encoder.strides)
    assert list(encoder.strides) == sorted(set(encoder.strides)), "fine to coarse"
    for found, channels, stride in zip(features.maps, encoder.channels, encoder.strides, strict=True):
        assert found.shape == (4, channels, *(side // stride for side in SHAPES[dims]))
    assert features.summary.shape == (4, encoder.summary_channels)


@every_encoder
def test_gradients_reach_every_parameter(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims)
    weights = torch.Generator().manual_seed(2)
    sum((out * torch.randn(out.shape, generator=weights)).sum() for out in outputs(encoder, images(dims))).backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@every_encoder
@pytest.mark.parametrize("training", [True, False])
def test_reordering_a_batch_reorders_its_features(section: dict[str, Any], dims: int, training: bool) -> None:
    encoder = make(section, dims).train(training)
    order = torch.tensor([2, 0, 3, 1])
    for straight, shuffled in zip(outputs(encoder, images(dims)), outputs(encoder, images(dims)[order]), strict=True):
        torch.testing.assert_close(shuffled, straight[order], rtol=1e-3, atol=1e-4)


@every_encoder
def test_an_image_has_the_same_features_alone_and_in_company(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims).eval()
    for together, alone in zip(outputs(encoder, images(dims)), outputs(encoder, images(dims)[:1]), strict=True):
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@every_encoder
def test_bf16_changes_the_features_by_rounding_only(section: dict[str, Any], dims: int) -> None:
    encoder = make(section, dims).eval()
    exact = outputs(encoder, images(dims))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs(encoder, images(dims))
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
    encoder(images(dims))  # moves running statistics, which have to travel too
    save(tmp_path / "encoder", "encoder", encoder, {"kind": "encoder", **spec_of(section, dims)})
    again = load_encoder(tmp_path)
    assert not again.training
    assert again.spec["encoder"] == section
    for a, b in zip(outputs(encoder.eval(), images(dims)), outputs(again, images(dims)), strict=True):
        assert torch.equal(a, b)


@every_encoder
def test_the_receptive_field_is_what_the_gradient_sees(section: dict[str, Any], dims: int) -> None:
    last = make(section, dims)
    level_count, stride = len(last.channels), last.strides[-1]
    side = -(-(last.receptive_field(level_count - 1) * 2) // stride) * stride
    shape = (side,) * dims
    encoder = make(section, dims, shape).eval()
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, NORMS):  # statistics over the image would see all of it
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(parameter.abs() + 0.1)  # no rectifier sleeps
    for level in range(level_count):
        image = torch.ones(1, 2, *shape, requires_grad=True)
        found = encoder(image).maps[level]
        centre = tuple(cells // 2 for cells in found.shape[2:])
        (gradient,) = torch.autograd.grad(found[(0, 0, *centre)], image)
        seen = gradient[0, 0].nonzero()
        extent = seen.max(dim=0).values - seen.min(dim=0).values + 1
        assert extent.tolist() == [encoder.receptive_field(level)] * dims
        assert len(seen) == encoder.receptive_field(level) ** dims
