"""What every augmentation keeps to, whichever it is."""

from __future__ import annotations

import inspect

import pytest
import torch
from monai.transforms.transform import RandomizableTransform

from medim.config import build_from_section
from medim.data.loading.augmentations import AUGMENTATIONS, GEOMETRIC, Augmentation
from medim.types import UsageError


def picture(dims: int) -> torch.Tensor:
    """Two channels, smooth, with a bright block off the centre and negative air."""
    image = torch.linspace(-1, 1, 20).expand(2, *[20] * dims).clone()
    image[(slice(None), *[slice(3, 9)] * dims)] += 2
    return image


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
class TestEveryAugmentation:
    def test_is_a_random_transform_of_monai(self, name: str, dims: int) -> None:
        transform = build_from_section(AUGMENTATIONS, {"op": name}, key="op", spatial_dims=dims)
        assert isinstance(transform, RandomizableTransform)

    def test_changes_the_image_and_keeps_shape_type_and_finiteness(self, name: str, dims: int) -> None:
        image = picture(dims)
        out, _ = Augmentation([{"op": name, "probability": 1.0}], spatial_dims=dims)(image, 11)
        assert (out.shape, out.dtype, type(out)) == (image.shape, torch.float32, torch.Tensor)
        assert torch.isfinite(out).all()
        assert not torch.equal(out, image)

    def test_at_probability_zero_does_nothing(self, name: str, dims: int) -> None:
        augment = Augmentation([{"op": name, "probability": 0.0}], spatial_dims=dims)
        assert all(torch.equal(augment(picture(dims), seed)[0], picture(dims)) for seed in range(5))

    def test_is_applied_as_often_as_its_probability_says(self, name: str, dims: int) -> None:
        augment = Augmentation([{"op": name, "probability": 0.5}], spatial_dims=dims)
        image = picture(dims)
        assert 25 <= sum(not torch.equal(augment(image, seed)[0], image) for seed in range(80)) <= 55

    def test_replays_from_its_seed(self, name: str, dims: int) -> None:
        augment = Augmentation([{"op": name}], spatial_dims=dims)
        first = [augment(picture(dims), seed)[0] for seed in range(4)]
        assert all(torch.equal(augment(picture(dims), seed)[0], first[seed]) for seed in (3, 0, 2, 1))

    def test_a_misspelt_option_is_refused_with_the_nearest(self, name: str, dims: int) -> None:
        with pytest.raises(UsageError, match="Did you mean 'probability'"):
            Augmentation([{"op": name, "probabilty": 0.5}], spatial_dims=dims)

    def test_a_probability_above_one_is_refused(self, name: str, dims: int) -> None:
        with pytest.raises(UsageError, match="expected 0 to 1"):
            Augmentation([{"op": name, "probability": 1.5}], spatial_dims=dims)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_options_are_typed_keywords_and_the_augmentation_is_documented(name: str) -> None:
    options = inspect.signature(AUGMENTATIONS[name]).parameters.values()
    assert all(o.kind is inspect.Parameter.KEYWORD_ONLY and o.annotation is not o.empty for o in options)
    assert AUGMENTATIONS[name].__doc__


def test_geometric_names_are_in_the_table() -> None:
    assert set(GEOMETRIC) <= set(AUGMENTATIONS)
