"""Encoder, decoder and head in one: shapes, losses against their formulas, and the numpy door."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from medim.models.decoders import UNetDecoder
from medim.models.encoders import UNetEncoder
from medim.models.heads import ClassificationHead, SegmentationHead
from medim.models.model import as_numpy_function, build_encoder, build_model
from medim.types import Features, UsageError
from tests.specs import make_spec

UNET = {"name": "unet", "channels": [4, 8], "summary_channels": 6}


def spec_of(**changes: Any) -> dict[str, Any]:
    return {
        "encoder": UNET,
        "decoder": None,
        "head": {"name": "classification"},
        "in_channels": 1,
        "out_channels": 3,
        "spatial_dims": 2,
        "input_shape": [8, 12],
        **changes,
    }


def test_a_classifier_gives_a_logit_a_class_and_a_segmenter_one_a_voxel() -> None:
    image = torch.randn(2, 1, 8, 12)
    assert build_model(make_spec(spec_of()))(image).shape == (2, 3)
    segmenter = build_model(make_spec(spec_of(decoder={"name": "unet"}, head={"name": "segmentation"})))
    assert segmenter(image).shape == (2, 3, 8, 12)


def test_a_classifier_may_look_at_maps_beside_the_summary() -> None:
    model: Any = build_model(make_spec(spec_of(head={"name": "classification", "maps": [0, 1]})))
    assert model.head.linear.in_features == 6 + 2 * 4 + 2 * 8
    assert model(torch.randn(2, 1, 8, 12)).shape == (2, 3)


def test_a_classifiers_map_may_be_counted_from_the_coarsest_and_must_be_there() -> None:
    head = ClassificationHead((4, 6, 8), 5, 2, maps=(-2,))
    assert head.linear.in_features == 5 + 2 * 6
    with pytest.raises(UsageError, match=r"classification\.maps: expected 0 to 2.*got 3"):
        ClassificationHead((4, 6, 8), 5, 2, maps=(3,))


def test_a_fresh_classifier_starts_at_chance_whatever_it_sees() -> None:
    model: Any = build_model(make_spec(spec_of()))
    logits = model(torch.randn(4, 1, 8, 12))
    assert model.head.loss(logits, torch.tensor([0, 1, 2, 0])).item() == pytest.approx(math.log(3))


def test_the_classifiers_loss_is_the_cross_entropy() -> None:
    head = ClassificationHead((4,), 6, 3)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    expected = -torch.log_softmax(logits, dim=1)[torch.arange(5), target].mean()
    torch.testing.assert_close(head.loss(logits, target), expected)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4)])
def test_the_segmenters_loss_is_dice_over_the_batch_without_background_plus_cross_entropy(
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, *shape, generator=generator)
    target = torch.randint(0, 4, (3, *shape), generator=generator)
    probability = logits.softmax(dim=1)
    dice = []
    for label in (1, 2, 3):
        truth, given = (target == label).float(), probability[:, label]
        dice.append(1 - (2 * (truth * given).sum() + 1e-5) / (truth.sum() + given.sum() + 1e-5))
    entropy = -logits.log_softmax(dim=1).gather(1, target.unsqueeze(1)).mean()
    loss = SegmentationHead((4,), len(shape), 4).loss(logits, target)
    torch.testing.assert_close(loss, torch.stack(dice).mean() + entropy)


@pytest.mark.parametrize("strides", [(2, 4), (4, 8), (3, 6)])
def test_a_decoder_leads_strided_maps_to_the_grid_of_the_image(strides: tuple[int, int]) -> None:
    decoder = UNetDecoder((4, 8), strides, 2)
    maps = tuple(torch.rand(2, n, 24 // stride, 48 // stride) for n, stride in zip((4, 8), strides, strict=True))
    assert decoder(Features(maps, torch.rand(2, 8))).maps[0].shape == (2, 4, 24, 48)


def test_a_decoder_with_a_map_of_stride_one_has_the_parameters_of_earlier_versions() -> None:
    assert {name.split(".")[0] for name in UNetDecoder((4, 8), (1, 2), 2).state_dict()} == {"levels"}


def test_the_decoder_uses_every_map_at_its_place() -> None:
    """A change in one corner of the finest map, past the field of the deeper layers, shows in that corner."""
    torch.manual_seed(0)
    encoder, decoder = UNetEncoder(1, 2, channels=(4, 8), norm="bn"), UNetDecoder((4, 8), (1, 2), 2, norm="bn").eval()
    features = encoder.eval()(torch.randn(1, 1, 16, 16))
    maps = [m.detach().clone() for m in features.maps]
    before = decoder(Features(tuple(maps), features.summary)).maps[0]
    maps[0][..., 0, 0] += 1
    changed = (decoder(Features(tuple(maps), features.summary)).maps[0] != before).any(dim=1)[0]
    assert changed[0, 0]
    assert not changed[5:].any()
    assert not changed[:, 5:].any()


def test_as_run_takes_and_gives_numpy_and_an_encoder_answers_with_its_summary() -> None:
    image = np.random.default_rng(0).normal(size=(2, 1, 8, 12))  # float64, as preprocessing may leave it
    model = build_model(make_spec(spec_of())).eval()
    answer = as_numpy_function(model)(image)
    assert answer.dtype == np.float32
    np.testing.assert_array_equal(answer, model(torch.from_numpy(image).float()).detach().numpy())
    encoder = build_encoder(make_spec(spec_of())).eval()
    np.testing.assert_array_equal(
        as_numpy_function(encoder)(image[..., ::-1]),
        encoder(torch.from_numpy(image).float().flip(-1)).summary.detach().numpy(),
    )


def test_sections_of_a_spec_are_checked() -> None:
    with pytest.raises(UsageError, match="Did you mean 'segmentation'"):
        build_model(make_spec(spec_of(head={"name": "segmentations"})))
    with pytest.raises(UsageError, match="Did you mean 'norm'"):
        build_model(make_spec(spec_of(decoder={"name": "unet", "nrm": "in"})))


def test_a_frozen_part_stays_as_it_is_through_training_steps() -> None:
    unet = {**UNET, "norm": "bn"}  # whose running statistics would move without a gradient
    model = build_model(make_spec(spec_of(encoder=unet, decoder={"name": "unet"}, head={"name": "segmentation"})))
    model.freeze([model.encoder])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    descent = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(torch.randn(2, 1, 8, 12)).square().mean().backward()
    descent.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert not [key for key in moved if key.startswith("encoder.")]
