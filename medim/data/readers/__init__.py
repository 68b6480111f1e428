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
from medim.data.readers.inspection import CollectionResult, FileInspection, ImageInfo, RejectedFile
from medim.data.readers.itk import ItkReader
from medim.data.readers.nifti import NiftiReader
from medim.data.readers.raster import NumpyReader, PictureReader
from medim.types import Modality, Volume

__all__ = [
    "READERS",
    "FileInspection",
    "ImageInfo",
    "ReadError",
    "Reader",
    "RejectedFile",
    "collect_images",
    "find_reader",
    "read_mask",
    "read_volume",
    "split_item",
]

DICOM = DicomReader()
_ITEM_PATTERN = re.compile(
    r"(.+\.(?:npz|nii|nii\.gz))#((?:(?:train|val|test)/)?[^#/]*)|(.+)#(\d+)", re.DOTALL | re.IGNORECASE
)
READERS: tuple[Reader, ...] = (  # the first that accepts a file reads it
    NiftiReader(),
    PictureReader(),
    NumpyReader(),
    ItkReader(),
    DICOM,  # last: it opens files whose names say nothing
)


def find_reader(path: Path) -> Reader | None:
    """The reader of a file, or None where no reader knows it."""
    return next((reader for reader in READERS if reader.accepts(path)), None)


def collect_images(
    reader: Reader, inspections: Sequence[FileInspection], modality: Modality | None
) -> CollectionResult:
    """Make images of files of one reader that were looked at.

    Args:
        reader: whose `look` they are from.
        inspections: one a file.
        modality: DICOM images of another one are refused; None takes all.

    Returns:
        the images, and what is none: each file ends in one of the two.
    """
    if reader is DICOM:
        return DICOM.collect_images(inspections, modality)
    return [f for inspection in inspections for f in inspection.found], [
        r for inspection in inspections for r in inspection.refused
    ]


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
    file, item = split_item(path)
    try:
        if file.is_dir():
            volume = DICOM.read_folder(file)
        else:
            if not file.is_file():
                raise ReadError("missing", "expected an image here, found no file or folder")
            reader = find_reader(file)
            if reader is None:
                formats = "; ".join(reader.name for reader in READERS)
                raise ReadError("not-an-image", f"no reader knows this file. Formats: {formats}")
            volume = reader.read(file, item)
        check_voxels(volume.array)
    except ReadError as error:
        raise error.with_path(path) from error
    return volume


def read_mask(path: str | Path) -> Volume:
    """Read a segmentation: `read_volume` for class numbers, which in a picture with a palette are its places.

    Returns:
        uint8 (1, D, H, W) or (1, H, W). An empty mask is a mask.

    Raises:
        ReadError: as `read_volume`, or a voxel is no whole number from 0 to 255.
    """
    file, item = split_item(path)
    reader = find_reader(file) if file.is_file() else None
    try:
        if reader is None:
            raise ReadError(
                "missing" if not file.exists() else "not-an-image", "expected a mask in a known format here"
            )
        volume = reader.read_classes(file) if isinstance(reader, PictureReader) else reader.read(file, item)
        labels = volume.array.astype(np.uint8) if np.isfinite(volume.array).all() else None
        if labels is None or not np.array_equal(labels, volume.array):
            raise ReadError("not-a-mask", "expected whole numbers from 0 to 255, one class each")
    except ReadError as error:
        raise error.with_path(path) from error
    return volume.with_array(labels)


def split_item(path: str | Path) -> tuple[Path, str | None]:
    """`archive.npz#train/12`, `scan.nii.gz#3` or `IM0001#0` as file and item; other `#` belong to the name."""
    text = str(path)
    match = _ITEM_PATTERN.fullmatch(text)
    if match is None or Path(text).exists():
        return Path(text), None
    name, item = match.group(1, 2) if match[1] else match.group(3, 4)
    return Path(name), item
