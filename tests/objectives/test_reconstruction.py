from __future__ import annotations

from typing import Any

import pytest
import torch

from medim.objectives.reconstruction import Reconstruction
from medim.types import Features, UsageError, Views

SHAPES = [(16, 24), (12, 16, 8)]


class Painter:
    """An encoder and decoder that answer with what they are told to."""

    def __init__(self, answer: torch.Tensor) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.clean = Features((), torch.zeros(1))
        self._answer = answer
        self.seen = torch.zeros(1)

    def __call__(self, image: torch.Tensor) -> Features:
        self.seen = image
        return Features((self._answer,), torch.zeros(1))

    def decode(self, features: Features) -> torch.Tensor:
        return features.maps[0]


def objective(shape: tuple[int, ...], **options: Any) -> Reconstruction:
    made = Reconstruction(1, len(shape), shape, 1, **{"mask_patch_size": 4, **options})
    torch.nn.init.ones_(made.to_image.weight)
    assert made.to_image.bias is not None
    torch.nn.init.zeros_(made.to_image.bias)
    return made


def views(shape: tuple[int, ...]) -> Views:
    image = torch.randn(3, 1, 1, *shape, generator=torch.Generator().manual_seed(2))
    return Views(image, torch.zeros(3, 1, len(shape)))


def deviation(given: Views) -> torch.Tensor:
    image = given.image[:, 0]
    return image - image.mean(dim=tuple(range(2, image.ndim)), keepdim=True)


@pytest.mark.parametrize("shape", SHAPES)
class TestLoss:
    def test_a_guess_of_the_mean_pays_exactly_chance(self, shape: tuple[int, ...]) -> None:
        term = objective(shape)(Painter(torch.zeros(3, 1, *shape)), views(shape))["reconstruction"]
        assert term.chance == 1.0
        assert term.loss.item() == pytest.approx(1.0, abs=1e-6)

    def test_a_perfect_painter_pays_nothing(self, shape: tuple[int, ...]) -> None:
        given = views(shape)
        loss = objective(shape)(Painter(deviation(given)), given)["reconstruction"].loss
        assert loss.item() == pytest.approx(0.0, abs=1e-12)

    def test_only_hidden_voxels_count(self, shape: tuple[int, ...]) -> None:
        given = views(shape)
        image = given.image[:, 0]
        watcher = Painter(image)
        objective(shape)(watcher, given)
        visible = watcher.seen == image
        assert 0.2 < visible.float().mean() < 0.6
        wrong_where_visible = torch.where(visible, torch.tensor(9.0), deviation(given))
        loss = objective(shape)(Painter(wrong_where_visible), given)["reconstruction"].loss
        assert loss.item() == pytest.approx(0.0, abs=1e-12)

    def test_the_painter_does_not_see_what_is_hidden(self, shape: tuple[int, ...]) -> None:
        given = views(shape)
        image = given.image[:, 0]
        painter = Painter(image)
        objective(shape)(painter, given)
        hidden = painter.seen != image
        means = (image - deviation(given)).expand_as(image)
        torch.testing.assert_close(painter.seen[hidden], means[hidden])

    def test_a_constant_image_gives_a_finite_loss(self, shape: tuple[int, ...]) -> None:
        flat = Views(torch.full((2, 1, 1, *shape), 3.0), torch.zeros(2, 1, len(shape)))
        answer = torch.zeros(2, 1, *shape)
        assert objective(shape)(Painter(answer), flat)["reconstruction"].loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_patch_size": 0}, "mask_patch_size"),
        ({"mask_patch_size": 17}, "mask_patch_size"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"decoded_channels": 0}, "add a decoder"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Reconstruction(
            **{"in_channels": 1, "spatial_dims": 2, "input_shape": (16, 24), "decoded_channels": 4, **options}
        )
