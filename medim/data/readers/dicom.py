"""DICOM: single X-rays, MR series of many files, and multi-frame MR.

Slices are grouped by SeriesInstanceUID, ordered along the slice normal, and refused with a reason rather than guessed
at where they are no evenly spaced stack. The native grid of a series is (column, row, slice), as ITK and NIfTI count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from medim.data.readers.base import LPS_TO_RAS, ReadError, flat_volume, ras_grid, ras_volume
from medim.data.readers.dicom_header import looks_like_dicom, read_header
from medim.data.readers.dicom_pixels import frames_of, same_pixels
from medim.data.readers.dicom_stack import stack
from medim.data.readers.sights import Found, Instance, Refused, Scanned, Sight
from medim.types import Modality, Volume


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
            if modality in (None, instance.kind):
                instances.append(instance)
                continue
            detail = f"an image of modality {instance.kind}; expected {modality}"
            refused.append(
                Refused(path=instance.path, reason="wrong-modality", detail=detail, identities=instance.identities)
            )
        unique, copies = _without_copies(sorted(instances, key=lambda instance: instance.path))
        found: list[Found] = []
        for group in _groups(unique):
            try:
                found.append(_found(group))
            except ReadError as error:
                detail = f"{error.detail} (series of {len(group)} files)" if len(group) > 1 else error.detail
                identities = frozenset().union(*(instance.identities for instance in group))
                refused.append(Refused(path=group[0].path, reason=error.reason, detail=detail, identities=identities))
        return found, refused + copies

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one file: an X-ray, a slice, or all frames of a multi-frame object."""
        return self.read_files([path])

    def read_files(self, paths: Iterable[Path]) -> Volume:
        """Read the files of one image.

        Raises:
            ReadError: a file is no image, or they are no stack.
        """
        instances = []
        for path in paths:
            sight = read_header(path).at(path)
            if sight.instance is None:
                raise ReadError(sight.refused[0].reason, sight.refused[0].detail)
            instances.append(sight.instance)
        first = instances[0]
        if first.kind == "xray":
            _check_flat(first)
            return flat_volume(frames_of(first.path)[0], first.spacing)
        order, affine = _stack(instances)
        frames = np.concatenate([frames_of(instance.path) for instance in instances])
        return ras_volume(frames[order].transpose(2, 1, 0), LPS_TO_RAS @ affine)

    def read_folder(self, folder: Path) -> Volume:
        """Read the one series that lies in a folder.

        Raises:
            ReadError: none or several images lie there.
        """
        files = sorted(path for path in folder.iterdir() if path.is_file() and self.accepts(path))
        found, refused = self.gather([self.look(path).at(path) for path in files], None)
        if len(found) == 1:
            return self.read_files(found[0].files)
        if found:
            raise ReadError(
                "several-series", f"{len(found)} images in this folder; expected one series. Use medim index"
            )
        if refused:
            raise ReadError(refused[0].reason, refused[0].detail)
        raise ReadError("no-image", "no DICOM file in this folder; expected one series")


def _without_copies(instances: Sequence[Instance]) -> tuple[list[Instance], list[Refused]]:
    """Each object once: a second file of one SOPInstanceUID is refused, as a copy or as a contradiction."""
    seen: dict[str, Instance] = {}
    unique, refused = [], []
    for instance in instances:
        first = seen.setdefault(instance.sop, instance) if instance.sop else instance
        if first is instance:
            unique.append(instance)
            continue
        same = same_pixels(first.path, instance.path)
        detail = "the same SOPInstanceUID and pixels as" if same else "the SOPInstanceUID of, but other pixels than,"
        refused.append(
            Refused(
                path=instance.path,
                reason="duplicate" if same else "conflicting-duplicate",
                detail=f"{detail} a file that comes before it",
                identities=instance.identities,
            )
        )
    return unique, refused


def _groups(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Single-frame MR by series; everything else by file."""
    series: dict[str, list[Instance]] = defaultdict(list)
    for place, instance in enumerate(instances):
        alone = instance.kind == "xray" or instance.count > 1 or not instance.series
        series[f"{place}" if alone else instance.series].append(instance)
    return list(series.values())


def _stack(instances: Sequence[Instance]) -> tuple[list[int], np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """Order of all frames and their LPS affine."""
    if len({(instance.rows, instance.columns) for instance in instances}) > 1:
        raise ReadError("mixed-size", "the slices differ in rows or columns")
    if any(len(instance.frames) != instance.count for instance in instances):
        return stack([])
    return stack([frame for instance in instances for frame in instance.frames])


def _check_flat(instance: Instance) -> None:
    if instance.count > 1:
        raise ReadError("several-volumes", f"{instance.count} frames; expected one X-ray")


def _found(group: Sequence[Instance]) -> Found:
    """One image from its files.

    Raises:
        ReadError: they are no stack.
    """
    first = group[0]
    if first.kind == "xray":
        _check_flat(first)
        shape: tuple[int, ...] = (first.rows, first.columns)
        affine = np.diag([*first.spacing, 1.0, 1.0])
    else:
        order, lps = _stack(group)
        shape, affine = ras_grid((first.columns, first.rows, len(order)), LPS_TO_RAS @ lps)
    return Found(
        files=tuple(instance.path for instance in group),
        shape=shape,
        affine=affine,
        subject=first.subject or first.study or first.series or None,
        aliases=first.aliases,
        session=first.study or None,
        series=first.series or first.sop or None,
        sequence=first.sequence,
        scanner=first.scanner,
        field_strength=first.field_strength,
        names=tuple(name for name in (first.series, first.sop if len(group) == 1 else "") if name),
        identities=frozenset().union(*(instance.identities for instance in group)),
    )
