"""Figures of an image as it was read: range, levels, noise, emptiness, and a hash that copies of it share.

They are measurements without a judgement. `FLAGS` holds the judgements: a stable code for each figure beyond a fixed
threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.fft import dct
from scipy.ndimage import minimum_filter

from medim.types import Array, Volume

MAX_LEVELS = 256  # different values are counted up to here
BACKGROUND_FRACTION = 0.1  # share of the way from the 1st to the 99th percentile that still counts as background
NOISE_SLICES = 32  # of a stack, evenly spread, that the noise is measured in
MIN_NOISE_VOXELS = 64  # voxels that a noise figure stands on
HASH_SIDE = 8  # of the square of coefficients that the hash is made of
_CHUNK_VALUES = 1 << 16


@dataclass(frozen=True)
class QualityMetrics:
    """What is measured of one image, over all its channels.

    Attributes:
        minimum: smallest value.
        p1: 1st percentile.
        median: 50th percentile.
        p99: 99th percentile.
        maximum: largest value.
        levels: number of different values, counted up to `MAX_LEVELS`.
        noise: standard deviation of the noise, in the image's own unit; None where too little of it is foreground.
        snr: median of the foreground above the 1st percentile, over the noise; None where there is no noise.
        empty: share of voxels that are background.
        saturated: share of voxels at the maximum.
        hash: 16 hex digits, see `compute_perceptual_hash`; None where the slice it is made of shows nothing.
    """

    minimum: float
    p1: float
    median: float
    p99: float
    maximum: float
    levels: int
    noise: float | None
    snr: float | None
    empty: float
    saturated: float
    hash: str | None


@dataclass(frozen=True)
class QualityFlag:
    """When an image gets a flag, and what that says."""

    metric: str
    side: Literal["below", "above"]
    threshold: float
    meaning: str

    def is_raised(self, value: float | None) -> bool:
        """Whether a figure of this value gets the flag; one that could not be measured does not."""
        if value is None:
            return False
        return value < self.threshold if self.side == "below" else value > self.threshold


FLAGS: dict[str, QualityFlag] = {
    "few-levels": QualityFlag(
        "levels", "below", 16, "fewer than 16 different values: a mask or a drawing, or too few bits"
    ),
    "mostly-empty": QualityFlag("empty", "above", 0.95, "more than 95 % of the voxels are background"),
    "clipped": QualityFlag("saturated", "above", 0.01, "more than 1 % of the voxels stand at the maximum"),
    "noisy": QualityFlag(
        "snr", "below", 5, "the signal is less than 5 times the noise, Rose's limit for seeing a detail"
    ),
    "near-duplicate": QualityFlag(
        "distance", "below", 5, "an image of another subject differs in at most 4 of the 64 bits of the hash"
    ),
}


def list_flags(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """The codes that figures raise, in the order of `FLAGS`.

    Args:
        values: figure to value; `distance` is to the nearest image of another subject.
    """
    return tuple(code for code, flag in FLAGS.items() if flag.is_raised(values.get(flag.metric)))


def measure_quality(volume: Volume) -> QualityMetrics:
    """The figures of an image as a reader gave it, before any preprocessing.

    Background is what lies at most a tenth of the way from the 1st to the 99th percentile, as in BET (Smith 2002, "Fast
    robust automated brain extraction"): air and its noise in an MRI, the zeros around a stripped brain, the border of
    an X-ray. A crop without any has a few percent of it all the same, its darkest voxels.

    Args:
        volume: (C, ...), finite.
    """
    values = volume.array.reshape(-1)
    p1, median, p99 = (float(v) for v in np.percentile(values, [1, 50, 99]))
    maximum = float(values.max())
    background = p1 + BACKGROUND_FRACTION * (p99 - p1)
    foreground = values > background
    noise = _estimate_noise(volume, background)
    signal = float(np.median(values[foreground])) - p1 if noise else 0.0
    return QualityMetrics(
        minimum=float(values.min()),
        p1=p1,
        median=median,
        p99=p99,
        maximum=maximum,
        levels=_count_levels(values),
        noise=noise,
        snr=signal / noise if noise else None,
        empty=1 - float(foreground.mean()),
        saturated=float((values == maximum).mean()),
        hash=compute_perceptual_hash(volume.array),
    )


def compute_perceptual_hash(image: Array) -> str | None:
    """64 bits that an image shares, but for a few, with its copies: rescaled, recompressed, resampled or noisier.

    The DCT hash of Zauner (2010), "Implementation and Benchmarking of Perceptual Image Hash Functions", as in pHash:
    whether each of the 8 by 8 lowest frequencies, the mean left out, lies above their median. It is taken between the
    1st and the 99th percentile, and of a 3D image from the middle axial slice, or, where that has fewer than 16 voxels
    along a side, the middle slice across the shortest axis. An image that is turned, mirrored or cropped has another.

    Args:
        image: (C, D, H, W) or (C, H, W).

    Returns:
        16 hex digits, or None where the slice shows nothing.
    """
    picture = _select_middle_slice(image).mean(axis=0, dtype=np.float64)
    picture = np.clip(picture, *np.percentile(picture, [1, 99]))
    if picture.min() == picture.max():
        return None
    part = slice(1, HASH_SIDE + 1)
    low = dct(dct(picture, axis=0)[part], axis=1)[:, part]
    low = np.pad(low, [(0, HASH_SIDE - n) for n in low.shape])  # a side of fewer than 9 voxels has not all frequencies
    return np.packbits(low > np.median(low)).tobytes().hex()


def _select_middle_slice(image: Array) -> Array:
    """(C, H, W) of it: the mean of two slices where there are two in the middle, so that resampling moves nothing."""
    if image.ndim == 3:
        return image
    axis = 3 if min(image.shape[1:3]) >= 2 * HASH_SIDE else 1 + int(np.argmin(image.shape[1:]))
    count = image.shape[axis]
    return np.asarray(image.take([(count - 1) // 2, count // 2], axis).mean(axis))


def _estimate_noise(volume: Volume, background: float) -> float | None:
    """Deviation of the noise, from a Laplacian that what varies slowly does not pass.

    The 3 by 3 mask of Immerkaer (1996), "Fast Noise Variance Estimation", within the slices of the finest spacing. Its
    mean is replaced by the median over the foreground (Donoho and Johnstone 1994), which edges move less. Where a
    scanner has interpolated the slices, neighbours share their noise and the figure is too small.
    """
    stack = (
        np.moveaxis(volume.array, _find_slice_axis(volume), 1) if volume.spatial_dims == 3 else volume.array[:, None]
    )
    count = stack.shape[1]
    stack = stack[:, np.linspace(0, count - 1, min(count, NOISE_SLICES)).astype(int)]
    inside = minimum_filter(stack, size=(1, 1, 3, 3))[..., 1:-1, 1:-1] > background  # no edge to the background
    if np.count_nonzero(inside) < MIN_NOISE_VOXELS:
        return None
    response = np.diff(np.diff(stack, 2, axis=-1), 2, axis=-2)[inside]  # the mask's own deviation is 6
    return float(np.median(np.abs(response))) / 0.6745 / 6


def _find_slice_axis(volume: Volume) -> int:
    """The array axis that runs across the slices: the coarsest one, of equal ones the last."""
    return 1 + max(range(3), key=lambda axis: (round(volume.spacing[axis], 3), axis))


def _count_levels(values: Array) -> int:
    unique_values = values[:0]
    for start in range(0, values.size, _CHUNK_VALUES):
        unique_values = np.union1d(unique_values, values[start : start + _CHUNK_VALUES])
        if unique_values.size >= MAX_LEVELS:
            return MAX_LEVELS
    return int(unique_values.size)
