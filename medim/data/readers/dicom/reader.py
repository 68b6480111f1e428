"""DICOM reader: single X-rays, MR series of many files, and multi-frame MR.

Files are grouped by SeriesInstanceUID and assembled into stacks by `series`. Frames that do not form an evenly spaced
stack are rejected with a reason. The native grid of a series is (column, row, slice), as in ITK and NIfTI.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from medim.data.readers.base import (
    LPS_TO_RAS,
    MAX_SHORT_RUN,
    ReadError,
    allocate_volume,
    check_memory,
    check_size,
    fill_padding,
    flat_volume,
    ras_grid,
)
from medim.data.readers.dicom.header import inspect_dicom_header, looks_like_dicom
from medim.data.readers.dicom.pixels import decode_frames, hash_pixels, same_pixels
from medim.data.readers.dicom.series import SeriesFrames, StackResult, group_into_stacks
from medim.data.readers.dicom.stack import Stack
from medim.data.readers.inspection import (
    CollectionResult,
    DicomFile,
    FileInspection,
    FramePlane,
    ImageInfo,
    RejectedFile,
)
from medim.types import Array, Modality, Volume

_SLICES_PER_COPY = 16  # neighbours along the slices share a cache line of the volume
MIN_DICOM_BYTES = 132  # preamble and DICM; a shorter file cannot be recognised without a suffix
DAMAGE_REASONS = {"empty-file", "unreadable", "truncated", "no-pixels", "length-mismatch"}  # of an incomplete copy
_EXCLUDED_KINDS = {"localizer", "mosaic", "screen-save", "burned-in"}  # of whole files that may accompany a series


@dataclass(frozen=True)
class SlicePlan:
    """Slices of an image: their files and their positions in the patient, from the headers only.

    Attributes:
        slices: file and frame number (from 0) of each slice, first to last along the normal; for an X-ray, its file.
        size: rows, columns.
        spacing: of an X-ray, distance between rows and between columns, in mm.
        affine: (4, 4) LPS affine of the (column, row, slice) grid; None for an X-ray.
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
    """Reader of MR (3D) and of X-rays (2D): CR, DX, RG, MG, IO, PX, and single images of RF and XA."""

    name = "DICOM"
    class_folders = False

    def accepts(self, path: Path) -> bool:
        """Whether the suffix (`.dcm`, `.dicom`, `.ima`) or the first bytes are those of DICOM."""
        return looks_like_dicom(path)

    def inspect(self, path: Path) -> FileInspection:
        """Read the header only."""
        return inspect_dicom_header(path)

    def collect_images(self, inspections: Iterable[FileInspection], modality: Modality | None) -> CollectionResult:
        """Assemble images from inspected files. Pixels are decoded only to compare files with the same identifiers.

        Args:
            inspections: one per file.
            modality: images of other modalities are rejected; None accepts all.
        """
        rejected: list[RejectedFile] = []
        instances: list[DicomFile] = []
        for inspection in inspections:
            rejected += inspection.rejected
            instance = inspection.instance
            if instance is None:
                continue
            if modality in (None, instance.origin.kind):
                instances.append(instance)
                continue
            if instance.damaged:
                continue
            error = ReadError("wrong-modality", f"an image of modality {instance.origin.kind}; expected {modality}")
            rejected.append(_reject_files([instance], error))
        unique, copies = _reject_duplicate_files(sorted(instances, key=lambda instance: instance.path))
        image_infos: list[ImageInfo] = []
        for group in _group_dicom_files(unique):
            group_images, group_rejected = _build_images(group)
            image_infos += group_images
            rejected += group_rejected
        return _mark_long_runs(image_infos), rejected + copies

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one file: an X-ray, a slice, or the frames of a multi-frame object.

        Args:
            path: DICOM file.
            item: number of the stack, if the frames form several.
        """
        return self.read_files([path], item)

    def plan_slices(self, paths: Iterable[Path], item: str | None = None) -> SlicePlan:
        """Find the slices of an image and their positions, from the headers.

        Args:
            paths: files of one image.
            item: number of the stack, if the frames of a file form several.

        Raises:
            ReadError: a file is not an image, the files do not form a stack, or the item does not exist.
        """
        instances = []
        for path in paths:
            inspection = inspect_dicom_header(path).with_path(path)
            if inspection.instance is None or inspection.rejected:
                raise ReadError(inspection.rejected[0].reason, inspection.rejected[0].detail)
            instances.append(inspection.instance)
        first = instances[0]
        if first.origin.kind == "xray":
            _check_single_frame(first)
            return SlicePlan(((first.path, 0),), first.origin.size, first.origin.spacing, None)
        volume_stack = _select_stack(_stack_dicom_files(instances), item)
        slices = [(instance.path, number) for instance in instances for number in range(instance.count)]
        return SlicePlan(
            tuple(slices[index] for index in volume_stack.order),
            first.origin.size,
            first.origin.spacing,
            volume_stack.affine,
        )

    def read_files(self, paths: Iterable[Path], item: str | None = None) -> Volume:
        """Read the files of one image.

        Raises:
            ReadError: see `plan_slices`; or the pixels cannot be decoded.
        """
        slice_plan = self.plan_slices(paths, item)
        if slice_plan.affine is None:
            return flat_volume(fill_padding(decode_frames(slice_plan.files[0]))[0], slice_plan.spacing)
        shape = (*slice_plan.size[::-1], len(slice_plan.slices))
        check_memory(check_size(shape, 4))
        volume, grid = allocate_volume(shape, LPS_TO_RAS @ slice_plan.affine)
        all_frames = decode_frames(slice_plan.files[0]) if len(slice_plan.files) == 1 else None
        for start in range(0, len(slice_plan.slices), _SLICES_PER_COPY):
            slices = slice_plan.slices[start : start + _SLICES_PER_COPY]
            frames = [decode_frames(path)[0] if all_frames is None else all_frames[number] for path, number in slices]
            grid[..., start : start + len(slices)] = np.stack(frames).T
        fill_padding(volume.array[0])
        return volume

    def read_folder(self, folder: Path) -> Volume:
        """Read the only series in a folder.

        Raises:
            ReadError: the folder contains no image, or several.
        """
        files = sorted(path for path in folder.iterdir() if path.is_file() and self.accepts(path))
        images, rejected = self.collect_images([self.inspect(path).with_path(path) for path in files], None)
        images = mark_damaged_neighbours(images, rejected)
        is_marked = any("damaged-neighbour" in image.quality for image in images)
        damaged_files = [file for file in rejected if is_marked or file.reason in DAMAGE_REASONS]
        if images and damaged_files:
            raise ReadError("incomplete-series", f"a damaged file in this folder: {damaged_files[0].detail}")
        if len(images) == 1:
            return self.read_files(images[0].files, images[0].item)
        if images:
            raise ReadError(
                "several-series", f"{len(images)} images in this folder; expected one series. Use medim index"
            )
        if rejected:
            raise ReadError(rejected[0].reason, rejected[0].detail)
        raise ReadError("no-image", "no DICOM file in this folder; expected one series")


def mark_damaged_neighbours(images: Sequence[ImageInfo], rejected: Sequence[RejectedFile]) -> list[ImageInfo]:
    """Add the quality code `damaged-neighbour` to series of which a rejected file is, or may be, a slice.

    A file with the SeriesInstanceUID of the series is a slice of it. A file without a readable one is probably a slice
    of the only series in its folder if the DICOM reader accepts it, or if it is too short to be recognised and named
    like the slices.

    Args:
        images: images of a source.
        rejected: rejected files of the source.

    Returns:
        The images in the same order.
    """
    marked_series = {file.series for file in rejected if file.series and file.reason not in _EXCLUDED_KINDS}
    suspects: dict[Path, list[Path]] = defaultdict(list)
    for file in rejected:
        if file.reason in {"empty-file", "not-an-image", "unreadable"} and not file.series:
            suspects[file.path.parent].append(file.path)
    series_by_folder: dict[Path, set[str]] = defaultdict(set)
    for image in images:
        if image.series is not None and len(image.files) > 1:
            for folder in {path.parent for path in image.files} & set(suspects):
                series_by_folder[folder].add(image.series)
    marked_series |= {
        series
        for folder, all_series in series_by_folder.items()
        if len(all_series) == 1
        for series in all_series
        if any(_may_be_slice(path, folder, images, series) for path in suspects[folder])
    }
    return [
        replace(image, quality=tuple(sorted({*image.quality, "damaged-neighbour"})))
        if image.series in marked_series and len(image.files) > 1
        else image
        for image in images
    ]


def _mark_long_runs(images: Sequence[ImageInfo]) -> list[ImageInfo]:
    """Add the quality code `long-run` to the volumes of series with many, as a functional or diffusion run has."""
    counts = Counter(image.series or "" for image in images if len(image.shape) == 3)
    return [
        replace(image, quality=tuple(sorted({*image.quality, "long-run"})))
        if image.series and counts[image.series] > MAX_SHORT_RUN
        else image
        for image in images
    ]


def _may_be_slice(path: Path, folder: Path, images: Sequence[ImageInfo], series: str) -> bool:
    """Whether a file with an unreadable header may be a slice of a series in its folder."""
    if looks_like_dicom(path):
        return True
    try:
        if path.stat().st_size >= MIN_DICOM_BYTES:
            return False
    except OSError:
        return False
    pattern = re.sub(r"\d+", "0", path.name)
    names = {file.name for image in images if image.series == series for file in image.files if file.parent == folder}
    return any(re.sub(r"\d+", "0", name) == pattern for name in names)


def _select_stack(stacks: StackResult, item: str | None) -> Stack:
    """Select the only stack, or the one of several with the number `item`.

    Raises:
        ReadError: there is no stack, none with this number, or several without a given number.
    """
    candidates, rejected = stacks
    if not candidates:
        raise ReadError(rejected[0][1].reason, rejected[0][1].detail)
    names = [str(number) for number in range(len(candidates))]
    if item in names:
        return candidates[int(item)]
    if item is not None:
        raise ReadError("no-such-item", f"no image '{item}' in the file; it has {', '.join(names)}")
    if len(candidates) > 1:
        raise ReadError("several-volumes", f"{len(candidates)} stacks of slices; select one, as in file.dcm#0")
    return candidates[0]


def _reject_duplicate_files(instances: Sequence[DicomFile]) -> tuple[list[DicomFile], list[RejectedFile]]:
    """Reject every further file with the same SOPInstanceUID, as a duplicate or a conflicting duplicate.

    A damaged file with the SOPInstanceUID of a complete one is an interrupted transfer that was repeated: it is left
    out, so that its series is not incomplete.
    """
    complete_uids = {instance.sop for instance in instances if not instance.damaged}
    first_by_uid: dict[str, DicomFile] = {}
    unique, rejected = [], []
    for instance in instances:
        if instance.damaged:
            if not instance.sop or instance.sop not in complete_uids:
                unique.append(instance)
            continue
        first = first_by_uid.setdefault(instance.sop, instance) if instance.sop else instance
        if first is instance:
            unique.append(instance)
        elif same_pixels(first.path, instance.path):
            error = ReadError("duplicate", "the same SOPInstanceUID and pixels as an earlier file")
            rejected.append(_reject_files([instance], error))
        else:
            detail = "the same SOPInstanceUID as an earlier file, but different pixels"
            rejected.append(_reject_files([instance], ReadError("conflicting-duplicate", detail)))
    return unique, rejected


def _group_dicom_files(instances: Sequence[DicomFile]) -> list[list[DicomFile]]:
    """Group single-frame MR by series, and everything else by file; damaged files of the latter are left out."""
    series: dict[str, list[DicomFile]] = defaultdict(list)
    for index, instance in enumerate(instances):
        is_single = instance.origin.kind == "xray" or instance.count > 1 or not instance.origin.series
        if is_single and instance.damaged:
            continue
        series[f"{index}" if is_single else instance.origin.series].append(instance)
    return list(series.values())


def _stack_dicom_files(group: Sequence[DicomFile]) -> StackResult:
    """Stack the frames of a group; rejects the whole group if its files are of several patients or studies."""
    first = group[0]
    for name, values in (
        ("patients", {instance.origin.subject for instance in group}),
        ("studies", {instance.origin.study for instance in group}),
    ):
        if len(values) > 1:
            error = ReadError("mixed-references", f"the slices are of several {name}; expected one")
            return [], [(list(range(len(group))), error)]
    planes: list[FramePlane | None] = []
    for instance in group:
        planes += instance.frames or [None] * instance.count
    if len(group) == first.count == 1 and not first.frames and "secondary-capture" in first.origin.quality:
        planes = [_make_capture_plane(first)]
    if first.count > 1:  # frames of one file, of which copies are not searched
        numbers, references = range(1, first.count + 1), [""] * first.count
        return group_into_stacks(SeriesFrames(planes, numbers, references, lambda index: str(index).encode()))
    return group_into_stacks(
        SeriesFrames(
            planes,
            numbers=[instance.number for instance in group],
            references=[instance.origin.reference for instance in group],
            hash_pixels=cache(lambda index: hash_pixels(group[index].path)),
        )
    )


def _make_capture_plane(instance: DicomFile) -> FramePlane:
    """Build the plane of a secondary capture, whose position is unknown."""
    spacing = instance.origin.spacing
    return FramePlane(
        position=(0.0, 0.0, 0.0),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        spacing=spacing,
        size=instance.origin.size,
        thickness=1.0,
        keys=(),
    )


def _check_single_frame(instance: DicomFile) -> None:
    if instance.count > 1:
        raise ReadError("several-volumes", f"{instance.count} frames; expected one X-ray")


def _build_images(group: Sequence[DicomFile]) -> CollectionResult:
    """Build the images of a group of files, and list the rejected files."""
    first = group[0]
    if first.origin.kind == "xray":
        if first.count > 1:
            return [], [_reject_files(group, ReadError("several-volumes", f"{first.count} frames; expected one X-ray"))]
        return [_build_image_info(group, None)], []
    stacks, rejected = _stack_dicom_files(group)
    if first.count > 1:
        quality = ("frames-left-out",) if rejected else ()
        images = [_build_image_info(group, volume_stack, quality) for volume_stack in stacks]
        if len(images) > 1:
            images = [replace(image, item=str(number)) for number, image in enumerate(images)]
        return images, [] if images else [_reject_files(group, rejected[0][1])]
    images, rejected_files = [], []
    has_unplaced_damage = any(group[index].damaged for indices, _ in rejected for index in indices)
    series_quality = ("damaged-neighbour",) * has_unplaced_damage + _find_missing_numbers(group, stacks)
    for indices, error in rejected:
        if members := [group[index] for index in sorted(indices) if not group[index].damaged]:
            rejected_files.append(_reject_files(members, error))
    for volume_stack in stacks:
        members = [group[index] for index in sorted(volume_stack.order)]
        complete = [instance for instance in members if not instance.damaged]
        if complete == members:
            images.append(_build_image_info(members, volume_stack, series_quality))
        elif complete:
            detail = f"{len(members) - len(complete)} of {len(members)} slices are damaged, see their own rows"
            rejected_files.append(_reject_files(complete, ReadError("incomplete-series", detail)))
    return images, rejected_files


def _find_missing_numbers(group: Sequence[DicomFile], stacks: Sequence[Stack]) -> tuple[str, ...]:
    """List the quality code of a series of one stack whose numbering indicates missing files.

    Slices that are absent at an end leave no gap between the positions. ImagesInAcquisition and InstanceNumber are
    optional and are not always counted per series, so they are a hint and no reason to reject the series.
    """
    numbers = [instance.number for instance in group]
    is_short = len(stacks) == 1 and (group[0].origin.n_declared > len(group) or min(numbers) > 1)
    return ("fewer-slices-than-numbered",) if is_short else ()


def _build_image_info(
    group: Sequence[DicomFile], volume_stack: Stack | None, quality: tuple[str, ...] = ()
) -> ImageInfo:
    """Build the metadata of one image from its files: a stack of frames, or an X-ray."""
    first = group[0].origin
    shape: tuple[int, ...] = first.size
    affine = np.diag([*first.spacing, 1.0, 1.0])
    if volume_stack is not None:
        shape, affine = ras_grid((*first.size[::-1], len(volume_stack.order)), LPS_TO_RAS @ volume_stack.affine)
        quality = (*quality, *volume_stack.quality)
    sop = group[0].sop if len(group) == 1 else ""
    return ImageInfo(
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
        quality=tuple(sorted({*quality, *(code for instance in group for code in instance.origin.quality)})),
        identities=frozenset().union(*(instance.identities for instance in group)),
    )


def _reject_files(group: Sequence[DicomFile], error: ReadError) -> RejectedFile:
    """Build the rejection of a file, or of several files represented by the first one."""
    detail = f"{error.detail} (series of {len(group)} files)" if len(group) > 1 else error.detail
    identities = frozenset().union(*(instance.identities for instance in group))
    return RejectedFile(
        path=group[0].path, reason=error.reason, detail=detail, identities=identities, n_files=len(group)
    )
