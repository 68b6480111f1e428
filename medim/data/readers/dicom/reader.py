"""DICOM: single X-rays, MR series of many files, and multi-frame MR.

Files are grouped by SeriesInstanceUID and made stacks of by `dicom_series`; what is no evenly spaced stack is refused
with a reason rather than guessed at. The native grid of a series is (column, row, slice), as ITK and NIfTI count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medim.data.readers.base import LPS_TO_RAS, ReadError, flat_volume, ras_grid, ras_volume
from medim.data.readers.dicom.header import looks_like_dicom, read_header
from medim.data.readers.dicom.pixels import filled, frames_of, same_pixels
from medim.data.readers.dicom.series import Stacks, stacks_of
from medim.data.readers.dicom.stack import Stack
from medim.data.readers.inspection import Found, Frame, Instance, Refused, Scanned, Sight
from medim.types import Array, Modality, Volume


@dataclass(frozen=True)
class Plan:
    """Where the slices of an image stand: in which files, and in the patient. No pixels were touched.

    Attributes:
        slices: file and number of the frame, from 0, of each slice, first to last on the normal; of an X-ray its file.
        size: rows, columns.
        spacing: of an X-ray, between rows and between columns, in mm.
        affine: (4, 4) LPS of the (column, row, slice) grid; None of an X-ray.
    """

    slices: tuple[tuple[Path, int], ...]
    size: tuple[int, int]
    spacing: tuple[float, float]
    affine: Array | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Each file once, in the order of the slices."""
        return tuple(dict.fromkeys(path for path, _ in self.slices))


class DicomReader:
    """Modalities MR (3D) and CR, DX, RG (2D)."""

    name = "DICOM"

    def accepts(self, path: Path) -> bool:
        """By suffix (`.dcm`, `.dicom`, `.ima`) or first bytes."""
        return looks_like_dicom(path)

    def look(self, path: Path) -> Sight:
        """Read the header alone."""
        return read_header(path)

    def gather(self, sights: Iterable[Sight], modality: Modality | None) -> Scanned:
        """Make images of the files that were looked at; pixels are decoded only where two files claim to be one.

        Args:
            sights: one a file.
            modality: others are refused; None takes all.
        """
        refused: list[Refused] = []
        instances: list[Instance] = []
        for sight in sights:
            refused += sight.refused
            instance = sight.instance
            if instance is None:
                continue
            if modality in (None, instance.origin.kind):
                instances.append(instance)
                continue
            error = ReadError("wrong-modality", f"an image of modality {instance.origin.kind}; expected {modality}")
            refused.append(_refused([instance], error))
        unique, copies = _without_copies(sorted(instances, key=lambda instance: instance.path))
        found: list[Found] = []
        for group in _groups(unique):
            images, others = _images(group)
            found += images
            refused += others
        return found, refused + copies

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one file: an X-ray, a slice, or the frames of a multi-frame object.

        Args:
            path: the file.
            item: number of the stack, where the frames make several.
        """
        return self.read_files([path], item)

    def plan(self, paths: Iterable[Path], item: str | None = None) -> Plan:
        """Where the slices of an image stand, by its headers.

        Args:
            paths: the files of one image.
            item: number of the stack, where the frames of a file make several.

        Raises:
            ReadError: a file is no image, they are no stack, or there is no such item.
        """
        instances = []
        for path in paths:
            sight = read_header(path).at(path)
            if sight.instance is None:
                raise ReadError(sight.refused[0].reason, sight.refused[0].detail)
            instances.append(sight.instance)
        first = instances[0]
        if first.origin.kind == "xray":
            _check_flat(first)
            return Plan(((first.path, 0),), first.origin.size, first.origin.spacing, None)
        one = _chosen(_stacks(instances), item)
        slices = [(instance.path, number) for instance in instances for number in range(instance.count)]
        return Plan(tuple(slices[place] for place in one.places), first.origin.size, first.origin.spacing, one.affine)

    def read_files(self, paths: Iterable[Path], item: str | None = None) -> Volume:
        """Read the files of one image.

        Raises:
            ReadError: see `plan`; or the pixels cannot be decoded.
        """
        plan = self.plan(paths, item)
        if plan.affine is None:
            return flat_volume(filled(frames_of(plan.files[0]))[0], plan.spacing)
        array = np.empty((len(plan.slices), *plan.size), np.float32)
        whole = frames_of(plan.files[0]) if len(plan.files) == 1 else None
        for slot, (path, number) in zip(array, plan.slices, strict=True):
            slot[...] = frames_of(path)[0] if whole is None else whole[number]
        return ras_volume(filled(array).transpose(2, 1, 0), LPS_TO_RAS @ plan.affine)

    def read_folder(self, folder: Path) -> Volume:
        """Read the one series that lies in a folder.

        Raises:
            ReadError: none or several images lie there.
        """
        files = sorted(path for path in folder.iterdir() if path.is_file() and self.accepts(path))
        found, refused = self.gather([self.look(path).at(path) for path in files], None)
        if len(found) == 1:
            return self.read_files(found[0].files, found[0].item)
        if found:
            raise ReadError(
                "several-series", f"{len(found)} images in this folder; expected one series. Use medim index"
            )
        if refused:
            raise ReadError(refused[0].reason, refused[0].detail)
        raise ReadError("no-image", "no DICOM file in this folder; expected one series")


def _chosen(stacks: Stacks, item: str | None) -> Stack:
    """The one stack, or the one of several that an item names.

    Raises:
        ReadError: there is none, or not that one.
    """
    found, refused = stacks
    if not found:
        raise ReadError(refused[0][1].reason, refused[0][1].detail)
    names = [str(number) for number in range(len(found))]
    if item in names:
        return found[int(item)]
    if item is not None:
        raise ReadError("no-such-item", f"no image '{item}' in the file; it has {', '.join(names)}")
    if len(found) > 1:
        raise ReadError("several-volumes", f"{len(found)} stacks of slices; name one, as in file.dcm#0")
    return found[0]


def _without_copies(instances: Sequence[Instance]) -> tuple[list[Instance], list[Refused]]:
    """Each object once: a second file of one SOPInstanceUID is refused, as a copy or as a contradiction."""
    seen: dict[str, Instance] = {}
    unique, refused = [], []
    for instance in instances:
        first = seen.setdefault(instance.sop, instance) if instance.sop else instance
        if first is instance:
            unique.append(instance)
        elif same_pixels(first.path, instance.path):
            error = ReadError("duplicate", "the same SOPInstanceUID and pixels as a file that comes before it")
            refused.append(_refused([instance], error))
        else:
            detail = "the SOPInstanceUID of, but other pixels than, a file that comes before it"
            refused.append(_refused([instance], ReadError("conflicting-duplicate", detail)))
    return unique, refused


def _groups(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Single-frame MR by series; everything else by file."""
    series: dict[str, list[Instance]] = defaultdict(list)
    for place, instance in enumerate(instances):
        alone = instance.origin.kind == "xray" or instance.count > 1 or not instance.origin.series
        series[f"{place}" if alone else instance.origin.series].append(instance)
    return list(series.values())


def _stacks(group: Sequence[Instance]) -> Stacks:
    """The stacks that the frames of a group make; all of it is spoilt where it is of several patients."""
    first = group[0]
    if len({instance.origin.subject for instance in group}) > 1:
        error = ReadError("mixed-references", "the slices are of several patients; expected one")
        return [], [(list(range(len(group))), error)]
    if len(group) == first.count == 1 and not first.frames and "secondary-capture" in first.origin.quality:
        return stacks_of([_captured(first)], lambda one, other: False)
    frames: list[Frame | None] = []
    for instance in group:
        frames += instance.frames or [None] * instance.count
    if first.count > 1:
        return stacks_of(frames, lambda one, other: False)
    return stacks_of(frames, lambda one, other: same_pixels(group[one].path, group[other].path))


def _captured(instance: Instance) -> Frame:
    """The plane of a picture that was captured without its place."""
    spacing = instance.origin.spacing
    return Frame((0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), spacing, instance.origin.size, 1.0, ())


def _check_flat(instance: Instance) -> None:
    if instance.count > 1:
        raise ReadError("several-volumes", f"{instance.count} frames; expected one X-ray")


def _images(group: Sequence[Instance]) -> Scanned:
    """The images of a group of files, and what of it is none."""
    first = group[0]
    if first.origin.kind == "xray":
        if first.count > 1:
            return [], [_refused(group, ReadError("several-volumes", f"{first.count} frames; expected one X-ray"))]
        return [_found(group, None)], []
    stacks, spoilt = _stacks(group)
    if first.count > 1:
        left_out = ("frames-left-out",) if spoilt else ()
        found = [_found(group, one, left_out) for one in stacks]
        if len(found) > 1:
            found = [replace(image, item=str(number)) for number, image in enumerate(found)]
        return found, [] if found else [_refused(group, spoilt[0][1])]
    found = [_found([group[place] for place in sorted(one.places)], one) for one in stacks]
    return found, [_refused([group[place] for place in sorted(places)], error) for places, error in spoilt]


def _found(group: Sequence[Instance], one: Stack | None, odd: tuple[str, ...] = ()) -> Found:
    """One image from its files: a stack of frames, or an X-ray."""
    first = group[0].origin
    shape: tuple[int, ...] = first.size
    affine = np.diag([*first.spacing, 1.0, 1.0])
    if one is not None:
        shape, affine = ras_grid((*first.size[::-1], len(one.places)), LPS_TO_RAS @ one.affine)
        odd = (*odd, *one.quality)
    sop = group[0].sop if len(group) == 1 else ""
    return Found(
        files=tuple(instance.path for instance in group),
        shape=shape,
        affine=affine,
        subject=first.subject or first.study or first.series or None,
        aliases=first.aliases,
        session=first.study or None,
        series=first.series or group[0].sop or None,
        sequence=first.sequence,
        scanner=first.scanner,
        field_strength=first.field_strength,
        names=tuple(name for name in (first.series, sop) if name),
        quality=tuple(sorted({*odd, *(code for instance in group for code in instance.origin.quality)})),
        identities=frozenset().union(*(instance.identities for instance in group)),
    )


def _refused(group: Sequence[Instance], error: ReadError) -> Refused:
    """A file, or files by the first one."""
    detail = f"{error.detail} (series of {len(group)} files)" if len(group) > 1 else error.detail
    identities = frozenset().union(*(instance.identities for instance in group))
    return Refused(path=group[0].path, reason=error.reason, detail=detail, identities=identities)
