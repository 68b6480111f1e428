from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from medim.evaluation.probing.baselines import build_random_encoder, principal_components
from medim.models.feature_extraction import batch_images, extract_features
from medim.types import Volume
from tests.specs import make_spec

SPEC: dict[str, Any] = {
    "encoder": {"name": "convnet", "channels": [4, 8], "summary": "mean_max", "hidden": 6, "summary_channels": 5},
    "in_channels": 1,
    "spatial_dims": 2,
    "input_shape": [12, 12],
}


def images(count: int, side: int = 12, seed: int = 0) -> list[Volume]:
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(3, 2, (1, side, side)).astype(np.float32) for _ in range(count))
    return [Volume(array, np.eye(4), np.eye(4), (side, side)) for array in arrays]


def test_batch_normalisation_of_a_fresh_encoder_knows_the_images() -> None:
    known = images(40)
    encoder: Any = build_random_encoder(make_spec(SPEC), known, seed=0)
    convolution, norm = encoder.stages[0][0], encoder.stages[0][1]
    with torch.no_grad():
        answer = convolution(torch.from_numpy(np.stack([v.array for v in known])))
    torch.testing.assert_close(norm.running_mean, answer.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, answer.var((0, 2, 3)))
    assert not any(module.training for module in encoder.modules())


def test_images_of_any_size_set_the_statistics_and_a_single_one_stops_nothing() -> None:
    mixed = [*images(3, 9), *images(1, 20), *images(3, 13)]
    encoder: Any = build_random_encoder(make_spec(SPEC), mixed, seed=0)
    assert not torch.equal(encoder.stages[0][1].running_mean, torch.zeros(4))
    build_random_encoder(make_spec(SPEC), images(1), seed=0)


def test_a_seed_decides_the_weights_and_leaves_other_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    batch = torch.from_numpy(np.stack([v.array for v in images(4, seed=1)]))
    one, same, other = (
        extract_features(build_random_encoder(make_spec(SPEC), images(9), seed=seed), [batch]) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_without_batch_normalisation_no_image_is_read() -> None:
    def none() -> Iterator[Volume]:
        raise AssertionError("an image was read")
        yield

    build_random_encoder(make_spec({**SPEC, "encoder": {"name": "unet", "channels": [2, 4]}}), none(), seed=0)


def test_components_are_fewer_than_the_images_they_are_fitted_on_and_keep_their_distances() -> None:
    known = images(9)
    found = principal_components(known, known, shape=(12, 12))
    assert found.shape == (9, 8)
    pixels = np.stack([v.array.ravel() for v in known])
    for i, j in ((0, 1), (2, 7)):
        assert np.linalg.norm(found[i] - found[j]) == pytest.approx(np.linalg.norm(pixels[i] - pixels[j]), rel=1e-4)


def test_no_component_stands_alone_in_a_feature() -> None:
    """Brightness is nearly all there is; standardised, components would each count as much as it."""
    rng = np.random.default_rng(0)
    known = [v.with_array(0.1 * v.array + 10 * rng.normal()) for v in images(30)]
    spread = principal_components(known, known, shape=(12, 12)).std(axis=0)
    assert spread.max() / np.median(spread) < 20


def test_large_images_are_scaled_down_before_components_are_taken() -> None:
    assert principal_components(images(3, 400), images(2, 400), shape=(400, 400)).shape == (2, 2)


def test_stacked_keeps_the_order_and_stacks_what_has_one_shape() -> None:
    arrays = [v.array for v in [*images(2), *images(1, 5), *images(300)]]
    batches = list(batch_images(arrays))
    assert [len(batch) for batch in batches] == [2, 1, 256, 44]
    for array, row in zip(arrays, (row for batch in batches for row in batch), strict=True):
        np.testing.assert_array_equal(array, row.numpy())


def test_large_volumes_go_one_by_one() -> None:
    assert [len(batch) for batch in batch_images([np.zeros((1, 2048, 2048), np.float32)] * 2)] == [1, 1]
