"""Find look-alikes: images that show the same body, such as copies, crops, other grey levels, or a repeated scan.

Each image is reduced to a coarse map, band-passed, and correlated with the others over small shifts. Two images are
look-alikes if their correlation is an outlier among the correlations of different subjects of the same source: the
number of pairs that chance would give is stated. A perceptual hash of the middle slice, the check of `medim preprocess`
and of studies, misses a scan whose crop has moved by 4 mm, and reports 42 pairs of strangers among 4,075 X-rays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy import ndimage, stats

from medim.data.preprocessing.steps import preprocess
from medim.types import Array, Step, UsageError, Volume

FALSE_PAIRS = 0.001  # pairs of strangers that a search may report by chance, in expectation
MIN_CALIBRATION_IMAGES = 20  # images without which the distribution of strangers is unknown
MIN_CORRELATION = 0.9  # correlation of look-alikes in a smaller source
IMAGE_CELLS = 32  # cells per side of the map of a 2D image
VOLUME_CELLS = 40_000  # largest number of cells in the map of a volume of median size
FINEST_SPACING = 2.5  # finest map of a volume, mm
BAND = (0.7, 3.0)  # standard deviations of the two Gaussians of the band-pass, cells
MAX_SHIFT = {2: 2, 3: 3}  # largest shift along each axis by spatial dimensions, cells
ZOOMS = {2: (1.0, 0.9, 0.8), 3: (1.0,)}  # fractions of the side of an image that are compared with the whole other one
_NULL_IMAGES = 300  # images whose pairs give the distribution of strangers
_EXHAUSTIVE_FLOPS = 4e12  # operations up to which all pairs are compared on the full maps
_CANDIDATES = 5  # images per image that are compared on the full maps if not all pairs are
_BLOCK_ROWS = 1024  # rows of a correlation matrix computed at once
_MAX_Z = float(np.arctanh(1 - 1e-6))


@dataclass(frozen=True)
class LookAlike:
    """A pair of look-alikes.

    Attributes:
        first: number of the first image.
        second: number of the second image, always larger.
        correlation: largest correlation of the maps over shifts, 0 to 1; 1 are equal images.
        deviation: standard deviations of the transformed correlation from the median of strangers; NaN if unknown.
    """

    first: int
    second: int
    correlation: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class LookAlikes:
    """Result of a search.

    Attributes:
        pairs: the look-alikes, the most similar first.
        n_compared: number of pairs of images compared.
        false_pairs: expected number of pairs of strangers among `pairs`; None for too few images to estimate it.
        threshold: smallest correlation of a look-alike.
        median: median correlation of different subjects; None as `false_pairs`.
    """

    pairs: tuple[LookAlike, ...] = field(repr=False)
    n_compared: int
    false_pairs: float | None
    threshold: float
    median: float | None


def choose_map_spacing(extents: Sequence[Sequence[float]]) -> float:
    """Choose the spacing of the maps of volumes in mm, so that a map of median size has at most `VOLUME_CELLS`.

    Args:
        extents: size of each volume along each axis, mm.

    Examples:
        >>> choose_map_spacing([(120, 90, 55)]), round(choose_map_spacing([(200, 200, 180)]), 2)
        (2.5, 5.65)
    """
    volume = float(np.median([np.prod(extent) for extent in extents]))
    return max(FINEST_SPACING, float(np.cbrt(volume / VOLUME_CELLS)))


def check_false_pairs(false_pairs: float) -> None:
    """Raise an error unless the expected number of false pairs is a number above 0."""
    if not 0 < false_pairs < math.inf:
        raise UsageError(f"--false-pairs: expected a number above 0, got {false_pairs}.")


def build_map(volume: Volume, spacing: float) -> Array:
    """Reduce an image to a map: coarse, with clipped intensities, without its low and high spatial frequencies.

    Args:
        volume: (C, ...); only the first channel is used.
        spacing: mm per cell of a volume. X-rays and photographs of films often have no valid spacing: a 2D image is
            squeezed to `IMAGE_CELLS` cells per side.

    Returns:
        float16, spatial shape: `IMAGE_CELLS` squared for each of `ZOOMS`, (zooms, ...), or (1, ...) for a volume.
    """
    image = volume.with_array(volume.array[:1].astype(np.float32))
    if image.array.ndim == 3:
        return np.stack([_filter_band(_squeeze(image, zoom).array[0]) for zoom in ZOOMS[2]]).astype(np.float16)
    steps: list[Step] = [{"op": "ras"}, {"op": "resample", "spacing": [spacing] * 3}]
    return _filter_band(preprocess(image, steps).array[0])[None].astype(np.float16)


def _squeeze(image: Volume, zoom: float) -> Volume:
    """Squeeze the central part of a 2D image to the cells of a map."""
    margins = [round((1 - zoom) / 2 * size) for size in image.array.shape[1:]]
    window = tuple(slice(m, size - m) for m, size in zip(margins, image.array.shape[1:], strict=True))
    centre = image.with_array(image.array[(slice(None), *window)])
    return preprocess(centre, [{"op": "resize", "shape": [IMAGE_CELLS] * 2, "keep_aspect": False}])


def _filter_band(image: Array) -> Array:
    low, high = np.percentile(image, [1, 99])
    clipped = np.clip(image, low, high) / ((high - low) or 1.0)
    narrow, wide = (ndimage.gaussian_filter(clipped, sigma, mode="nearest") for sigma in BAND)
    filtered: Array = narrow - wide
    return filtered


def find_lookalikes(
    maps: Sequence[Array], subjects: Sequence[str], *, false_pairs: float = FALSE_PAIRS, seed: int = 0
) -> LookAlikes:
    """Find pairs of look-alikes.

    The correlations of strangers, after Fisher's transformation, follow a normal distribution closely up to its tail
    (docs/evidence/lookalikes.md); its median and upper standard deviation are estimated from pairs of different
    subjects. A pair is a look-alike if fewer than `false_pairs` of all compared pairs would be as similar by chance.

    All pairs are compared if this takes at most minutes. For larger sources, maps of half the resolution are compared
    first, and the full ones only for the most similar images of each image.

    Args:
        maps: results of `build_map`, one per image.
        subjects: subject of each image.
        false_pairs: expected number of pairs of strangers in the result, above 0.
        seed: random seed of the images from which the distribution is estimated.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> maps = list(rng.normal(size=(30, 1, 12, 12, 12)).astype(np.float16))
        >>> maps[7] = np.roll(maps[3], 2, axis=1)
        >>> [(pair.first, pair.second) for pair in find_lookalikes(maps, list(map(str, range(30)))).pairs]
        [(3, 7)]
    """
    count = len(maps)
    n_compared = count * (count - 1) // 2
    if count < 2:
        return LookAlikes(pairs=(), n_compared=0, false_pairs=None, threshold=MIN_CORRELATION, median=None)
    stack = _stack_maps(maps)
    is_small, is_exhaustive = count < MIN_CALIBRATION_IMAGES, _count_flops(stack) <= _EXHAUSTIVE_FLOPS
    sample = np.sort(np.random.default_rng(seed).permutation(count)[:_NULL_IMAGES])
    matrix = _score_matrix(stack if is_exhaustive else stack[sample])
    null = matrix[np.ix_(sample, sample)] if is_exhaustive else matrix
    owners = np.unique(np.asarray(subjects), return_inverse=True)[1]
    centre, spread = (0.0, np.nan) if is_small else _fit_strangers(null, owners[sample])
    limit = (
        np.arctanh(MIN_CORRELATION)
        if is_small
        else centre + spread * stats.norm.isf(min(false_pairs / n_compared, 0.5))
    )
    limit = min(float(limit), _MAX_Z)
    scores = _list_scores(matrix, limit) if is_exhaustive else _score_candidates(stack)
    pairs = [
        LookAlike(int(first), int(second), float(np.tanh(z)), float((z - centre) / spread))
        for first, second, z in scores
        if z >= limit
    ]
    return LookAlikes(
        pairs=tuple(sorted(pairs, key=lambda pair: -pair.correlation)),
        n_compared=n_compared,
        false_pairs=None if is_small else false_pairs,
        threshold=float(np.tanh(limit)),
        median=None if is_small else float(np.tanh(centre)),
    )


def _stack_maps(maps: Sequence[Array]) -> Array:
    """Crop or pad maps around their centre to their median shape: (N, zooms, ...), float16."""
    shape = [int(np.median(sizes)) for sizes in zip(*(one.shape[1:] for one in maps), strict=True)]
    stack = np.zeros((len(maps), maps[0].shape[0], *shape), np.float16)
    for row, one in zip(stack, maps, strict=True):
        source, target = [slice(None)], [slice(None)]
        for size, n in zip(one.shape[1:], shape, strict=True):
            width = min(size, n)
            source.append(slice((size - width) // 2, (size - width) // 2 + width))
            target.append(slice((n - width) // 2, (n - width) // 2 + width))
        row[tuple(target)] = one[tuple(source)]
    return stack


def _list_shifts(shape: Sequence[int]) -> tuple[list[int], list[tuple[int, ...]]]:
    """List the margins of the compared window along each axis, and all shifts of it."""
    margins = [min(MAX_SHIFT[len(shape)], max(0, (size - 6) // 2)) for size in shape]
    return margins, list(product(*(range(-margin, margin + 1) for margin in margins)))


def _count_flops(stack: Array) -> float:
    count, zooms, *shape = stack.shape
    margins, shifts = _list_shifts(shape)
    cells = np.prod([size - 2 * margin for size, margin in zip(shape, margins, strict=True)])
    return float(2 * count * count * cells * zooms * len(shifts))


def _correlate(first: Array, second: Array) -> Array:
    """Compute the largest absolute correlation of the central windows of maps with all windows of others: (n, m)."""
    margins, shifts = _list_shifts(first.shape[2:])
    centres = _cut_windows(first[:, 0], margins, [0] * len(margins))
    centres -= centres.mean(axis=1, keepdims=True)
    centres *= _invert_norms(centres)[:, None]
    best = np.zeros((len(first), len(second)), np.float32)
    for zoom, shift in product(range(second.shape[1]), shifts):
        windows = _cut_windows(second[:, zoom], margins, shift)
        scales = _invert_norms(windows)
        for start in range(0, len(first), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            np.maximum(best[rows], np.abs(centres[rows] @ windows.T) * scales, out=best[rows])
    return best


def _cut_windows(maps: Array, margins: Sequence[int], shift: Sequence[int]) -> Array:
    """Cut a shifted window of each map (N, ...): (N, cells)."""
    window = tuple(slice(m + s, size - m + s) for m, s, size in zip(margins, shift, maps.shape[1:], strict=True))
    return maps[(slice(None), *window)].astype(np.float32).reshape(len(maps), -1)


def _invert_norms(rows: Array) -> Array:
    """Compute the inverse norm of each row around its mean; 0 for a constant row."""
    squares = np.einsum("ij,ij->i", rows, rows) - rows.shape[1] * rows.mean(axis=1) ** 2
    return np.where(squares > 0, 1 / np.sqrt(np.maximum(squares, 1e-30)), 0.0).astype(np.float32)


def _transform(correlations: Array) -> Array:
    """Apply Fisher's transformation, limited for equal images."""
    transformed: Array = np.minimum(np.arctanh(np.minimum(correlations, 1 - 1e-7)), _MAX_Z)
    return transformed


def _score_matrix(stack: Array) -> Array:
    """Compute the transformed correlations of all pairs in both directions: (N, N), symmetric."""
    best = _correlate(stack, stack)
    return _transform(np.maximum(best, best.T))


def _fit_strangers(scores: Array, owners: Array) -> tuple[float, float]:
    """Estimate median and upper standard deviation of the transformed correlations of different subjects."""
    rows, columns = np.triu_indices(len(scores), 1)
    is_stranger = owners[rows] != owners[columns]
    values = scores[rows, columns][is_stranger] if is_stranger.any() else scores[rows, columns]
    median, upper = np.quantile(values, [0.5, stats.norm.cdf(1)])
    return float(median), max(float(upper - median), 1e-6)


def _list_scores(scores: Array, limit: float) -> Iterator[tuple[int, int, float]]:
    rows, columns = np.nonzero(np.triu(scores, 1) >= limit)
    yield from ((int(i), int(j), float(scores[i, j])) for i, j in zip(rows, columns, strict=True))


def _score_candidates(stack: Array) -> Iterator[tuple[int, int, float]]:
    """Score the pairs with the largest correlations of maps of half the resolution."""
    coarse = _halve(stack[:, :1])
    candidates: dict[int, set[int]] = defaultdict(set)
    for start in range(0, len(stack), _BLOCK_ROWS):
        rows = _correlate(coarse[start : start + _BLOCK_ROWS], coarse)
        rows[np.arange(len(rows)), start + np.arange(len(rows))] = -1
        nearest = np.argpartition(-rows, _CANDIDATES, axis=1)[:, :_CANDIDATES]
        for first, row in enumerate(nearest.tolist(), start=start):
            for second in row:
                candidates[min(first, second)].add(max(first, second))
    for first, neighbours in sorted(candidates.items()):
        seconds = sorted(neighbours)
        one, others = stack[first : first + 1], stack[seconds]
        best = np.maximum(_correlate(one, others)[0], _correlate(others, one)[:, 0])
        yield from ((first, second, float(z)) for second, z in zip(seconds, _transform(best), strict=True))


def _halve(stack: Array) -> Array:
    """Average blocks of two cells along each axis."""
    for axis in range(2, stack.ndim):
        size = stack.shape[axis] // 2 * 2
        even = np.take(stack, range(0, size, 2), axis=axis).astype(np.float32)
        stack = (even + np.take(stack, range(1, size, 2), axis=axis)) / 2
    return stack
