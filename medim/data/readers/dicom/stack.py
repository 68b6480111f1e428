"""Frames to a volume: in which order they lie, and whether they make one evenly spaced stack. Pure geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medim.data.preprocessing.geometry import rotation
from medim.data.readers.base import ReadError
from medim.data.readers.inspection import Frame
from medim.types import Array

SAME_PLACE = 0.01  # mm along the normal
OFF_PLACE = 0.1  # mm that a slice may lie off its place in an even, straight stack
OFF_GAP = 0.1  # the same, of the gap: 0.1 mm is much in a stack of 0.3 mm


@dataclass(frozen=True)
class Stack:
    """Frames that make an image.

    Attributes:
        places: of the frames, from first to last slice.
        affine: (4, 4) LPS, of the (column, row, slice) grid; its axes stand at exact right angles.
        quality: codes of what is odd about it and accepted.
    """

    places: tuple[int, ...]
    affine: Array
    quality: tuple[str, ...] = ()


def stack(frames: Sequence[Frame]) -> Stack:
    """Order parallel frames along the slice normal.

    The normal is the cross product of the row and column directions, as ITK has it.

    Raises:
        ReadError: no geometry, duplicate positions, missing slices, uneven gaps, or a sheared stack.
    """
    turn = axes_of(frames[0])
    positions = np.array([frame.position for frame in frames])
    depth = positions @ turn[:, 2]
    order = [int(place) for place in np.argsort(depth, kind="stable")]
    gap = frames[0].thickness
    if len(frames) > 1:
        gap = float(depth[order[-1]] - depth[order[0]]) / (len(frames) - 1)
        _check_gaps(depth[order], gap)
        _check_straight(positions[order], turn[:, 2])
    turn = axes_of(frames[order[0]])  # where rounding differs, the first slice's word counts, as ITK has it
    affine = np.eye(4)
    affine[:3, :3] = turn * [frames[0].spacing[1], frames[0].spacing[0], gap]  # the next column lies along the row
    affine[:3, 3] = positions[order[0]]
    quality = ["single-slice"] if len(frames) == 1 else []
    if np.array_equal(turn, np.eye(3)) and not positions[:, :2].any():
        quality.append("no-place")  # what software writes that has lost the patient
    return Stack(tuple(order), affine, tuple(quality))


def axes_of(frame: Frame) -> Array:
    """(3, 3) directions of the next column, the next row and the next slice, at exact right angles.

    Raises:
        ReadError: the directions of row and column are no perpendicular unit vectors.
    """
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        raise ReadError("bad-geometry", "row and column directions are not perpendicular unit vectors")
    return rotation(np.stack([row, column, np.cross(row, column)], axis=1))


def _check_gaps(depth: Array, gap: float) -> None:
    """Refuse slices that do not lie evenly.

    Args:
        depth: (N,), sorted places on the normal in mm.
        gap: of an even stack between first and last.

    Raises:
        ReadError: in that case.
    """
    gaps = np.diff(depth)
    if gaps.min() < SAME_PLACE:
        twice = int((gaps < SAME_PLACE).sum())
        raise ReadError("duplicate-position", f"{twice} of {len(depth)} slices lie where another one lies")
    even = depth[0] + gap * np.arange(len(depth))
    if np.abs(depth - even).max() <= min(OFF_PLACE, OFF_GAP * gap):
        return
    single = float(np.median(gaps[gaps < 1.5 * gaps.min()]))
    steps = np.rint((depth - depth[0]) / single)
    if np.abs(depth - depth[0] - steps * single).max() <= min(OFF_PLACE, OFF_GAP * single) * steps[-1] / len(gaps):
        missing = int(steps[-1]) - len(gaps)
        raise ReadError(
            "missing-slices", f"{missing} of {len(depth) + missing} slices {single:.3f} mm apart are missing"
        )
    raise ReadError("uneven-gaps", f"gaps from {gaps.min():.3f} to {gaps.max():.3f} mm; expected even ones")


def _check_straight(positions: Array, normal: Array) -> None:
    """Refuse slices that do not lie above one another.

    Args:
        positions: (N, 3), sorted along the normal.
        normal: (3,).

    Raises:
        ReadError: in that case.
    """
    away = positions - positions[0]
    sideways = np.linalg.norm(away - np.outer(away @ normal, normal), axis=1)
    if sideways.max() > OFF_PLACE:
        raise ReadError("sheared", f"slices lie up to {sideways.max():.3f} mm sideways of the first (a tilted gantry?)")
