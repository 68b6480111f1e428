"""What a reader sees in a file without keeping its voxels, and without anybody's name.

Identities become pseudonyms and tokens while the header is read (`medim.privacy`), so that a sight may be handed
from process to process and remembered on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import PlainSerializer, PlainValidator

from medim.types import Array, Modality

_T = TypeVar("_T")
Affine = Annotated[
    Array, PlainValidator(lambda rows: np.array(rows, np.float64)), PlainSerializer(lambda array: array.tolist())
]


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """An image that a reader found.

    Attributes:
        files: every file it is made of; the first one stands for it.
        item: its place in a file of many images ("train/12").
        shape: spatial shape as read, (D, H, W) in RAS+ order or (H, W).
        affine: (4, 4), of that grid.
        subject: pseudonym of whom it is of, as the file says; None where the file does not say.
        aliases: pseudonyms of other names that a table may call the subject by.
        session: pseudonym of the visit.
        series: pseudonym of the DICOM series.
        names: pseudonyms of names a table may call the image by (its UIDs).
        highest: highest value of a mask.
        quality: stable codes of what is odd about it and accepted; see `docs/reference/rejections.md`.
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
    highest: int = 0
    quality: tuple[str, ...] = ()
    identities: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class RejectedFile:
    """A file, or a series by its first file, that is no image, and why."""

    path: Path = Path()
    reason: str
    detail: str
    identities: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class FramePlane:
    """The plane of one DICOM frame in the patient (LPS, mm).

    Attributes:
        position: (3,) centre of the first pixel.
        orientation: (6,) direction along a row, then down a column.
        spacing: between rows, between columns.
        size: rows, columns.
        thickness: distance to the next slice as the header states it.
        keys: what it says of `dicom_frames.KEYS`.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    size: tuple[int, int]
    thickness: float
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        """Hold what the frames of a series share once."""
        for name in ("orientation", "spacing", "size", "keys"):
            object.__setattr__(self, name, _intern_value(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesInfo:
    """What the DICOM files of a series say alike: whose they are, and what they were made by.

    Attributes:
        series: pseudonym of the SeriesInstanceUID; of the study in the same way.
        size: rows, columns.
        spacing: of an X-ray, between rows and between columns, in mm.
        quality: codes of what is odd and accepted.
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
    quality: tuple[str, ...] = ()
    identities: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """One DICOM file that holds an image, or a part of one.

    Attributes:
        sop: pseudonym of its SOPInstanceUID.
        count: frames in the file.
        own: tokens of identity attributes that no other file has.
    """

    path: Path = Path()
    sop: str
    count: int
    frames: tuple[FramePlane, ...]
    origin: SeriesInfo
    own: tuple[int, ...]

    def __post_init__(self) -> None:
        """Hold what the files of a series share once."""
        object.__setattr__(self, "origin", _intern_value(self.origin))

    @property
    def identities(self) -> frozenset[int]:
        """Tokens of all identity attributes."""
        return self.origin.identities | frozenset(self.own)


@lru_cache(maxsize=4096)
def _intern_value(value: _T) -> _T:
    """The same object for equal values."""
    return value


@dataclass(frozen=True, slots=True)
class FileInspection:
    """What one look at a file showed: images, what of it is none, or a part of a DICOM image."""

    found: tuple[ImageInfo, ...] = ()
    refused: tuple[RejectedFile, ...] = ()
    instance: DicomFile | None = None

    def with_path(self, path: Path) -> FileInspection:
        """The same, of the file at a path."""
        return FileInspection(
            found=tuple(replace(image, files=(path,)) for image in self.found),
            refused=tuple(replace(rejected_file, path=path) for rejected_file in self.refused),
            instance=replace(self.instance, path=path) if self.instance else None,
        )


CollectionResult = tuple[list[ImageInfo], list[RejectedFile]]
