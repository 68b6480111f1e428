from __future__ import annotations

import pytest
import torch

from medim.models.decoders import ImageDecoder
from medim.types import UsageError


@pytest.mark.parametrize("shape", [(32, 32), (28, 20), (7, 13), (3, 1), (16, 8, 12), (9, 5, 7)])
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_an_image_of_any_shape_is_drawn_and_every_voxel_follows_the_summary(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    decoder = ImageDecoder(6, 2, shape, channels=(16, 8, 4), norm=norm)  # type: ignore[arg-type]
    image = decoder(torch.randn(3, 6))
    assert image.shape == (3, 2, *shape)
    assert image.std(dim=0).min() > 0
    image.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_the_defaults_are_the_papers_decoder_for_32_x_32() -> None:
    decoder = ImageDecoder(64, 3, (32, 32)).eval()
    shapes: list[tuple[int, ...]] = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    decoder(torch.zeros(1, 64))
    assert decoder.to_grid.weight.shape == (512 * 4 * 4, 64)
    assert shapes[::2] == [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32)]
    assert shapes[-1] == (3, 32, 32)


def test_a_decoder_without_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="channels"):
        ImageDecoder(6, 1, (8, 8), channels=())
