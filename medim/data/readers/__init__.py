"""The image formats medim reads, and `read_volume` over all of them.

To add a format: a module here with a class that keeps to `base.Reader`, and one line in `READERS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medim.data.readers.base import Reader, ReadError, check_voxels
from medim.data.readers.dicom.reader import DicomReader
from medim.data.readers.inspection import Found, Refused, Scanned, Sight
from medim.data.readers.itk import ItkReader
from medim.data.readers.nifti import NiftiReader
from medim.data.readers.raster import NumpyReader, PictureReader
from medim.types import Modality, Volume

__all__ = [
    "READERS",
    "Found",
    "ReadError",
    "Reader",
    "Refused",
    "Sight",
    "gather",
    "read_mask",
    "read_volume",
    "reader_of",
    "split_item",
]

DICOM = DicomReader()
_ITEM = re.compile(r"(.+\.(?:npz|nii|nii\.gz))#((?:(?:train|val|test)/)?[^#/]*)|(.+)#(\d+)", re.DOTALL | re.IGNORECASE)
READERS: tuple[Reader, ...] = (  # the first that accepts a file reads it
    NiftiReader(),
    PictureReader(),
    NumpyReader(),
    ItkReader(),
    DICOM,  # last: it opens files whose names say nothing
)


def reader_of(path: Path) -> Reader | None:
    """The reader of a file, or None where no reader knows it."""
    return next((reader for reader in READERS if reader.accepts(path)), None)


def gather(reader: Reader, sights: Sequence[Sight], modality: Modality | None) -> Scanned:
    """Make images of files of one reader that were looked at.

    Args:
        reader: whose `look` they are from.
        sights: one a file.
        modality: DICOM images of another one are refused; None takes all.

    Returns:
        the images, and what is none: each file ends in one of the two.
    """
    if reader is DICOM:
        return DICOM.gather(sights, modality)
    return [f for sight in sights for f in sight.found], [r for sight in sights for r in sight.refused]


def read_volume(path: str | Path) -> Volume:
    """Read one image of any format in `READERS`.

    Args:
        path: a file; a folder that holds one DICOM series; or `archive.npz#train/12`, `scan.nii.gz#3`, an image of a
            file of many. A DICOM file stands for itself alone: one slice, or all frames of a multi-frame object.

    Returns:
        float32 (C, D, H, W) with axes to Right, Anterior, Superior and mm, or (C, H, W) rows by columns.

    Raises:
        ReadError: the file is missing, damaged, of no known format, or no image; it says which and why.
    """
    place, item = split_item(path)
    try:
        if place.is_dir():
            volume = DICOM.read_folder(place)
        else:
            if not place.is_file():
                raise ReadError("missing", "expected an image here, found no file or folder")
            reader = reader_of(place)
            if reader is None:
                known = "; ".join(reader.name for reader in READERS)
                raise ReadError("not-an-image", f"no reader knows this file. Formats: {known}")
            volume = reader.read(place, item)
        check_voxels(volume.array)
    except ReadError as error:
        raise error.at(path) from error
    return volume


def read_mask(path: str | Path) -> Volume:
    """Read a segmentation: `read_volume` for class numbers, which in a picture with a palette are its places.

    Returns:
        uint8 (1, D, H, W) or (1, H, W). An empty mask is a mask.

    Raises:
        ReadError: as `read_volume`, or a voxel is no whole number from 0 to 255.
    """
    place, item = split_item(path)
    reader = reader_of(place) if place.is_file() else None
    try:
        if reader is None:
            raise ReadError(
                "missing" if not place.exists() else "not-an-image", "expected a mask in a known format here"
            )
        volume = reader.read_classes(place) if isinstance(reader, PictureReader) else reader.read(place, item)
        labels = volume.array.astype(np.uint8) if np.isfinite(volume.array).all() else None
        if labels is None or not np.array_equal(labels, volume.array):
            raise ReadError("not-a-mask", "expected whole numbers from 0 to 255, one class each")
    except ReadError as error:
        raise error.at(path) from error
    return volume.with_array(labels)


def split_item(path: str | Path) -> tuple[Path, str | None]:
    """`archive.npz#train/12`, `scan.nii.gz#3` or `IM0001#0` as file and item; other `#` belong to the name."""
    text = str(path)
    found = _ITEM.fullmatch(text)
    if found is None or Path(text).exists():
        return Path(text), None
    name, item = found.group(1, 2) if found[1] else found.group(3, 4)
    return Path(name), item
