"""Slices of images and label maps as pictures: grey values, size and contours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from medim.types import Array

PLANES = ((2, 1, 0), (1, 2, 0), (0, 2, 1))  # axial, coronal, sagittal: axis of the slice, of the rows, of the columns


def find_largest_slice(shape: Sequence[int], labels: Array | None, axis: int) -> int:
    """Find the slice along an axis with the largest labelled area; the middle slice without labels."""
    if labels is None:
        return shape[axis] // 2
    areas = np.count_nonzero(labels, axis=tuple(other for other in range(labels.ndim) if other != axis))
    return int(areas.argmax()) if areas.max() > areas.min() else shape[axis] // 2


def window_intensities(array: Array) -> Array:
    """Scale intensities from the 1st to the 99th percentile to grey values, uint8."""
    low, high = np.percentile(array, [1, 99])
    if low == high:
        low, high = array.min(), array.max()
    fractions = np.clip((array - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    return np.asarray(255 * fractions, np.uint8)


def scale_picture(grey: Array, size: Array) -> Image.Image:
    """Resize grey values (rows, columns) to a size in pixels."""
    height, width = (max(1, round(float(n))) for n in size)
    return Image.fromarray(np.ascontiguousarray(grey)).resize((width, height), Image.Resampling.BILINEAR)


def resize_labels(labels: Array, shape: Sequence[int]) -> Array:
    """Resize a label map (rows, columns) by nearest neighbours."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(shape, labels.shape, strict=True))
    return np.asarray(labels[np.ix_(rows, columns)])


def find_edges(labels: Array) -> Array:
    """Mark pixels with a different label above, below, left or right; edges are two pixels wide."""
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        is_edge = np.diff(labels.astype(np.int64), axis=axis) != 0
        edge |= np.insert(is_edge, 0, False, axis=axis) | np.insert(is_edge, is_edge.shape[axis], False, axis=axis)
    return edge
