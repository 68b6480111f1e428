from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from medim.inference.sliding_window import sliding_window
from medim.types import Array, UserError


def threshold(image: Array) -> Array:
    """A network without context: class 1 where the image is above 0.5."""
    return np.concatenate([0.5 - image[:, :1], image[:, :1] - 0.5], axis=1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_windows_lie_and_blend_as_in_monai(overlap: float) -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 3, 5, padding=2)
    image = np.random.default_rng(0).standard_normal((1, 21, 16, 11)).astype(np.float32)  # the last axis is padded

    def run(window: Array) -> Array:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(window)).numpy())

    ours = sliding_window(run, image, roi=(8, 8, 12), overlap=overlap)
    padded = torch.from_numpy(np.pad(image[None], [(0, 0)] * 4 + [(0, 1)], constant_values=image.min()))
    theirs = sliding_window_inference(padded, (8, 8, 12), 1, network, overlap=overlap, mode="gaussian")
    np.testing.assert_allclose(ours, theirs[0, ..., :11].detach().numpy(), atol=1e-5)


def test_a_window_without_contrast_is_skipped_and_becomes_background() -> None:
    seen: list[Array] = []

    def run(window: Array) -> Array:
        seen.append(window)
        return np.stack([np.zeros_like(window[:, 0]), np.ones_like(window[:, 0])], axis=1)  # never background

    image = np.full((1, 32, 8), -0.7, np.float32)
    image[0, 3, 3] = 2
    labels = sliding_window(run, image, roi=(8, 8), overlap=0.0).argmax(0)
    assert len(seen) == 1
    assert labels[:8].all()
    assert not labels[8:].any()


def test_an_image_of_nothing_but_constant_windows_is_all_background_and_has_every_class() -> None:
    logits = sliding_window(threshold, np.zeros((1, 9, 9), np.float32), roi=(4, 4))
    assert logits.shape == (2, 9, 9)
    assert not logits.argmax(0).any()


@pytest.mark.parametrize(("roi", "overlap"), [((4,), 0.5), ((4, 4, 4), 0.5), ((4, 4), 1.0), ((4, 4), -0.1)])
def test_a_window_or_overlap_that_does_not_fit_the_image_is_an_error(roi: tuple[int, ...], overlap: float) -> None:
    with pytest.raises(UserError, match="expected a roi of 2 sides and 0 <= overlap < 1"):
        sliding_window(threshold, np.zeros((1, 9, 9), np.float32), roi=roi, overlap=overlap)


def test_a_network_whose_output_has_another_grid_is_an_error() -> None:
    image = np.arange(81, dtype=np.float32).reshape(1, 9, 9)
    with pytest.raises(UserError, match="Use mode whole"):
        sliding_window(lambda window: window[..., ::2, ::2], image, roi=(4, 4))
