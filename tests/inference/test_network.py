from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from medim.inference.network import Predictor, run_inference
from medim.types import Array, PredictFn, Step, UsageError, UserError, Volume

WHOLE = {"mode": "whole"}


def volume(array: Array, affine: Array | None = None) -> Volume:
    grid = np.eye(4) if affine is None else affine
    return Volume(array.astype(np.float32), grid, grid, array.shape[1:])


def network(kind: str, run: PredictFn, steps: Sequence[Step], inference: Step | None = None) -> Predictor:
    return Predictor(
        run=run,
        kind=kind,
        modality="mri",
        spatial_dims=3 if kind == "segmenter" else 2,
        in_channels=1,
        classes=("a", "b"),
        preprocessing=tuple(steps),
        inference=inference or WHOLE,
    )


def threshold(image: Array) -> Array:
    """A network without context: class 1 where the image is above 0.5."""
    return np.concatenate([0.5 - image[:, :1], image[:, :1] - 0.5], axis=1)


def smooth_image(*shape: int) -> Array:
    place = np.meshgrid(*(np.linspace(0, 3, n) for n in shape), indexing="ij")
    return np.asarray(np.sin(sum((i + 1) * p for i, p in enumerate(place))) + 0.3, np.float32)


@pytest.mark.parametrize("shape", [(19, 23), (19, 9, 14)])
def test_windows_give_what_the_whole_image_gives_where_the_network_sees_one_voxel(shape: tuple[int, ...]) -> None:
    image = volume(smooth_image(*shape)[None])
    whole = run_inference(threshold, image, {"mode": "whole", "multiple_of": 8})
    windows = run_inference(threshold, image, {"mode": "sliding", "roi": [8] * len(shape), "overlap": 0.6})
    assert whole.shape == windows.shape == (2, *shape)
    np.testing.assert_allclose(windows, whole, atol=1e-6)
    np.testing.assert_allclose(whole, threshold(image.array[None])[0])


def test_padding_of_a_whole_image_continues_its_minimum() -> None:
    seen: list[Array] = []

    def run(image: Array) -> Array:
        seen.append(image)
        return image

    image = np.arange(1, 16, dtype=np.float32).reshape(1, 3, 5)
    out = run_inference(run, volume(image), {"mode": "whole", "multiple_of": 4})
    assert seen[0].shape == (1, 1, 4, 8)
    assert seen[0].min() == 1
    np.testing.assert_array_equal(out, image)


def test_a_mode_that_does_not_exist_is_told_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="sliding"):
        run_inference(threshold, volume(np.zeros((1, 4, 4))), {"mode": "slidng", "roi": [4, 4]})


def test_a_segmentation_comes_back_on_the_grid_of_the_image_and_background_where_it_was_cut_away() -> None:
    image = np.zeros((1, 20, 24, 16), np.float32)
    image[0, 4:16, 6:18, 4:12] = 10
    image[0, 0, 0, 0] = 10  # outside the part that preprocessing keeps
    source = volume(image, np.diag([1.0, 1.0, 2.0, 1.0]))
    steps = [
        {"op": "pad_or_crop", "shape": [16, 16, 12]},
        {"op": "resample", "spacing": [0.5, 0.5, 1.0]},
        {"op": "normalise", "method": "range"},
    ]
    labels = network("segmenter", threshold, steps, WHOLE | {"multiple_of": 8})(source)
    expected = image[0] > 0
    expected[0, 0, 0] = False
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels > 0, expected)


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    steps = [{"op": "normalise"}]

    def run(image: Array) -> Array:
        return np.array([[1000.0, 1000.0 + np.log(3.0)]])

    probabilities = network("classifier", run, steps)(volume(smooth_image(4, 4)[None]))
    np.testing.assert_allclose(probabilities, [0.25, 0.75])


def test_an_embedding_is_the_first_row_of_the_summary() -> None:
    image = volume(smooth_image(4, 4)[None])
    embed = network("encoder", lambda x: x.mean(axis=(2, 3)), [{"op": "normalise"}])
    np.testing.assert_allclose(embed(image), [0], atol=1e-6)


def test_an_image_of_other_dimensions_or_channels_is_refused() -> None:
    segment = network("segmenter", threshold, [])
    with pytest.raises(UserError, match="3D image of 1 channel"):
        segment(volume(np.zeros((1, 4, 4))))
    with pytest.raises(UserError, match="got 3D of 2"):
        segment(volume(np.zeros((2, 4, 4, 4))))
