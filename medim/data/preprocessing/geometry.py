"""Spatial grids: analysis of affines, and resampling of arrays from one grid to another.

A grid is an affine (voxel index to mm, (4, 4) float64) with a shape. In 2D, rows and columns are the first two axes,
so the relevant entries are in the affine's first two rows. Only numpy and scipy are used: training and inference run
the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import ndimage

from medim.types import Array, UserError

BLOCK_VALUES = 1 << 20  # values that are interpolated at once
SNAP_VOXELS = 1e-3  # voxels: grids that differ by less are considered aligned
# cosine between two axes: smaller values are rounding errors of direction cosines in text, larger ones real shear
MAX_ROUNDING_SHEAR = 2e-3


def compact_affine(affine: Array, dims: int) -> Array:
    """Extract the (dims + 1, dims + 1) matrix of a (4, 4) affine."""
    indices = [*range(dims), 3]
    return np.asarray(affine, np.float64)[np.ix_(indices, indices)]


def expand_affine(matrix: Array, affine: Array) -> Array:
    """Replace the first axes and the offset of a (4, 4) `affine` by those of a compact `matrix`."""
    dims = len(matrix) - 1
    out = np.array(affine, np.float64)
    out[:dims, :dims] = matrix[:dims, :dims]
    out[:dims, 3] = matrix[:dims, dims]
    return out


def compute_nearest_rotation(linear: Array) -> Array:
    """Compute the orthogonal matrix nearest to the column directions (polar decomposition of the unit columns).

    Raises:
        UserError: an axis has no length, or two axes coincide.
    """
    length = np.linalg.norm(linear, axis=0)
    if not np.isfinite(linear).all() or (length == 0).any() or abs(np.linalg.det(linear / length)) < 1e-3:
        raise UserError(f"affine: expected linearly independent axes, got {linear.tolist()}. Repair the file's header.")
    left, _, right = np.linalg.svd(linear / length)
    return np.asarray(left @ right)


def straighten_axes(affine: Array, dims: int) -> Array:
    """Make the axes of an affine exactly orthogonal if they deviate only by rounding.

    Direction cosines written as text have errors of 1e-7 to 1e-3. MONAI's `Spacing` interprets these as shear and moves
    the grid by millimetres. The lengths of the axes and the position of the first voxel are kept. A real shear (a
    tilted gantry) is left unchanged, because its correction needs interpolation of voxels, which `resample` does.
    """
    matrix = compact_affine(affine, dims)
    linear = matrix[:dims, :dims]
    length = np.linalg.norm(linear, axis=0)
    directions = compute_nearest_rotation(linear)
    cosines = (linear / length).T @ (linear / length) - np.eye(dims)
    if np.abs(cosines).max() > MAX_ROUNDING_SHEAR:
        return np.array(affine, np.float64)
    matrix[:dims, :dims] = directions * length
    return expand_affine(matrix, affine)


def resample_to(
    array: Array,
    affine: Array,
    target_affine: Array,
    target_shape: Sequence[int],
    *,
    order: int = 1,
    fill: Literal["edge"] | float = "edge",
) -> Array:
    """Resample an array from its grid to another grid.

    Args:
        array: (C, ...), float or integer.
        affine: (4, 4), affine of the array.
        target_affine: (4, 4), affine of the target grid.
        target_shape: spatial shape of the target grid.
        order: order of the spline: 0 nearest, 1 linear, 3 cubic.
        fill: value of target voxels outside the array: that of the nearest voxel ("edge"), or a number.

    Returns:
        (C, *target_shape): the dtype of the array with order 0 or if the grids differ by whole voxels (values are then
        copied), else float32.
    """
    dims = array.ndim - 1
    matrix = np.linalg.solve(compact_affine(affine, dims), compact_affine(target_affine, dims))
    matrix = _snap_matrix(matrix, target_shape)
    linear, offset = matrix[:dims, :dims], matrix[:dims, dims]
    is_nonzero = linear != 0
    if (is_nonzero.sum(0) == 1).all() and (is_nonzero.sum(1) == 1).all():
        source_axes = is_nonzero.argmax(0)  # target axis k runs along source axis source_axes[k]
        reordered_array = array.transpose(0, *(int(a) + 1 for a in source_axes))
        positions = [
            linear[a, k] * np.arange(n) + offset[a]
            for k, (a, n) in enumerate(zip(source_axes, target_shape, strict=True))
        ]
        if order <= 1 or all((c == np.rint(c)).all() for c in positions):
            return _interpolate_axes(reordered_array, positions, order, fill)
    return _interpolate_affine(array, linear, offset, tuple(target_shape), order, fill)


def find_signed_permutation(matrix: Array) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
    """Find source axis and reversal for each target axis; None if the matrix is not a signed permutation."""
    integers = np.rint(matrix)
    is_nonzero = integers != 0
    if np.abs(matrix - integers).max() > SNAP_VOXELS or not (
        (is_nonzero.sum(0) == 1).all() and (np.abs(integers).sum(1) == 1).all()
    ):
        return None
    axes = tuple(int(a) for a in is_nonzero.argmax(0))
    return axes, tuple(bool(integers[a, k] < 0) for k, a in enumerate(axes))


def smooth_axes(array: Array, factors: Sequence[float]) -> Array:
    """Smooth axes that shrink by a factor with a Gaussian of sigma = (factor - 1) / 2 voxels.

    The width is that of scikit-image and MONAI. Edge values are continued, so that edges are not darkened.
    """
    out = array
    for axis, factor in enumerate(factors, start=1):
        if factor > 1 + SNAP_VOXELS:
            out = ndimage.gaussian_filter1d(out, (factor - 1) / 2, axis=axis, mode="nearest")
    return out


def _snap_matrix(matrix: Array, shape: Sequence[int]) -> Array:
    """Round entries that differ from integers by less than `SNAP_VOXELS` voxels over the entire target grid."""
    dims = len(matrix) - 1
    out = matrix.copy()
    for k, n in enumerate(shape):
        is_near = np.abs(out[:dims, k] - np.rint(out[:dims, k])) * max(n, 1) < SNAP_VOXELS
        out[:dims, k] = np.where(is_near, np.rint(out[:dims, k]), out[:dims, k])
    is_near = np.abs(out[:dims, dims] - np.rint(out[:dims, dims])) < SNAP_VOXELS
    out[:dims, dims] = np.where(is_near, np.rint(out[:dims, dims]), out[:dims, dims])
    return out


def _interpolate_axes(array: Array, positions: Sequence[Array], order: int, fill: Literal["edge"] | float) -> Array:
    """Interpolate axis by axis, the one that shrinks most first; positions[k] are source positions in voxels."""
    out = array
    for axis in sorted(range(len(positions)), key=lambda k: len(positions[k]) / array.shape[k + 1]):
        out = _interpolate_axis(out, positions[axis], axis + 1, order)
    out = np.ascontiguousarray(out)
    if fill != "edge":
        for axis, (axis_positions, n) in enumerate(zip(positions, array.shape[1:], strict=True), start=1):
            outside = (axis_positions < -0.5 - SNAP_VOXELS) | (axis_positions > n - 0.5 + SNAP_VOXELS)
            if outside.any():
                np.moveaxis(out, axis, 0)[outside] = fill
    return out


def _interpolate_axis(array: Array, positions: Array, axis: int, order: int) -> Array:
    n = array.shape[axis]
    clipped = np.clip(positions, 0, n - 1)
    nearest = np.rint(np.round(clipped, 6)).astype(np.intp)
    if order == 0 or (clipped == nearest).all():
        return np.take(array, nearest, axis=axis)
    low = np.floor(clipped).astype(np.intp)
    weight = (clipped - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    high = np.minimum(low + 1, n - 1)
    values = array.astype(np.float32, copy=False)
    shape = (*values.shape[:axis], len(positions), *values.shape[axis + 1 :])
    out: Array = np.empty(shape, np.float32)
    step = max(1, BLOCK_VALUES * len(positions) // max(out.size, 1))
    for start in range(0, len(positions), step):  # in blocks, because the differences would take the memory of `out`
        block = slice(start, start + step)
        target = out[(slice(None),) * axis + (block,)]
        np.take(values, low[block], axis=axis, out=target)
        differences = np.take(values, high[block], axis=axis)
        differences -= target
        differences *= weight[(slice(None),) * axis + (block,)]
        target += differences
    return out


def _interpolate_affine(
    array: Array, linear: Array, offset: Array, shape: tuple[int, ...], order: int, fill: Literal["edge"] | float
) -> Array:
    values = array if order == 0 else array.astype(np.float32, copy=False)
    out = np.empty((len(array), *shape), values.dtype)
    for channel, target in zip(values, out, strict=True):
        ndimage.affine_transform(channel, linear, offset, shape, output=target, order=order, mode="nearest")
    if fill != "edge":
        index = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
        for row, shift, n in zip(linear, offset, array.shape[1:], strict=True):
            positions = sum((factor * i for factor, i in zip(row, index, strict=True)), start=np.float64(shift))
            out[:, np.broadcast_to((positions < -0.5 - SNAP_VOXELS) | (positions > n - 0.5 + SNAP_VOXELS), shape)] = (
                fill
            )
    return out
