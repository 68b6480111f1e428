"""Order the frames of a volume, and check that they form one evenly spaced stack. Pure geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medim.data.preprocessing.geometry import compute_nearest_rotation
from medim.data.readers.base import ReadError
from medim.data.readers.inspection import FramePlane
from medim.types import Array

SLICE_POSITION_TOLERANCE = 0.01  # mm along the normal
MAX_OFFSET = 0.1  # mm between a slice and its position in an even, straight stack
MAX_RELATIVE_OFFSET = 0.1  # the same as a fraction of the gap, because 0.1 mm is large for a gap of 0.3 mm


@dataclass(frozen=True)
class Stack:
    """Frames that form an image.

    Attributes:
        order: indices of the frames, from first to last slice.
        affine: (4, 4) LPS affine of the (column, row, slice) grid, with exactly orthogonal axes.
        quality: codes of accepted irregularities.
    """

    order: tuple[int, ...]
    affine: Array
    quality: tuple[str, ...] = ()


def stack_frames(frames: Sequence[FramePlane]) -> Stack:
    """Order parallel frames along the slice normal.

    The normal is the cross product of the row and column directions, as in ITK.

    Raises:
        ReadError: no geometry, duplicate positions, missing slices, uneven gaps, or a sheared stack.
    """
    axes = compute_slice_axes(frames[0])
    positions = np.array([frame.position for frame in frames])
    depth = positions @ axes[:, 2]
    order = [int(index) for index in np.argsort(depth, kind="stable")]
    gap = frames[0].thickness
    if len(frames) > 1:
        gap = float(depth[order[-1]] - depth[order[0]]) / (len(frames) - 1)
        _check_gaps(depth[order], gap)
        _check_straight(positions[order], axes[:, 2])
    axes = compute_slice_axes(frames[order[0]])  # orientations differ by rounding; the first slice is used, as in ITK
    affine = np.eye(4)
    affine[:3, :3] = axes * [frames[0].spacing[1], frames[0].spacing[0], gap]  # the column index grows along the row
    affine[:3, 3] = positions[order[0]]
    quality = ["single-slice"] if len(frames) == 1 else []
    if np.array_equal(axes, np.eye(3)) and not positions[:, :2].any():
        quality.append("no-place")  # written by software that discarded the patient position
    return Stack(tuple(order), affine, tuple(quality))


def compute_slice_axes(frame: FramePlane) -> Array:
    """Compute the (3, 3) directions of the next column, row and slice, exactly orthogonal.

    Raises:
        ReadError: the row and column directions are not perpendicular unit vectors.
    """
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise ReadError("bad-geometry", "row and column directions are not perpendicular unit vectors")
    return compute_nearest_rotation(np.stack([row, column, np.cross(row, column)], axis=1))


def _check_gaps(depth: Array, gap: float) -> None:
    """Reject unevenly spaced slices.

    Args:
        depth: (N,), sorted positions along the normal in mm.
        gap: gap of an even stack from the first to the last slice, in mm.

    Raises:
        ReadError: slices are duplicate, missing or uneven.
    """
    gaps = np.diff(depth)
    if gaps.min() < SLICE_POSITION_TOLERANCE:
        n_duplicates = int((gaps < SLICE_POSITION_TOLERANCE).sum())
        raise ReadError("duplicate-position", f"{n_duplicates} of {len(depth)} slices have the position of another one")
    even = depth[0] + gap * np.arange(len(depth))
    if np.abs(depth - even).max() <= min(MAX_OFFSET, MAX_RELATIVE_OFFSET * gap):
        return
    single = float(np.median(gaps[gaps < 1.5 * gaps.min()]))
    steps = np.rint((depth - depth[0]) / single)
    if np.abs(depth - depth[0] - steps * single).max() <= min(MAX_OFFSET, MAX_RELATIVE_OFFSET * single) * steps[
        -1
    ] / len(gaps):
        n_missing = int(steps[-1]) - len(gaps)
        raise ReadError(
            "missing-slices", f"{n_missing} of {len(depth) + n_missing} slices {single:.3f} mm apart are missing"
        )
    raise ReadError("uneven-gaps", f"gaps from {gaps.min():.3f} to {gaps.max():.3f} mm; expected equal gaps")


def _check_straight(positions: Array, normal: Array) -> None:
    """Reject slices that are shifted sideways.

    Args:
        positions: (N, 3), sorted along the normal.
        normal: (3,).

    Raises:
        ReadError: a slice is shifted by more than `MAX_OFFSET`.
    """
    offsets = positions - positions[0]
    sideways = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if sideways.max() > MAX_OFFSET:
        raise ReadError("sheared", f"slices are shifted up to {sideways.max():.3f} mm sideways (a tilted gantry?)")
