"""Quality metrics of an image as read: intensity range, grey levels, noise, background, and a perceptual hash.

The metrics do not judge the image. `FLAGS` does: it defines a code for each metric beyond a fixed threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.fft import dct
from scipy.ndimage import minimum_filter

from medim.types import Array, Volume

MAX_LEVELS = 256  # distinct values are counted up to this number
BACKGROUND_FRACTION = 0.1  # background threshold, as a fraction of the range from the 1st to the 99th percentile
NOISE_SLICES = 32  # evenly spaced slices of a stack for the noise estimate
MIN_NOISE_VOXELS = 64  # fewest voxels for a noise estimate
HASH_SIDE = 8  # side of the square of DCT coefficients for the hash
_CHUNK_VALUES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class QualityMetrics:
    """Quality metrics of one image, over all its channels.

    Attributes:
        minimum: smallest value.
        p1: 1st percentile.
        median: 50th percentile.
        p99: 99th percentile.
        maximum: largest value.
        n_unique_values: number of distinct values, counted up to `MAX_LEVELS`.
        noise: standard deviation of the noise, in units of the image; None if the foreground is too small.
        snr: median of the foreground above the 1st percentile, divided by the noise; None without noise.
        background_fraction: fraction of background voxels.
        saturated: fraction of voxels at the maximum.
        hash: 16 hex digits, see `compute_perceptual_hash`; None if the hashed slice is constant.
    """

    minimum: float
    p1: float
    median: float
    p99: float
    maximum: float
    n_unique_values: int
    noise: float | None
    snr: float | None
    background_fraction: float
    saturated: float
    hash: str | None


@dataclass(frozen=True)
class QualityFlag:
    """Condition of a quality flag, and its meaning."""

    metric: str
    side: Literal["below", "above"]
    threshold: float
    meaning: str

    def is_raised(self, value: float | None) -> bool:
        """Whether a metric with this value raises the flag; a value that could not be measured does not."""
        if value is None:
            return False
        return value < self.threshold if self.side == "below" else value > self.threshold


FLAGS: dict[str, QualityFlag] = {
    "few-levels": QualityFlag(
        "n_unique_values", "below", 16, "fewer than 16 distinct values: a mask or a drawing, or too few bits"
    ),
    "mostly-empty": QualityFlag("background_fraction", "above", 0.95, "more than 95 % of the voxels are background"),
    "clipped": QualityFlag("saturated", "above", 0.01, "more than 1 % of the voxels have the maximum value"),
    "noisy": QualityFlag(
        "snr", "below", 5, "the signal is less than 5 times the noise, Rose's limit for detecting a detail"
    ),
    "near-duplicate": QualityFlag(
        "hamming_other_subject",
        "below",
        5,
        "an image of another subject differs in at most 4 of the 64 bits of the hash",
    ),
}


def list_flags(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """List the codes of raised flags, in the order of `FLAGS`.

    Args:
        values: metric name to value; `hamming_other_subject` is that of `quality.csv`.

    Examples:
        >>> list_flags({"n_unique_values": 4, "background_fraction": 0.99, "snr": None})
        ('few-levels', 'mostly-empty')
    """
    return tuple(code for code, flag in FLAGS.items() if flag.is_raised(values.get(flag.metric)))


def measure_quality(volume: Volume) -> QualityMetrics:
    """Measure the quality metrics of an image from a reader, before any preprocessing.

    Background voxels are at most a tenth of the way from the 1st to the 99th percentile, as in BET (Smith 2002, "Fast
    robust automated brain extraction"): air and its noise in an MRI, the zeros around a stripped brain, the border of
    an X-ray. In a crop without background, the darkest few percent of the voxels count as background.

    Args:
        volume: (C, ...), finite.

    Examples:
        >>> image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
        >>> volume = Volume(array=image, affine=np.eye(4), native_affine=np.eye(4), native_shape=(8, 8))
        >>> metrics = measure_quality(volume)
        >>> metrics.median, metrics.n_unique_values
        (31.5, 64)
    """
    values = volume.array.reshape(-1)
    p1, median, p99 = (float(v) for v in np.percentile(values, [1, 50, 99]))
    maximum = float(values.max())
    background = p1 + BACKGROUND_FRACTION * (p99 - p1)
    foreground = values > background
    noise = _estimate_noise(volume, background)
    signal = float(np.median(values[foreground], overwrite_input=True)) - p1 if noise else 0.0
    return QualityMetrics(
        minimum=float(values.min()),
        p1=p1,
        median=median,
        p99=p99,
        maximum=maximum,
        n_unique_values=_count_unique_values(values),
        noise=noise,
        snr=signal / noise if noise else None,
        background_fraction=1 - float(foreground.mean()),
        saturated=float((values == maximum).mean()),
        hash=compute_perceptual_hash(volume.array),
    )


def compute_perceptual_hash(image: Array) -> str | None:
    """Compute a 64-bit hash that changes in only a few bits if an image is rescaled, recompressed, resampled or noisy.

    The DCT hash of Zauner (2010), "Implementation and Benchmarking of Perceptual Image Hash Functions", as in pHash:
    each bit indicates whether one of the 8 by 8 lowest frequencies, without the mean, is above their median. Values
    are clipped to the 1st and 99th percentile. A 3D image is represented by its middle axial slice, or, if that has
    fewer than 16 voxels along a side, by the middle slice across the shortest axis. Rotated, mirrored or cropped images
    have different hashes.

    Args:
        image: (C, D, H, W) or (C, H, W).

    Returns:
        16 hex digits, or None if the slice is constant.
    """
    plane = _select_middle_slice(image).mean(axis=0, dtype=np.float64)
    plane = np.clip(plane, *np.percentile(plane, [1, 99]))
    if plane.min() == plane.max():
        return None
    part = slice(1, HASH_SIDE + 1)
    low = dct(dct(plane, axis=0)[part], axis=1)[:, part]
    low = np.pad(low, [(0, HASH_SIDE - n) for n in low.shape])  # sides below 9 voxels have fewer frequencies
    return np.packbits(low > np.median(low)).tobytes().hex()


def _select_middle_slice(image: Array) -> Array:
    """Select the middle slice (C, H, W); the mean of two if the count is even, which is robust to resampling."""
    if image.ndim == 3:
        return image
    axis = 3 if min(image.shape[1:3]) >= 2 * HASH_SIDE else 1 + int(np.argmin(image.shape[1:]))
    count = image.shape[axis]
    return np.asarray(image.take([(count - 1) // 2, count // 2], axis).mean(axis))


def _estimate_noise(volume: Volume, background: float) -> float | None:
    """Estimate the standard deviation of the noise, from a Laplacian that removes slow variations.

    The 3 by 3 mask of Immerkaer (1996), "Fast Noise Variance Estimation", is applied within the slices of the finest
    spacing. Its mean is replaced by the median over the foreground (Donoho and Johnstone 1994), which is less sensitive
    to edges. If the scanner has interpolated the slices, neighbouring voxels share noise and the estimate is too small.
    """
    stack = (
        np.moveaxis(volume.array, _find_slice_axis(volume), 1) if volume.spatial_dims == 3 else volume.array[:, None]
    )
    count = stack.shape[1]
    stack = stack[:, np.linspace(0, count - 1, min(count, NOISE_SLICES)).astype(int)]
    inside = minimum_filter(stack, size=(1, 1, 3, 3))[..., 1:-1, 1:-1] > background  # excludes edges to the background
    if np.count_nonzero(inside) < MIN_NOISE_VOXELS:
        return None
    response = np.diff(np.diff(stack, 2, axis=-1), 2, axis=-2)[inside]  # the mask amplifies the deviation by 6
    return float(np.median(np.abs(response))) / 0.6745 / 6


def _find_slice_axis(volume: Volume) -> int:
    """Find the array axis across the slices: the axis with the largest spacing; the last one if equal."""
    return 1 + max(range(3), key=lambda axis: (round(volume.spacing[axis], 3), axis))


def _count_unique_values(values: Array) -> int:
    unique_values = values[:0]
    for start in range(0, values.size, _CHUNK_VALUES):
        unique_values = np.union1d(unique_values, values[start : start + _CHUNK_VALUES])
        if unique_values.size >= MAX_LEVELS:
            return MAX_LEVELS
    return int(unique_values.size)
