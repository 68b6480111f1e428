"""What every entry of DECODERS promises, in 2D and 3D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medim.models.decoders import DECODERS
from medim.models.model import build_decoder, build_encoder, build_model
from medim.models.serialization import load_model, load_weights, save_model
from tests.specs import make_spec

SHAPES: dict[int, tuple[int, ...]] = {2: (16, 24), 3: (16, 8, 16)}
ENCODERS: dict[str, dict[str, Any]] = {  # of finest stride 1, 2 and 4
    "unet": {"name": "unet", "channels": [4, 8, 8], "summary_channels": 8},
    "convnet": {"name": "convnet", "channels": [4, 8], "kernel_size": 3, "summary": "mean_max", "hidden": 0},
    "convnet-4": {"name": "convnet", "channels": [4], "stride": 4, "summary": "mean_max", "hidden": 0},
}
every_decoder = pytest.mark.parametrize(
    ("name", "dims"),
    [
        pytest.param((decoder, encoder), dims, id=f"{decoder}-{encoder}-{dims}d")
        for decoder in DECODERS
        for encoder in ENCODERS
        for dims in (2, 3)
    ],
)


def spec_of(name: tuple[str, str], dims: int) -> dict[str, Any]:
    return {
        "kind": "segmenter",
        "encoder": ENCODERS[name[1]],
        "decoder": {"name": name[0]},
        "head": {"name": "segmentation"},
        "in_channels": 1,
        "out_channels": 3,
        "spatial_dims": dims,
        "input_shape": list(SHAPES[dims]),
    }


def make(name: tuple[str, str], dims: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    encoder = build_encoder(make_spec(spec_of(name, dims)))
    return encoder, build_decoder({"name": name[0]}, encoder, dims)


def images(dims: int) -> torch.Tensor:
    return torch.randn(3, 1, *SHAPES[dims], generator=torch.Generator().manual_seed(1))


@every_decoder
def test_the_last_map_lies_on_the_images_own_grid(name: tuple[str, str], dims: int) -> None:
    encoder, decoder = make(name, dims)
    features = encoder(images(dims))
    decoded = decoder(features)
    assert decoded.maps[0].shape == (3, decoder.out_channels, *SHAPES[dims])
    assert decoded.summary is features.summary


@every_decoder
def test_gradients_reach_every_parameter_and_every_map(name: tuple[str, str], dims: int) -> None:
    encoder, decoder = make(name, dims)
    features = encoder(images(dims))
    for found in features.maps:
        found.retain_grad()
    decoded = decoder(features).maps[0]
    (decoded * torch.randn(decoded.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    assert all(found.grad is not None and found.grad.abs().sum() > 0 for found in features.maps)


@every_decoder
def test_reordering_a_batch_reorders_its_decoding(name: tuple[str, str], dims: int) -> None:
    encoder, decoder = make(name, dims)
    order = torch.tensor([2, 0, 1])
    straight, shuffled = (decoder(encoder(x)).maps[0] for x in (images(dims), images(dims)[order]))
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-3, atol=1e-4)


@every_decoder
def test_bf16_changes_the_decoding_by_rounding_only(name: tuple[str, str], dims: int) -> None:
    encoder, decoder = make(name, dims)
    exact = decoder(encoder(images(dims))).maps[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(encoder(images(dims))).maps[0]
    assert (exact - rounded.float()).norm() < 0.05 * exact.norm()


@every_decoder
def test_a_saved_decoder_and_a_saved_model_come_back_bit_for_bit(
    name: tuple[str, str], dims: int, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = build_model(make_spec(spec_of(name, dims)))
    save_model(tmp_path / "model", "model", model, make_spec(spec_of(name, dims)))
    again, spec = load_model(tmp_path)
    assert spec.decoder == {"name": name[0]}
    assert torch.equal(again(images(dims)), model.eval()(images(dims)))
    assert model.decoder is not None
    save_model(tmp_path, "decoder", model.decoder, {"kind": "decoder"})
    _, fresh = make(name, dims)
    load_weights(fresh, tmp_path / "decoder.safetensors")
    features = model.encoder(images(dims))
    assert torch.equal(fresh(features).maps[0], model.decoder(features).maps[0])
