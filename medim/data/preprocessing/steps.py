"""Deterministic preprocessing steps between reader and network, in numpy and scipy, shared by training and inference.

A run lists its steps as `[{"op": "ras"}, {"op": "resample", "spacing": [1, 1, 1]}, ...]`; the list is saved with the
encoder. Every geometric step updates the affine exactly. `restore_grid` therefore needs only one resampling to return a
result to the original grid, and copies values if the grids differ by whole voxels.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from medim.config import Millimetres, Percentile, Size, SizeOrZero, validate_section
from medim.data.preprocessing.geometry import (
    BLOCK_VALUES,
    compact_affine,
    compute_nearest_rotation,
    expand_affine,
    find_signed_permutation,
    resample_to,
    smooth_axes,
    straighten_axes,
)
from medim.types import Array, Step, UsageError, UserError, Volume

__all__ = [
    "STEPS",
    "check_steps",
    "fixed_spacing",
    "preprocess",
    "resample_mask",
    "resample_to",
    "restore_grid",
    "to_native",
]

SPACING_TOLERANCE_MM = 1e-3  # mm: a spacing this close to the requested one is kept, as in MONAI's Spacing


def orthogonalise_affine(volume: Volume) -> Volume:
    """Make axes exactly orthogonal if rounding in the header made them deviate; changes no voxels. Must come first."""
    return volume.with_array(volume.array, straighten_axes(volume.affine, volume.spatial_dims))


def reorient_to_ras(volume: Volume) -> Volume:
    """Permute and reverse axes so that they point to Right, Anterior, Superior. 2D images are unchanged."""
    if volume.spatial_dims == 2:
        return volume
    axes_rotation = compute_nearest_rotation(volume.affine[:3, :3])
    axes = [0, 0, 0]
    weight = np.abs(axes_rotation)
    for axis in np.argsort(-weight.max(axis=0), kind="stable"):  # the axis with the clearest direction first
        world = int(np.argmax(weight[:, axis]))
        axes[world] = int(axis)
        weight[world] = -1.0
    index_map = np.zeros((4, 4))  # new index to old index
    index_map[3, 3] = 1.0
    for world, axis in enumerate(axes):
        sign = 1.0 if axes_rotation[world, axis] > 0 else -1.0
        index_map[axis, world] = sign
        index_map[axis, 3] = 0.0 if sign > 0 else volume.shape[axis] - 1
    array = volume.array.transpose(0, *(a + 1 for a in axes))
    reversed_axes = tuple(world + 1 for world, axis in enumerate(axes) if index_map[axis, world] < 0)
    return volume.with_array(np.ascontiguousarray(np.flip(array, reversed_axes)), volume.affine @ index_map)


def resample(
    volume: Volume, *, spacing: tuple[Millimetres, ...], order: Literal[0, 1, 3] = 1, antialias: bool = False
) -> Volume:
    """Resample to a spacing. The first voxel keeps its position; the grid ends at the voxel nearest to the last one.

    Grid and values equal those of MONAI's `Spacing(padding_mode="border")`. A sheared grid is straightened.

    Args:
        volume: the image.
        spacing: distance between voxel centres along each axis, in mm.
        order: order of the spline; 3 is slower and overshoots at edges.
        antialias: smooth first along axes that shrink (see `medim.data.preprocessing.geometry.smooth_axes`).
    """
    dims = volume.spatial_dims
    requested_spacing = _check_per_axis("resample.spacing", spacing, dims)
    source_spacing = np.asarray(volume.spacing)
    target_spacing = np.where(
        np.abs(source_spacing - requested_spacing) <= SPACING_TOLERANCE_MM, source_spacing, requested_spacing
    )
    source_matrix = compact_affine(volume.affine, dims)
    lower = np.linalg.qr(source_matrix[:dims, :dims])
    target_matrix = source_matrix.copy()
    target_matrix[:dims, :dims] = lower.Q * np.sign(np.diag(lower.R)) * target_spacing
    # Corners of the image on the new grid; with orthogonal axes, the first voxel is the minimum of them.
    corners = np.stack(np.meshgrid(*([0.0, n - 1.0] for n in volume.shape), indexing="ij")).reshape(dims, -1)
    target_corners = np.linalg.solve(target_matrix[:dims, :dims], source_matrix[:dims, :dims] @ corners).round(3)
    target_matrix[:dims, dims] += target_matrix[:dims, :dims] @ target_corners.min(axis=1)
    shape = tuple(int(n) for n in np.rint(np.ptp(target_corners, axis=1) + 1))
    array = smooth_axes(volume.array, target_spacing / source_spacing) if antialias else volume.array
    affine = expand_affine(target_matrix, volume.affine)
    return volume.with_array(resample_to(array, volume.affine, affine, shape, order=order), affine)


def resize(volume: Volume, *, shape: tuple[Size, ...], keep_aspect: bool = True, antialias: bool = True) -> Volume:
    """Scale the image to a shape in voxels by linear interpolation; the extent, measured at voxel borders, is kept.

    Args:
        volume: the image.
        shape: target spatial shape.
        keep_aspect: scale all axes equally (in mm) so that the image fits, and pad the rest on both sides with the
            minimum.
        antialias: smooth first along axes that shrink (see `medim.data.preprocessing.geometry.smooth_axes`).
    """
    target_shape = _check_per_axis("resize.shape", shape, volume.spatial_dims)
    source_shape = np.asarray(volume.shape, float)
    inner_shape = target_shape
    if keep_aspect:
        extent = source_shape * volume.spacing
        inner_shape = np.clip(np.rint(extent / (extent / target_shape).max()), 1, target_shape)
    if (inner_shape == source_shape).all():
        return pad_or_crop(volume, shape=shape)
    factor = source_shape / inner_shape
    affine = _transform_affine(volume.affine, scale=factor, offset=(factor - 1) / 2)
    array = smooth_axes(volume.array, tuple(factor)) if antialias else volume.array
    inner_array = resample_to(array, volume.affine, affine, tuple(int(n) for n in inner_shape), order=1)
    return pad_or_crop(volume.with_array(inner_array, affine), shape=shape)


def clip_percentiles(volume: Volume, *, lower: Percentile = 0.5, upper: Percentile = 99.5) -> Volume:
    """Clip each channel to its percentiles, so that a few very bright voxels do not determine the scale.

    Args:
        volume: the image.
        lower: percentile that becomes the minimum, 0 to 100.
        upper: percentile that becomes the maximum, 0 to 100.
    """
    if not 0 <= lower < upper <= 100:
        raise UsageError(f"clip_percentiles: expected 0 <= lower < upper <= 100, got {lower} and {upper}.")
    array = _as_float32(volume)
    flat = array.reshape(len(array), -1)
    low, high = np.percentile(flat, [lower, upper], axis=1).astype(np.float32)
    return volume.with_array(np.clip(flat, low[:, None], high[:, None]).reshape(array.shape))


def normalise(volume: Volume, *, method: Literal["zscore", "range", "symmetric"] = "zscore") -> Volume:
    """Normalise each channel. A constant channel becomes zero.

    Args:
        volume: the image.
        method: `zscore` for mean 0 and standard deviation 1, `range` for [0, 1], `symmetric` for [-1, 1].
    """
    array = _as_float32(volume)
    flat = array.reshape(len(array), -1)
    if method == "zscore":
        shift = flat.mean(axis=1, dtype=np.float64)
        scale = np.array([compute_std(channel, mean) for channel, mean in zip(flat, shift, strict=True)])
    else:
        shift = flat.min(axis=1).astype(np.float64)
        scale = flat.max(axis=1) - shift
        if method == "symmetric":
            shift, scale = shift + scale / 2, scale / 2
    constant = scale <= 1e-9 * np.abs(shift)
    scale = np.where(constant, 1.0, scale)
    out: Array = np.empty(flat.shape, np.float32)
    for start in range(0, flat.shape[1], BLOCK_VALUES):  # in blocks, because float64 would take twice the memory
        block = slice(start, start + BLOCK_VALUES)
        out[:, block] = (flat[:, block] - shift[:, None]) / scale[:, None]
    out[constant] = 0.0
    return volume.with_array(out.reshape(array.shape))


def compute_std(values: Array, mean: float) -> float:
    """Compute the standard deviation of contiguous float32 values, with the bits of `values.std(dtype=np.float64)`.

    numpy squares the deviations in a float64 copy of all values, and adds the two halves of an array recursively. This
    function computes the deviations of one part at a time and adds the parts in the same order.

    Args:
        values: (N,), contiguous.
        mean: `values.mean(dtype=np.float64)`.
    """
    return math.sqrt(_sum_squares(values, mean) / len(values))


def _sum_squares(values: Array, mean: float) -> float:
    """Sum the squared deviations from the mean, in the order of numpy's pairwise summation."""
    if len(values) <= BLOCK_VALUES:
        deviations = values - np.float64(mean)
        return float(np.add.reduce(np.multiply(deviations, deviations, out=deviations)))
    half = len(values) // 2
    half -= half % 8
    return _sum_squares(values[:half], mean) + _sum_squares(values[half:], mean)


def crop_foreground(volume: Volume, *, margin: SizeOrZero = 0) -> Volume:
    """Crop the border in which every channel has its minimum (air, or the zeros around a stripped brain).

    Args:
        volume: the image.
        margin: voxels to keep around the foreground, limited by the image.
    """
    if margin < 0:
        raise UsageError(f"crop_foreground.margin: expected 0 or more voxels, got {margin}.")
    spatial = tuple(range(1, volume.array.ndim))
    foreground = (volume.array > volume.array.min(axis=spatial, keepdims=True)).any(axis=0)
    if not foreground.any():
        return volume
    start, stop = [], []
    for axis, n in enumerate(volume.shape):
        indices = np.flatnonzero(foreground.any(axis=tuple(a for a in range(volume.spatial_dims) if a != axis)))
        start.append(max(int(indices[0]) - margin, 0))
        stop.append(min(int(indices[-1]) + 1 + margin, n))
    return _extract_window(volume, start, tuple(b - a for a, b in zip(start, stop, strict=True)))


def pad_or_crop(volume: Volume, *, shape: tuple[Size, ...]) -> Volume:
    """Crop or pad around the centre to a shape; padding has each channel's minimum.

    Args:
        volume: the image.
        shape: target spatial shape, in voxels.
    """
    target_shape = [int(n) for n in _check_per_axis("pad_or_crop.shape", shape, volume.spatial_dims)]
    start = [n // 2 - w // 2 if n > w else -((w - n) // 2) for n, w in zip(volume.shape, target_shape, strict=True)]
    return _extract_window(volume, start, target_shape)


def crop_around_centre(volume: Volume, *, shape: tuple[Size, ...]) -> Volume:
    """Crop one field of view around the centre of mass, so that the size of the original image is no longer visible.

    The window is inside the image if it fits. In smaller images, edge voxels are continued, so that no padding marks
    the border. Voxels are copied, never interpolated; with `resample` before this step, a shape in voxels is a field of
    view in mm. The mass of a voxel is its value above the channel's minimum, as a fraction of the channel's sum; the
    centre is rounded to the nearest voxel.

    Args:
        volume: the image.
        shape: target spatial shape, in voxels.
    """
    target_shape = _check_per_axis("centre.shape", shape, volume.spatial_dims).astype(np.intp)
    mass = _as_float32(volume) - volume.array.min(axis=tuple(range(1, volume.array.ndim)), keepdims=True)
    start = []
    for axis, (n, w) in enumerate(zip(volume.shape, target_shape, strict=True), start=1):
        other_axes = tuple(a for a in range(1, mass.ndim) if a != axis)
        profile = mass.sum(axis=other_axes, dtype=np.float64)  # (C, n)
        total = profile.sum(axis=1, keepdims=True)
        share = np.divide(profile, total, out=np.full_like(profile, 1 / n), where=total > 0).mean(axis=0)
        first_voxel = int(np.rint(round(float(share @ np.arange(n)) - (w - 1) / 2, 6)))
        start.append(min(max(first_voxel, 0), n - w) if n >= w else -int((w - n) // 2))
    affine = _transform_affine(volume.affine, scale=np.ones(len(target_shape)), offset=np.asarray(start, float))
    return volume.with_array(resample_to(volume.array, volume.affine, affine, target_shape.tolist(), order=0), affine)


def pad_to_multiple(volume: Volume, *, multiple: Size) -> Volume:
    """Pad around the centre to a multiple of the network's stride; padding has each channel's minimum.

    Args:
        volume: the image.
        multiple: the stride, in voxels.
    """
    if multiple < 1:
        raise UsageError(f"pad_to_multiple.multiple: expected 1 or more voxels, got {multiple}.")
    return pad_or_crop(volume, shape=tuple(-(-n // multiple) * multiple for n in volume.shape))


STEPS: dict[str, Callable[..., Volume]] = {
    "orthogonalise_affine": orthogonalise_affine,
    "ras": reorient_to_ras,
    "resample": resample,
    "resize": resize,
    "clip_percentiles": clip_percentiles,
    "normalise": normalise,
    "crop_foreground": crop_foreground,
    "pad_or_crop": pad_or_crop,
    "centre": crop_around_centre,
    "pad_to_multiple": pad_to_multiple,
}


def check_steps(steps: Sequence[Step]) -> None:
    """Check the names and options of a list of steps before any step runs.

    Raises:
        UsageError: an unknown step or option (with the nearest spelling), or a value of the wrong type.
    """
    for step in steps:
        validate_section(STEPS, step, key="op", run_args=("volume",))


def fixed_spacing(steps: Sequence[Step]) -> list[float] | None:
    """Return the spacing in mm, along each axis, that the steps resample to; None if images keep their own spacing."""
    grid_step = next((step for step in reversed(steps) if step["op"] in ("ras", "resample", "resize")), {"op": "none"})
    return [float(step) for step in grid_step["spacing"]] if grid_step["op"] == "resample" else None


def preprocess(volume: Volume, steps: Sequence[Step]) -> Volume:
    """Run the steps in their order.

    Args:
        volume: an image from a reader.
        steps: `{"op": name, **options}` each, names from `STEPS`.

    Returns:
        The image on its new grid, float32, contiguous, with unchanged native geometry.

    Raises:
        UsageError: see `check_steps`.
        UserError: the image contains NaN or infinity, or has the wrong number of dimensions for a step.

    Examples:
        >>> volume = Volume(np.ones((1, 5, 5, 9), np.float32), np.eye(4), np.eye(4), native_shape=(5, 5, 9))
        >>> preprocess(volume, [{"op": "ras"}, {"op": "resample", "spacing": [2, 2, 2]}]).shape
        (3, 3, 5)
    """
    values = volume.array.reshape(-1)
    blocks = (values[start : start + BLOCK_VALUES] for start in range(0, values.size, BLOCK_VALUES))
    n_invalid = values.size - sum(int(np.count_nonzero(np.isfinite(block))) for block in blocks)
    if n_invalid:
        raise UserError(
            f"image: expected finite voxels, got {n_invalid} of {volume.array.size} that are NaN or infinite. "
            "Repair or remove the file; preprocessing does not replace such values."
        )
    for apply_step in _compile_steps(json.dumps(list(steps))):
        volume = apply_step(volume)
    return volume.with_array(np.ascontiguousarray(volume.array, np.float32))


def resample_mask(mask: Volume, image: Volume) -> Volume:
    """Resample a mask to the grid of a preprocessed image by nearest neighbour, with 0 outside the mask."""
    labels = resample_to(mask.array, _straighten_source(mask), image.affine, image.shape, order=0, fill=0)
    return mask.with_array(labels, image.affine)


def restore_grid(
    array: Array, processed: Volume, source: Volume, *, order: int = 1, fill: Literal["edge"] | float = "edge"
) -> Array:
    """Resample a result from the preprocessed grid to the grid of the original image.

    Args:
        array: (K, *processed.shape): logits (order 1, then argmax), or labels (order 0).
        processed: the image after `preprocess`.
        source: the image before `preprocess`.
        order: order of the spline.
        fill: value of voxels that preprocessing removed: that of the nearest voxel ("edge"), or a number.

    Returns:
        (K, *source.shape).
    """
    if array.shape[1:] != processed.shape:
        raise UserError(f"restore: expected an array on the grid {processed.shape}, got {array.shape[1:]}.")
    return resample_to(array, processed.affine, _straighten_source(source), source.shape, order=order, fill=fill)


def to_native(array: Array, volume: Volume) -> Array:
    """Convert an array on a reader's grid to the axis order of the file, by permutation and reversal of axes only.

    Args:
        array: (K, *volume.shape).
        volume: volume from the reader.

    Returns:
        (K, *volume.native_shape).

    Raises:
        UserError: the two grids differ by more than order and direction of axes.
    """
    dims = volume.spatial_dims
    matrix = np.linalg.solve(compact_affine(volume.affine, dims), compact_affine(volume.native_affine, dims))
    permutation = find_signed_permutation(matrix[:dims, :dims])
    if permutation is None or array.shape[1:] != volume.shape:
        raise UserError(
            f"to_native: expected an array of {volume.shape} on a reader's grid, got {array.shape[1:]}; "
            f"linear map from the file's grid: {matrix[:dims, :dims].tolist()}. Apply `restore_grid` first."
        )
    axes, reversals = permutation
    out = np.flip(array.transpose(0, *(a + 1 for a in axes)), tuple(k + 1 for k, b in enumerate(reversals) if b))
    if out.shape[1:] != tuple(volume.native_shape):
        raise UserError(f"to_native: expected the file's shape {volume.native_shape}, got {out.shape[1:]}.")
    return np.ascontiguousarray(out)


@functools.lru_cache(maxsize=64)
def _compile_steps(steps: str) -> tuple[functools.partial[Volume], ...]:
    sections = (validate_section(STEPS, step, key="op", run_args=("volume",)) for step in json.loads(steps))
    return tuple(functools.partial(function, **options) for function, options in sections)


def _straighten_source(volume: Volume) -> Array:
    return straighten_axes(volume.affine, volume.spatial_dims)


def _as_float32(volume: Volume) -> Array:
    return volume.array.astype(np.float32, copy=False)


def _check_per_axis(name: str, values: Sequence[float], dims: int) -> Array:
    if min(values, default=0) <= 0:
        raise UsageError(f"{name}: expected numbers above 0, got {list(values)}.")
    if len(values) != dims:
        raise UserError(f"{name}: expected {dims} numbers for a {dims}D image, got {list(values)}.")
    return np.asarray(values, np.float64)


def _transform_affine(affine: Array, *, scale: Array, offset: Array) -> Array:
    """Compute the affine of a grid with voxel k at `scale * k + offset` of the old grid, per axis."""
    dims = len(scale)
    index_map = np.eye(dims + 1)
    index_map[:dims, :dims] = np.diag(scale)
    index_map[:dims, dims] = offset
    return expand_affine(compact_affine(affine, dims) @ index_map, affine)


def _extract_window(volume: Volume, start: Sequence[int], shape: Sequence[int]) -> Volume:
    """Extract the box of `shape` voxels from `start` (may be negative); outside, each channel has its minimum."""
    if tuple(shape) == volume.shape and not any(start):
        return volume
    array = volume.array
    source_box = tuple(
        slice(max(a, 0), max(min(a + n, m), 0)) for a, n, m in zip(start, shape, volume.shape, strict=True)
    )
    out = array[(slice(None), *source_box)]
    pad_before = [max(-a, 0) for a in start]
    widths = [(b, n - b - m) for b, n, m in zip(pad_before, shape, out.shape[1:], strict=True)]
    if any(w != (0, 0) for w in widths):
        minimum = array.min(axis=tuple(range(1, array.ndim)))
        canvas = np.empty((len(array), *shape), array.dtype)
        canvas[:] = minimum.reshape(-1, *[1] * len(widths))
        canvas[(slice(None), *(slice(b, b + m) for b, m in zip(pad_before, out.shape[1:], strict=True)))] = out
        out = canvas
    affine = _transform_affine(volume.affine, scale=np.ones(len(shape)), offset=np.asarray(start, float))
    return volume.with_array(np.ascontiguousarray(out), affine)
