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
from medim.data.readers.dicom.frames import KEYS
from medim.data.readers.dicom.stack import SAME_PLACE, Stack, axes_of, stack
from medim.data.readers.inspection import Frame

SAME_DIRECTION = 5e-4  # of unit vectors; scanners round the text of one orientation differently from slice to slice
SAME_LENGTH = 1e-3  # of pixel spacings, relative
MANY = 10  # slices of one orientation that are an image of their own beside others of the series
FEW = 0.1  # of a series: slices that may be odd without spoiling it
_KEYS_AT_ONCE = 3
_NOWHERE = "the header does not say where the slices lie (position, orientation, spacing)"
_MIXED = {  # by `_difference`
    "place": ReadError("no-geometry", _NOWHERE),
    "orientation": ReadError("mixed-orientation", "the slices do not lie parallel; expected one orientation"),
    "size": ReadError("mixed-size", "the slices differ in rows or columns"),
    "spacing": ReadError("mixed-spacing", "the pixel spacing differs from slice to slice"),
}
_ODD = {
    "place": ReadError("no-geometry", _NOWHERE),
    "orientation": ReadError("odd-orientation", "the slice lies askew of the others of its series"),
    "size": ReadError("odd-size", "the slice has other rows or columns than the others of its series"),
    "spacing": ReadError("odd-spacing", "the slice has another pixel spacing than the others of its series"),
}

Same = Callable[[int, int], bool]
Stacks = tuple[list[Stack], list[tuple[list[int], ReadError]]]


def stacks_of(frames: Sequence[Frame | None], same: Same) -> Stacks:
    """Sort the frames of a series into stacks.

    Args:
        frames: one a file, or those of a file; None where the header does not say where it lies.
        same: whether the frames at two places hold the same pixels; asked only where nothing else tells them apart.

    Returns:
        the stacks, and places of frames that are in none, with the reason: each frame is in one of the two, once.
    """
    if not any(frames):
        return [], [(list(range(len(frames))), _MIXED["place"])]
    groups = _parallel(frames)
    if len(groups) == 1:
        return _stacks_of_group(frames, groups[0], same)
    whole = [group for group in groups if len(group) >= MANY and frames[group[0]]]
    odd = [group for group in groups if group not in whole]
    if not whole or sum(map(len, odd)) >= FEW * len(frames):
        return [], [(list(range(len(frames))), _MIXED[_difference(frames[groups[0][0]], frames[groups[1][0]])])]
    stacks: list[Stack] = []
    refused: list[tuple[list[int], ReadError]] = []
    for group in odd:
        error = _ODD[_difference(frames[whole[0][0]], frames[group[0]])]
        refused += [([place], error) for place in group]
    for group in whole:
        found, spoilt = _stacks_of_group(frames, group, same)
        stacks += [replace(one, quality=(*one.quality, "odd-slices-left-out")) if odd else one for one in found]
        refused += spoilt
    return stacks, refused


def _parallel(frames: Sequence[Frame | None]) -> list[list[int]]:
    """Places of frames of one orientation, size and spacing, the largest group first; last, those that lie nowhere."""
    groups: list[list[int]] = []
    for place, frame in enumerate(frames):
        group = next((group for group in groups if not _difference(frames[group[0]], frame)), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return sorted(groups, key=lambda group: (frames[group[0]] is None, -len(group)))


def _difference(one: Frame | None, other: Frame | None) -> str:
    """What tells two frames apart that cannot be slices of one stack; nothing where they may be."""
    if one is None or other is None:
        return "place" if one is not other else ""
    if one.orientation != other.orientation and _apart(one.orientation, other.orientation) > SAME_DIRECTION:
        return "orientation"
    if one.size != other.size:
        return "size"
    wider = max(a / b for a, b in zip((*one.spacing, *other.spacing), (*other.spacing, *one.spacing), strict=True))
    return "spacing" if wider > 1 + SAME_LENGTH else ""


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _stacks_of_group(frames: Sequence[Frame | None], group: Sequence[int], same: Same) -> Stacks:
    """Parallel frames to stacks, those that share a place told apart."""
    known = {place: frame for place in group if (frame := frames[place])}
    refused: list[tuple[list[int], ReadError]] = []
    try:
        sites = _sites(known)
        parts = _told_apart(known, sites)
        if parts is None:
            copies = _copies(known, sites, same)
            refused += [
                ([place], ReadError("duplicate", "the place and pixels of a file before it")) for place in copies
            ]
            known = {place: frame for place, frame in known.items() if place not in copies}
            parts = _told_apart(known, sites) or [list(known)]  # `stack` says what is wrong
    except ReadError as error:
        return [], [(list(group), error)]
    stacks, most = [], max(map(len, parts))
    for part in parts:
        if len(part) < most:
            refused.append((part, ReadError("missing-slices", f"{len(part)} slices; other scans of it have {most}")))
            continue
        try:
            one = stack([known[place] for place in part])
        except ReadError as error:
            refused.append((part, error))
            continue
        stacks.append(replace(one, places=tuple(part[place] for place in one.places)))
    return stacks, refused


def _sites(frames: Mapping[int, Frame]) -> dict[int, int]:
    """The number of the place along the normal where each frame lies."""
    normal = axes_of(next(iter(frames.values())))[:, 2]
    depth = np.array([frame.position for frame in frames.values()]) @ normal
    order = np.argsort(depth, kind="stable")
    numbers = np.concatenate([[0], np.cumsum(np.diff(depth[order]) >= SAME_PLACE)])
    places = list(frames)
    return {places[at]: int(number) for at, number in zip(order, numbers, strict=True)}


def _told_apart(frames: Mapping[int, Frame], sites: Mapping[int, int]) -> list[list[int]] | None:
    """Frames in parts without repeats, as many as frames lie at one place; None where no key makes them.

    The first key that does it wins; where none does alone, the first two, or three.
    """
    most = max(Counter(sites[place] for place in frames).values())
    if most == 1:
        return [list(frames)]
    differing = [key for key in range(len(KEYS)) if len({frame.keys[key] for frame in frames.values()}) > 1]
    for number in range(1, _KEYS_AT_ONCE + 1):
        for keys in combinations(differing, number):
            parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for place, frame in frames.items():
                parts[tuple(frame.keys[key] for key in keys)].append(place)
            if len(parts) == most and all(
                len({sites[place] for place in part}) == len(part) for part in parts.values()
            ):
                return list(parts.values())
    return None


def _copies(frames: Mapping[int, Frame], sites: Mapping[int, int], same: Same) -> set[int]:
    """Frames that say, lie and show what one before them does."""
    copies: set[int] = set()
    first: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for place, frame in frames.items():
        others = first[sites[place], frame.keys]
        if any(_apart(frames[one].position, frame.position) < SAME_PLACE and same(one, place) for one in others):
            copies.add(place)
        else:
            others.append(place)
    return copies
