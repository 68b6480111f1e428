"""Sliding-window inference with Gaussian blending; only numpy is required."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from medim.config import Overlap, Size
from medim.types import Array, PredictFn, UserError

SIGMA = 0.125  # SD of the Gaussian window weight as a fraction of the window size (value of MONAI and nnU-Net)


def sliding_window(run: PredictFn, image: Array, *, roi: tuple[Size, ...], overlap: Overlap = 0.5) -> Array:
    """Run the network on overlapping windows and blend the logits with Gaussian weights.

    Window positions and weights are those of MONAI's `sliding_window_inference(mode="gaussian")`. Windows of constant
    intensity are skipped: they contain no information, and normalisation by their variance amplifies noise. Voxels
    that only skipped windows cover become background (class 0).

    Args:
        run: network whose output has the grid of its input.
        image: (C, ...).
        roi: window size in voxels.
        overlap: overlap of adjacent windows as a fraction of the window size, in [0, 1).

    Returns:
        (K, ...) on the grid of the image.

    Raises:
        UserError: `roi` or `overlap` is invalid, or the output of the network has another grid than its input.
    """
    dims = image.ndim - 1
    if len(roi) != dims or not 0 <= overlap < 1:
        raise UserError(
            f"inference: expected a roi of {dims} sides and 0 <= overlap < 1, got {list(roi)} and {overlap}."
        )
    canvas, image_box = pad_image(image, [max(n, r) for n, r in zip(image.shape[1:], roi, strict=True)])
    weight = _compute_gaussian_weight(roi)
    total: Array | None = None
    weight_sum = np.zeros(canvas.shape[1:], np.float32)
    for start in itertools.product(
        *(_list_window_starts(n, r, overlap) for n, r in zip(canvas.shape[1:], roi, strict=True))
    ):
        box = tuple(slice(a, a + r) for a, r in zip(start, roi, strict=True))
        window = np.ascontiguousarray(canvas[(slice(None), *box)])
        if all(channel.min() == channel.max() for channel in window):
            continue
        logits = run(window[None])[0]
        if logits.shape[1:] != tuple(roi):
            raise UserError(f"inference: expected logits on a grid {roi}, got {logits.shape[1:]}. Use mode whole.")
        if total is None:
            total = np.zeros((len(logits), *canvas.shape[1:]), np.float32)
        total[(slice(None), *box)] += logits * weight
        weight_sum[box] += weight
    if total is None:  # only constant windows: run one of them to get the number of classes
        total = np.zeros((len(run(window[None])[0]), *canvas.shape[1:]), np.float32)
    total /= np.where(weight_sum > 0, weight_sum, 1)
    total[0][weight_sum == 0] = 1
    return np.asarray(total[(slice(None), *image_box)])


def pad_image(image: Array, shape: Sequence[int]) -> tuple[Array, tuple[slice, ...]]:
    """Centre an image in a larger grid, padded with the minimum of each channel; return it with its bounding box."""
    before = [(target - size) // 2 for target, size in zip(shape, image.shape[1:], strict=True)]
    image_box = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    if tuple(shape) == image.shape[1:]:
        return image, image_box
    minimum = image.min(axis=tuple(range(1, image.ndim)), keepdims=True)
    out = np.broadcast_to(minimum, (len(image), *shape)).copy()
    out[(slice(None), *image_box)] = image
    return out, image_box


def _list_window_starts(size: int, window: int, overlap: float) -> list[int]:
    """List the start indices of the windows along an axis; the last window ends at the image border."""
    step = window if size == window else max(int(window * (1 - overlap)), 1)
    count = -(-(size - window) // step) + 1
    return [min(i * step, size - window) for i in range(count)]


def _compute_gaussian_weight(roi: Sequence[int]) -> Array:
    """Compute the Gaussian weight of each voxel of a window: (*roi) float32 in (0, 1]."""
    weight = np.ones(tuple(roi))
    for axis, side in enumerate(roi):
        offsets = np.arange(side) - (side - 1) / 2
        profile = np.exp(-0.5 * (offsets / (SIGMA * side)) ** 2)
        weight *= profile.reshape([-1 if a == axis else 1 for a in range(len(roi))])
    return np.maximum(weight, 1e-3).astype(np.float32)
