"""Results of inspecting image files: metadata without voxels and without identities.

Identities become pseudonyms and tokens while the header is read (`medim.privacy`), so that an inspection may be passed
to other processes and cached on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from medim.types import Array, Modality

_T = TypeVar("_T")
Affine = Annotated[
    Array, PlainValidator(lambda rows: np.array(rows, np.float64)), PlainSerializer(lambda array: array.tolist())
]


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """Metadata of one image.

    Attributes:
        files: all files of the image; the first one represents it.
        item: position in a file with several images ("train/12").
        shape: spatial shape as read, (D, H, W) in RAS+ order or (H, W).
        affine: (4, 4), affine of that grid.
        subject: pseudonym of the subject in the file's metadata, or None.
        aliases: pseudonyms of other names that a table may use for the subject.
        session: pseudonym of the visit.
        series: pseudonym of the DICOM series.
        names: pseudonyms of names that a table may use for the image (its UIDs).
        values: distinct values of a mask, ascending.
        levels: number of distinct values, if they are whole numbers of few levels or in flat areas as in label maps; 0
            for other images, and if unknown.
        flatness: fraction of neighbouring voxels with equal values, if there are `levels`.
        quality: stable codes of accepted irregularities; see `docs/reference/rejections.md`.
        identities: tokens of identity attributes, to be kept out of every output.
    """

    files: tuple[Path, ...] = ()
    shape: tuple[int, ...]
    affine: Affine
    item: str | None = None
    subject: str | None = None
    aliases: tuple[str, ...] = ()
    session: str | None = None
    series: str | None = None
    sequence: str | None = None
    scanner: str | None = None
    field_strength: float | None = None
    label: str | None = None
    split: str | None = None
    names: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    levels: int = 0
    flatness: float = 0.0
    quality: tuple[str, ...] = ()
    identities: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class RejectedFile:
    """A rejected file, or a rejected series by its first file, with the reason.

    Attributes:
        series: pseudonym of the SeriesInstanceUID of a DICOM file that was rejected by its header; empty if unknown.
        n_files: number of files that the rejection stands for.
    """

    path: Path = Path()
    reason: str
    detail: str
    identities: frozenset[int] = frozenset()
    series: str = ""
    n_files: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlane:
    """Plane of one DICOM frame in patient coordinates (LPS, mm).

    Attributes:
        position: (3,) centre of the first pixel.
        orientation: (6,) direction along a row, then down a column.
        spacing: distance between rows, distance between columns.
        size: rows, columns.
        thickness: distance to the next slice according to the header.
        keys: values of the attributes in `frames.FRAME_KEYS`.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    size: tuple[int, int]
    thickness: float
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        """Share the values that are equal in all files of a series, to save memory."""
        for name in ("orientation", "spacing", "size", "keys"):
            object.__setattr__(self, name, _intern_value(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesInfo:
    """Metadata that all DICOM files of a series share: subject, geometry and scanner.

    Attributes:
        series: pseudonym of the SeriesInstanceUID.
        study: pseudonym of the StudyInstanceUID.
        size: rows, columns.
        spacing: of an X-ray, distance between rows and between columns, in mm.
        n_declared: ImagesInAcquisition, the number of slices according to the scanner; 0 if unknown.
        reference: pseudonym of the FrameOfReferenceUID of an MRI; empty if unknown.
        quality: codes of accepted irregularities.
        identities: tokens of the identity attributes that the files share.
    """

    kind: Modality
    series: str
    study: str
    subject: str | None
    aliases: tuple[str, ...] = ()
    size: tuple[int, int]
    spacing: tuple[float, float]
    sequence: str | None
    scanner: str | None
    field_strength: float | None
    n_declared: int = 0
    reference: str = ""
    quality: tuple[str, ...] = ()
    identities: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """One DICOM file with an image or a part of one.

    Attributes:
        sop: pseudonym of its SOPInstanceUID.
        number: InstanceNumber; 0 if unknown.
        count: frames in the file.
        damaged: whether the pixels are missing or incomplete; the inspection then has a rejection, too.
        own: tokens of the identity attributes that differ from file to file.
    """

    path: Path = Path()
    sop: str
    number: int = 0
    count: int
    damaged: bool = False
    frames: tuple[FramePlane, ...]
    origin: SeriesInfo
    own: tuple[int, ...]

    def __post_init__(self) -> None:
        """Share the metadata between the files of a series, to save memory."""
        object.__setattr__(self, "origin", _intern_value(self.origin))

    @property
    def identities(self) -> frozenset[int]:
        """Tokens of all identity attributes."""
        return self.origin.identities | frozenset(self.own)


@lru_cache(maxsize=4096)
def _intern_value(value: _T) -> _T:
    """Return one shared object for equal values."""
    return value


@dataclass(frozen=True, slots=True)
class FileInspection:
    """Result of inspecting one file: its images, its rejected parts, or its part of a DICOM image.

    A DICOM file with a readable header and damaged pixels has a rejection and a part of an image, so that its series
    can be recognised as incomplete.

    Examples:
        >>> inspection = FileInspection(images=(ImageInfo(shape=(64, 64), affine=np.eye(4)),))
        >>> inspection.with_path(Path("scan.png")).images[0].files[0].name
        'scan.png'
    """

    images: tuple[ImageInfo, ...] = ()
    rejected: tuple[RejectedFile, ...] = ()
    instance: DicomFile | None = None

    def with_path(self, path: Path) -> FileInspection:
        """Return a copy with the path of the file."""
        return FileInspection(
            images=tuple(replace(image, files=(path,)) for image in self.images),
            rejected=tuple(replace(rejected_file, path=path) for rejected_file in self.rejected),
            instance=replace(self.instance, path=path) if self.instance else None,
        )


INSPECTION_ADAPTER = TypeAdapter(FileInspection)
CollectionResult = tuple[list[ImageInfo], list[RejectedFile]]
