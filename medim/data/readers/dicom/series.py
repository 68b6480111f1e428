"""Assemble the frames of a series into stacks, and reject frames that do not fit.

Frames are grouped by orientation, size and pixel spacing. If several frames of a group have the same position, an
attribute that separates them is searched in the order of `frames.FRAME_KEYS`. Attributes that differ without such a
conflict do not split a group (AcquisitionNumber often counts the slices of one volume).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.frames import FRAME_KEYS
from medim.data.readers.dicom.stack import SLICE_POSITION_TOLERANCE, Stack, compute_slice_axes, stack_frames
from medim.data.readers.inspection import FramePlane

# of unit vectors: scanners round the orientation differently from slice to slice
DIRECTION_TOLERANCE = 5e-4
SPACING_TOLERANCE = 1e-3  # relative difference of pixel spacings
MIN_SLICES = 10  # slices of one orientation that form a separate image, next to other slices of the series
MAX_ODD_FRACTION = 0.1  # fraction of non-matching slices that are dropped instead of rejecting the series
_MAX_KEYS = 3
_NO_GEOMETRY = "the header does not specify the slice geometry (position, orientation, spacing)"
_MIXED_ERRORS = {  # by `_find_difference`
    "place": ReadError("no-geometry", _NO_GEOMETRY),
    "orientation": ReadError("mixed-orientation", "the slices are not parallel; expected one orientation"),
    "size": ReadError("mixed-size", "the slices differ in rows or columns"),
    "spacing": ReadError("mixed-spacing", "the pixel spacing differs from slice to slice"),
}
_ODD_ERRORS = {
    "place": ReadError("no-geometry", _NO_GEOMETRY),
    "orientation": ReadError("odd-orientation", "the slice is not parallel to the other slices of its series"),
    "size": ReadError("odd-size", "the slice differs in rows or columns from the other slices of its series"),
    "spacing": ReadError("odd-spacing", "the slice differs in pixel spacing from the other slices of its series"),
}

SamePixels = Callable[[int, int], bool]
StackResult = tuple[list[Stack], list[tuple[list[int], ReadError]]]


def group_into_stacks(frames: Sequence[FramePlane | None], same_pixels: SamePixels) -> StackResult:
    """Group the frames of a series into stacks.

    Args:
        frames: one per file, or all frames of one file; None for frames without geometry in the header.
        same_pixels: whether the frames at two indices have the same pixels; called only if no attribute separates
            them.

    Returns:
        The stacks, and the indices of rejected frames with the reason. Each frame is in exactly one of the two.
    """
    if not any(frames):
        return [], [(list(range(len(frames))), _MIXED_ERRORS["place"])]
    groups = _group_parallel_frames(frames)
    if len(groups) == 1:
        return _stack_parallel_frames(frames, groups[0], same_pixels)
    large_groups = [group for group in groups if len(group) >= MIN_SLICES and frames[group[0]]]
    odd_groups = [group for group in groups if group not in large_groups]
    if not large_groups or sum(map(len, odd_groups)) >= MAX_ODD_FRACTION * len(frames):
        return [], [
            (list(range(len(frames))), _MIXED_ERRORS[_find_difference(frames[groups[0][0]], frames[groups[1][0]])])
        ]
    stacks: list[Stack] = []
    rejected: list[tuple[list[int], ReadError]] = []
    for group in odd_groups:
        error = _ODD_ERRORS[_find_difference(frames[large_groups[0][0]], frames[group[0]])]
        rejected += [([index], error) for index in group]
    for group in large_groups:
        group_stacks, group_rejected = _stack_parallel_frames(frames, group, same_pixels)
        stacks += [
            replace(volume_stack, quality=(*volume_stack.quality, "odd-slices-left-out"))
            if odd_groups
            else volume_stack
            for volume_stack in group_stacks
        ]
        rejected += group_rejected
    return stacks, rejected


def _group_parallel_frames(frames: Sequence[FramePlane | None]) -> list[list[int]]:
    """Group the indices of frames by orientation, size and spacing, the largest first; frames without geometry last."""
    groups: list[list[int]] = []
    for index, frame in enumerate(frames):
        group = next((group for group in groups if not _find_difference(frames[group[0]], frame)), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return sorted(groups, key=lambda group: (frames[group[0]] is None, -len(group)))


def _find_difference(one: FramePlane | None, other: FramePlane | None) -> str:
    """Name the property that prevents two frames from being in one stack; empty if they may be."""
    if one is None or other is None:
        return "place" if one is not other else ""
    if (
        one.orientation != other.orientation
        and _max_difference(one.orientation, other.orientation) > DIRECTION_TOLERANCE
    ):
        return "orientation"
    if one.size != other.size:
        return "size"
    spacing_ratio = max(
        a / b for a, b in zip((*one.spacing, *other.spacing), (*other.spacing, *one.spacing), strict=True)
    )
    return "spacing" if spacing_ratio > 1 + SPACING_TOLERANCE else ""


def _max_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _stack_parallel_frames(
    frames: Sequence[FramePlane | None], group: Sequence[int], same_pixels: SamePixels
) -> StackResult:
    """Assemble parallel frames into stacks, after separating frames at the same position."""
    frames_by_index = {index: frame for index in group if (frame := frames[index])}
    rejected: list[tuple[list[int], ReadError]] = []
    try:
        positions = _number_positions(frames_by_index)
        parts = _separate_repeats(frames_by_index, positions)
        if parts is None:
            copies = _find_copies(frames_by_index, positions, same_pixels)
            rejected += [
                ([index], ReadError("duplicate", "the position and pixels of an earlier file")) for index in copies
            ]
            frames_by_index = {index: frame for index, frame in frames_by_index.items() if index not in copies}
            # without parts, `stack_frames` raises the specific error
            parts = _separate_repeats(frames_by_index, positions) or [list(frames_by_index)]
    except ReadError as error:
        return [], [(list(group), error)]
    stacks, max_count = [], max(map(len, parts))
    for part in parts:
        if len(part) < max_count:
            rejected.append(
                (
                    part,
                    ReadError("missing-slices", f"{len(part)} slices; the other stacks of the series have {max_count}"),
                )
            )
            continue
        try:
            volume_stack = stack_frames([frames_by_index[index] for index in part])
        except ReadError as error:
            rejected.append((part, error))
            continue
        stacks.append(replace(volume_stack, order=tuple(part[index] for index in volume_stack.order)))
    return stacks, rejected


def _number_positions(frames: Mapping[int, FramePlane]) -> dict[int, int]:
    """Number the positions of the frames along the normal."""
    normal = compute_slice_axes(next(iter(frames.values())))[:, 2]
    depth = np.array([frame.position for frame in frames.values()]) @ normal
    order = np.argsort(depth, kind="stable")
    numbers = np.concatenate([[0], np.cumsum(np.diff(depth[order]) >= SLICE_POSITION_TOLERANCE)])
    indices = list(frames)
    return {indices[sorted_index]: int(number) for sorted_index, number in zip(order, numbers, strict=True)}


def _separate_repeats(frames: Mapping[int, FramePlane], positions: Mapping[int, int]) -> list[list[int]] | None:
    """Separate repeated positions into parts with one frame per position; None if no combination of keys does.

    Uses the first key that separates the frames; if there is none, the first pair of keys, then the first triple.
    """
    max_count = max(Counter(positions[index] for index in frames).values())
    if max_count == 1:
        return [list(frames)]
    candidate_keys = [key for key in range(len(FRAME_KEYS)) if len({frame.keys[key] for frame in frames.values()}) > 1]
    for number in range(1, _MAX_KEYS + 1):
        for keys in combinations(candidate_keys, number):
            parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for index, frame in frames.items():
                parts[tuple(frame.keys[key] for key in keys)].append(index)
            if len(parts) == max_count and all(
                len({positions[index] for index in part}) == len(part) for part in parts.values()
            ):
                return list(parts.values())
    return None


def _find_copies(frames: Mapping[int, FramePlane], positions: Mapping[int, int], same_pixels: SamePixels) -> set[int]:
    """Find frames with the attributes, position and pixels of an earlier frame."""
    copies: set[int] = set()
    frames_by_position: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, frame in frames.items():
        earlier = frames_by_position[positions[index], frame.keys]
        if any(
            _max_difference(frames[one].position, frame.position) < SLICE_POSITION_TOLERANCE and same_pixels(one, index)
            for one in earlier
        ):
            copies.add(index)
        else:
            earlier.append(index)
    return copies
