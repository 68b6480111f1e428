"""The frames of a series to stacks: which belong together, and what is refused.

Frames are grouped by orientation, size and pixel spacing. Where frames of a group share a place, what tells them apart
is looked for in the order of `dicom_frames.KEYS`: a key that differs without need (AcquisitionNumber often counts the
slices of one volume) splits nothing.
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

DIRECTION_TOLERANCE = (
    5e-4  # of unit vectors; scanners round the text of one orientation differently from slice to slice
)
SPACING_TOLERANCE = 1e-3  # of pixel spacings, relative
MIN_SLICES = 10  # slices of one orientation that are an image of their own beside others of the series
MAX_ODD_FRACTION = 0.1  # of a series: slices that may be odd without spoiling it
_MAX_KEYS = 3
_NO_GEOMETRY = "the header does not say where the slices lie (position, orientation, spacing)"
_MIXED_ERRORS = {  # by `_find_difference`
    "place": ReadError("no-geometry", _NO_GEOMETRY),
    "orientation": ReadError("mixed-orientation", "the slices do not lie parallel; expected one orientation"),
    "size": ReadError("mixed-size", "the slices differ in rows or columns"),
    "spacing": ReadError("mixed-spacing", "the pixel spacing differs from slice to slice"),
}
_ODD_ERRORS = {
    "place": ReadError("no-geometry", _NO_GEOMETRY),
    "orientation": ReadError("odd-orientation", "the slice lies askew of the others of its series"),
    "size": ReadError("odd-size", "the slice has other rows or columns than the others of its series"),
    "spacing": ReadError("odd-spacing", "the slice has another pixel spacing than the others of its series"),
}

SamePixels = Callable[[int, int], bool]
StackResult = tuple[list[Stack], list[tuple[list[int], ReadError]]]


def group_into_stacks(frames: Sequence[FramePlane | None], same_pixels: SamePixels) -> StackResult:
    """Sort the frames of a series into stacks.

    Args:
        frames: one a file, or those of a file; None where the header does not say where it lies.
        same_pixels: whether the frames at two places hold the same pixels; asked only where nothing else tells them
            apart.

    Returns:
        the stacks, and places of frames that are in none, with the reason: each frame is in one of the two, once.
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
    """Places of frames of one orientation, size and spacing, the largest group first; last, those that lie nowhere."""
    groups: list[list[int]] = []
    for index, frame in enumerate(frames):
        group = next((group for group in groups if not _find_difference(frames[group[0]], frame)), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return sorted(groups, key=lambda group: (frames[group[0]] is None, -len(group)))


def _find_difference(one: FramePlane | None, other: FramePlane | None) -> str:
    """What tells two frames apart that cannot be slices of one stack; nothing where they may be."""
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
    """Parallel frames to stacks, those that share a place told apart."""
    frames_by_index = {index: frame for index in group if (frame := frames[index])}
    rejected: list[tuple[list[int], ReadError]] = []
    try:
        positions = _number_positions(frames_by_index)
        parts = _separate_repeats(frames_by_index, positions)
        if parts is None:
            copies = _find_copies(frames_by_index, positions, same_pixels)
            rejected += [
                ([index], ReadError("duplicate", "the place and pixels of a file before it")) for index in copies
            ]
            frames_by_index = {index: frame for index, frame in frames_by_index.items() if index not in copies}
            parts = _separate_repeats(frames_by_index, positions) or [
                list(frames_by_index)
            ]  # `stack_frames` says what is wrong
    except ReadError as error:
        return [], [(list(group), error)]
    stacks, max_count = [], max(map(len, parts))
    for part in parts:
        if len(part) < max_count:
            rejected.append(
                (part, ReadError("missing-slices", f"{len(part)} slices; other scans of it have {max_count}"))
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
    """The number of the place along the normal where each frame lies."""
    normal = compute_slice_axes(next(iter(frames.values())))[:, 2]
    depth = np.array([frame.position for frame in frames.values()]) @ normal
    order = np.argsort(depth, kind="stable")
    numbers = np.concatenate([[0], np.cumsum(np.diff(depth[order]) >= SLICE_POSITION_TOLERANCE)])
    indices = list(frames)
    return {indices[sorted_index]: int(number) for sorted_index, number in zip(order, numbers, strict=True)}


def _separate_repeats(frames: Mapping[int, FramePlane], positions: Mapping[int, int]) -> list[list[int]] | None:
    """Frames in parts without repeats, as many as frames lie at one place; None where no key makes them.

    The first key that does it wins; where none does alone, the first two, or three.
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
    """Frames that say, lie and show what one before them does."""
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
