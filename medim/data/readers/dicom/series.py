"""Assemble the frames of a series into stacks, and reject frames that do not fit.

Frames are grouped by orientation, size, pixel spacing and frame of reference. If several frames of a group have the
same position, an attribute that separates them is searched in the order of `frames.FRAME_KEYS`, and last of all the
order of the frames: volume k has the k-th InstanceNumber at each position. Attributes that differ without such a
conflict do not split a group (AcquisitionNumber often counts the slices of one volume).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

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
    "reference": ReadError("mixed-references", "the slices are of several frames of reference; expected one"),
}
_ODD_ERRORS = {
    "place": ReadError("no-geometry", _NO_GEOMETRY),
    "orientation": ReadError("odd-orientation", "the slice is not parallel to the other slices of its series"),
    "size": ReadError("odd-size", "the slice differs in rows or columns from the other slices of its series"),
    "spacing": ReadError("odd-spacing", "the slice differs in pixel spacing from the other slices of its series"),
    "reference": ReadError("mixed-references", "the slice has another frame of reference than most of its series"),
}

StackResult = tuple[list[Stack], list[tuple[list[int], ReadError]]]
_Rejections = list[tuple[list[int], ReadError]]


@dataclass(frozen=True)
class SeriesFrames:
    """Frames of a series, one per file, or all frames of one file.

    Attributes:
        planes: plane of each frame; None without geometry in the header.
        numbers: order of the frames: InstanceNumber, or the number in the file from 1; 0 if unknown.
        references: pseudonym of the frame of reference of each frame; empty if unknown.
        hash_pixels: returns a hash of the pixels of the frame at an index; called only if no attribute separates
            frames at one position.
    """

    planes: Sequence[FramePlane | None]
    numbers: Sequence[int]
    references: Sequence[str]
    hash_pixels: Callable[[int], bytes]


def group_into_stacks(frames: SeriesFrames) -> StackResult:
    """Group the frames of a series into stacks.

    Returns:
        The stacks, and the indices of rejected frames with the reason. Each frame is in exactly one of the two.
    """
    planes = frames.planes
    if not any(planes):
        return [], [(list(range(len(planes))), _MIXED_ERRORS["place"])]
    groups = _group_parallel_frames(frames)
    if len(groups) == 1:
        return _stack_parallel_frames(frames, groups[0])
    large_groups = [group for group in groups if len(group) >= MIN_SLICES and planes[group[0]]]
    odd_groups = groups[len(large_groups) :]
    if not large_groups or sum(map(len, odd_groups)) >= MAX_ODD_FRACTION * len(planes):
        difference = _find_difference(planes[groups[0][0]], planes[groups[1][0]]) or "reference"
        return [], [(list(range(len(planes))), _MIXED_ERRORS[difference])]
    stacks: list[Stack] = []
    rejected: _Rejections = []
    for group in odd_groups:
        difference = _find_difference(planes[large_groups[0][0]], planes[group[0]]) or "reference"
        rejected += [([index], _ODD_ERRORS[difference]) for index in group]
    for group in large_groups:
        group_stacks, group_rejected = _stack_parallel_frames(frames, group)
        stacks += [
            replace(volume_stack, quality=(*volume_stack.quality, "odd-slices-left-out"))
            if odd_groups
            else volume_stack
            for volume_stack in group_stacks
        ]
        rejected += group_rejected
    return stacks, rejected


def _group_parallel_frames(frames: SeriesFrames) -> list[list[int]]:
    """Group the indices of frames that may be in one stack, the largest group first; frames without geometry last.

    Grouping stops, with the remaining frames as one more group, when there are so many groups that the series is
    rejected: its time would grow with the square of the frames.
    """
    references = frames.references if len(set(frames.references) - {""}) > 1 else [""] * len(frames.references)
    groups: list[list[int]] = []
    groups_by_reference: dict[str | None, list[list[int]]] = defaultdict(list)
    max_groups = 2 + len(frames.planes) / MIN_SLICES + MAX_ODD_FRACTION * len(frames.planes)
    for index, plane in enumerate(frames.planes):
        candidates = groups_by_reference[references[index] if plane else None]
        group = next((group for group in candidates if not _find_difference(frames.planes[group[0]], plane)), None)
        if group is not None:
            group.append(index)
            continue
        if len(groups) > max_groups:
            groups.append(list(range(index, len(frames.planes))))
            return sorted(groups[:-1], key=len, reverse=True)
        groups.append([index])
        candidates.append(groups[-1])
    return sorted(groups, key=lambda group: (frames.planes[group[0]] is None, -len(group)))


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


def _stack_parallel_frames(frames: SeriesFrames, group: Sequence[int]) -> StackResult:
    """Assemble parallel frames into stacks, after separating frames at the same position."""
    planes = {index: plane for index in group if (plane := frames.planes[index])}
    rejected: _Rejections = []
    try:
        positions = _number_positions(planes)
        parts = _separate_repeats(frames, planes, positions, rejected)
        if parts is None:
            copies = _find_copies(planes, positions, frames.hash_pixels)
            rejected += [
                ([index], ReadError("duplicate", "the position and pixels of an earlier file")) for index in copies
            ]
            planes = {index: plane for index, plane in planes.items() if index not in copies}
            # without parts, `stack_frames` raises the specific error
            parts = _separate_repeats(frames, planes, positions, rejected) or [list(planes)]
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
            volume_stack = stack_frames([planes[index] for index in part])
        except ReadError as error:
            rejected.append((part, error))
            continue
        stacks.append(replace(volume_stack, order=tuple(part[index] for index in volume_stack.order)))
    return stacks, rejected


def _number_positions(planes: Mapping[int, FramePlane]) -> dict[int, int]:
    """Number the positions of the frames along the normal."""
    normal = compute_slice_axes(next(iter(planes.values())))[:, 2]
    depth = np.array([plane.position for plane in planes.values()]) @ normal
    order = np.argsort(depth, kind="stable")
    numbers = np.concatenate([[0], np.cumsum(np.diff(depth[order]) >= SLICE_POSITION_TOLERANCE)])
    indices = list(planes)
    return {indices[sorted_index]: int(number) for sorted_index, number in zip(order, numbers, strict=True)}


def _separate_repeats(
    frames: SeriesFrames, planes: Mapping[int, FramePlane], positions: Mapping[int, int], rejected: _Rejections
) -> list[list[int]] | None:
    """Separate repeated positions into parts with one frame per position; None if nothing separates them.

    Uses the attributes, else the order of the frames. Parts by order that have the pixels of an earlier one are added
    to `rejected`.
    """
    if parts := _separate_by_keys(planes, positions):
        return parts
    parts = _separate_by_order(planes, positions, frames.numbers)
    if parts is None:
        return None
    copies = _find_copied_parts(parts, planes, positions, frames.hash_pixels)
    error = ReadError("duplicate", "a volume with the positions and pixels of an earlier one")
    rejected += [(parts[number], error) for number in copies]
    return [part for number, part in enumerate(parts) if number not in copies]


def _separate_by_keys(planes: Mapping[int, FramePlane], positions: Mapping[int, int]) -> list[list[int]] | None:
    """Separate repeated positions by the first key that does; else by the first pair of keys, then the first triple."""
    max_count = max(Counter(positions[index] for index in planes).values())
    if max_count == 1:
        return [list(planes)]
    candidate_keys = [key for key in range(len(FRAME_KEYS)) if len({plane.keys[key] for plane in planes.values()}) > 1]
    for number in range(1, _MAX_KEYS + 1):
        for keys in combinations(candidate_keys, number):
            parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for index, plane in planes.items():
                parts[tuple(plane.keys[key] for key in keys)].append(index)
            if len(parts) == max_count and all(
                len({positions[index] for index in part}) == len(part) for part in parts.values()
            ):
                return list(parts.values())
    return None


def _separate_by_order(
    planes: Mapping[int, FramePlane], positions: Mapping[int, int], numbers: Sequence[int]
) -> list[list[int]] | None:
    """Separate repeated positions by their order: part k has the k-th number at each position.

    Frames are first divided by the attributes of which each value occurs equally often at all positions, such as an
    echo time, so that no part mixes them. A single position is not divided, because a series that lost its positions
    would become many images of one slice.
    """
    n_positions = len({positions[index] for index in planes})
    if n_positions == 1 or not all(numbers[index] > 0 for index in planes):
        return None
    volume_keys = []
    for key in range(len(FRAME_KEYS)):
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for index, plane in planes.items():
            counts[plane.keys[key]][positions[index]] += 1
        if all(len(count) == n_positions and len(set(count.values())) == 1 for count in counts.values()):
            volume_keys.append(key)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, plane in planes.items():
        groups[tuple(plane.keys[key] for key in volume_keys)].append(index)
    parts: list[list[int]] = []
    for group in groups.values():
        group_parts = _rank_by_number(group, positions, numbers)
        if group_parts is None or len(group_parts[0]) != n_positions:
            return None
        parts += group_parts
    return parts


def _rank_by_number(
    group: Sequence[int], positions: Mapping[int, int], numbers: Sequence[int]
) -> list[list[int]] | None:
    """Divide frames into parts of which part k has the k-th number at each position; None if that is ambiguous.

    A missing frame would shift all later frames of its position to the previous part. Therefore each position must have
    as many frames, and either the numbers follow the same order of positions in all parts, with the same steps at each
    position, or the parts are numbered one after the other without a missing number. The last part may have fewer
    frames, as of a scan that was stopped, if the numbers start at 1, too.
    """
    by_position: dict[int, list[int]] = defaultdict(list)
    for index in sorted(group, key=numbers.__getitem__):
        by_position[positions[index]].append(index)
    if any(len({numbers[index] for index in indices}) < len(indices) for indices in by_position.values()):
        return None
    n_parts = max(map(len, by_position.values()))
    parts = [
        sorted((indices[k] for indices in by_position.values() if k < len(indices)), key=numbers.__getitem__)
        for k in range(n_parts)
    ]
    first, last = numbers[min(group, key=numbers.__getitem__)], numbers[max(group, key=numbers.__getitem__)]
    is_consecutive = all(numbers[one[-1]] < numbers[other[0]] for one, other in pairwise(parts))
    is_complete = is_consecutive and len({numbers[index] for index in group}) == last - first + 1
    if len({len(part) for part in parts}) == 1:
        has_one_order = len({tuple(positions[index] for index in part) for part in parts}) == 1
        steps = {tuple(numbers[index] - numbers[indices[0]] for index in indices) for indices in by_position.values()}
        return parts if is_complete or (has_one_order and len(steps) == 1) else None
    is_stopped = {len(part) for part in parts[:-1]} == {len(by_position)} and len(group) == last
    return parts if is_complete and is_stopped else None


def _find_copied_parts(
    parts: Sequence[Sequence[int]],
    planes: Mapping[int, FramePlane],
    positions: Mapping[int, int],
    hash_pixels: Callable[[int], bytes],
) -> set[int]:
    """Find parts with the positions and pixels of an earlier part.

    All slices are compared only if the middle ones have equal pixels, so that a few slices are decoded per series.
    """
    copies: set[int] = set()
    earlier_parts: dict[tuple[int, bytes], list[Sequence[int]]] = defaultdict(list)
    for number, part in enumerate(parts):
        part = sorted(part, key=positions.__getitem__)
        earlier = earlier_parts[len(part), hash_pixels(part[len(part) // 2])]
        if any(
            all(
                _max_difference(planes[one].position, planes[index].position) < SLICE_POSITION_TOLERANCE
                and hash_pixels(one) == hash_pixels(index)
                for one, index in zip(other, part, strict=True)
            )
            for other in earlier
        ):
            copies.add(number)
        else:
            earlier.append(part)
    return copies


def _find_copies(
    planes: Mapping[int, FramePlane], positions: Mapping[int, int], hash_pixels: Callable[[int], bytes]
) -> set[int]:
    """Find frames with the attributes, position and pixels of an earlier frame."""
    copies: set[int] = set()
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, plane in planes.items():
        groups[positions[index], plane.keys].append(index)
    for group in groups.values():
        earlier_by_hash: dict[bytes, list[int]] = defaultdict(list)
        for index in group if len(group) > 1 else ():
            earlier = earlier_by_hash[hash_pixels(index)]
            if any(
                _max_difference(planes[one].position, planes[index].position) < SLICE_POSITION_TOLERANCE
                for one in earlier
            ):
                copies.add(index)
            else:
                earlier.append(index)
    return copies
