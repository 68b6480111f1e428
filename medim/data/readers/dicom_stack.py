"""Frames to a volume: in which order they lie, and whether they make one evenly spaced stack. Pure geometry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medim.data.readers.base import ReadError
from medim.data.readers.sights import Frame
from medim.types import Array

SAME_DIRECTION = 1e-4  # of unit vectors; scanners round the text of one orientation differently from slice to slice
SAME_LENGTH = 1e-3  # of pixel spacings, relative
UNEVEN = 0.02  # of the median gap
SHEAR = 0.02  # sideways drift a slice, of the gap
SAME_PLACE = 0.01  # mm


def stack(frames: Sequence[Frame]) -> tuple[list[int], Array]:
    """Order frames along the slice normal.

    The normal is the cross product of the row and column directions, as ITK has it.

    Returns:
        the places of `frames` from first to last slice, and the (4, 4) LPS affine of the (column, row, slice) grid.

    Raises:
        ReadError: no geometry, mixed orientations or spacings, duplicate positions, uneven gaps, or a sheared stack.
    """
    if not frames:
        raise ReadError("no-geometry", "the header does not say where the slices lie (position, orientation, spacing)")
    orientations = np.array([frame.orientation for frame in frames])
    spacings = np.array([frame.spacing for frame in frames])
    if np.abs(orientations - orientations[0]).max() > SAME_DIRECTION:
        raise ReadError("mixed-orientation", "the slices do not lie parallel; expected one orientation")
    if np.abs(spacings / spacings[0] - 1).max() > SAME_LENGTH:
        raise ReadError("mixed-spacing", "the pixel spacing differs from slice to slice")
    row, column = orientations[0, :3], orientations[0, 3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise ReadError("bad-geometry", "row and column directions are not perpendicular unit vectors")
    normal = np.cross(row, column)
    positions = np.array([frame.position for frame in frames])
    depth = positions @ normal
    order = [int(place) for place in np.argsort(depth, kind="stable")]
    step = _step(positions[order], depth[order], normal, frames[0].thickness)
    affine = np.eye(4)
    affine[:3, 0] = row * spacings[0, 1]  # the next column lies along the row
    affine[:3, 1] = column * spacings[0, 0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    return order, affine


def _step(positions: Array, depth: Array, normal: Array, thickness: float) -> Array:
    """The (3,) vector from a slice to the next.

    Args:
        positions: (N, 3), sorted along the normal.
        depth: (N,), their places on it in mm.
        normal: (3,).
        thickness: gap of a single slice in mm.
    """
    if len(depth) == 1:
        return normal * thickness
    gaps = np.diff(depth)
    if gaps.min() < SAME_PLACE:
        twice = int((gaps < SAME_PLACE).sum())
        raise ReadError("duplicate-position", f"{twice} of {len(depth)} slices lie where another one lies")
    median = float(np.median(gaps))
    if np.abs(gaps - median).max() > max(UNEVEN * median, SAME_PLACE):
        raise ReadError(
            "uneven-gaps",
            f"gaps from {gaps.min():.3f} to {gaps.max():.3f} mm; expected even ones (is a slice missing?)",
        )
    step = np.asarray((positions[-1] - positions[0]) / (len(depth) - 1))
    drift = float(np.linalg.norm(step - (step @ normal) * normal))
    astray = positions - positions[0] - np.outer(np.arange(len(depth)), step)
    if drift > SHEAR * median:
        raise ReadError("sheared", f"each slice lies {drift:.3f} mm sideways of the last (a tilted gantry?)")
    if np.abs(astray).max() > max(UNEVEN * median, SAME_PLACE):
        raise ReadError("sheared", f"slices lie up to {np.abs(astray).max():.3f} mm off a straight line")
    return step
