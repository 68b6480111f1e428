"""Supported image formats, and `read_volume` for all of them.

To add a format, write a module here with a class that implements `base.Reader`, and add it to `READERS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medim.data.readers.base import DECODER, MaskReader, Reader, ReadError, as_class_numbers, check_voxels
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
READERS: list[Reader] = [  # the first reader that accepts a file reads it
    NiftiReader(),
    PictureReader(),
    NumpyReader(),
    ItkReader(),
    DICOM,  # last: it also opens files without a telling suffix
]
# Readers that the decoding process has. Readers that a script inserts run in its own process, and so does the DICOM
# reader: it parses headers within limits, and has the pixels decoded in the process itself.
SANDBOXED_READERS = tuple(reader for reader in READERS if reader is not DICOM)


def find_reader(path: Path) -> Reader | None:
    """Find the reader of a file; None if no reader accepts it."""
    return next((reader for reader in READERS if reader.accepts(path)), None)


def collect_images(
    reader: Reader, inspections: Sequence[FileInspection], modality: Modality | None
) -> CollectionResult:
    """Assemble images from the inspections of files that belong to one reader.

    Args:
        reader: reader that made the inspections.
        inspections: one per file.
        modality: DICOM images of another modality are rejected; None accepts all.

    Returns:
        The images and the rejected files; each file is in exactly one of the two.
    """
    if reader is DICOM:
        return DICOM.collect_images(inspections, modality)
    images = [image for inspection in inspections for image in inspection.images]
    return images, [file for inspection in inspections for file in inspection.rejected]


def read_volume(path: str | Path) -> Volume:
    """Read one image of any format in `READERS`.

    Args:
        path: a file; a folder with one DICOM series; or `archive.npz#train/12`, `scan.nii.gz#3` for one image of a
            file with several. A DICOM file is read alone: one slice, or all frames of a multi-frame object.

    Returns:
        In 3D float32 (C, D, H, W), with RAS+ axes and an affine in mm; in 2D (C, H, W), rows by columns.

    Raises:
        ReadError: the file is missing, damaged, of unknown format, or not an image; the message contains the path and
            the reason.

    Examples:
        >>> import nibabel
        >>> import numpy as np
        >>> voxels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        >>> nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])), "scan.nii.gz")
        >>> volume = read_volume("scan.nii.gz")
        >>> volume.array.shape, volume.spacing
        ((1, 2, 3, 4), (1.0, 1.0, 2.0))
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
                raise ReadError("not-an-image", f"no reader accepts this file. Formats: {formats}")
            volume = read_image(reader, file, item)
        check_voxels(volume.array)
    except ReadError as error:
        raise error.with_path(path) from error
    return volume


def read_image(reader: Reader, file: Path, item: str | None) -> Volume:
    """Read one image, in the decoding process if there is one."""
    decoder = DECODER.get()
    if decoder is None or reader not in SANDBOXED_READERS:
        return reader.read(file, item)
    return decoder.read(file, item)


def read_mask(path: str | Path) -> Volume:
    """Read a segmentation mask. Like `read_volume`, but a palette image gives the palette indices as class numbers.

    Returns:
        Values as in the file, (1, D, H, W) or (1, H, W): uint8, or uint16 if one is above 255. An empty mask is valid.

    Raises:
        ReadError: as `read_volume`, or a voxel is not an integer from 0 to 65535.
    """
    file, item = split_item(path)
    reader = find_reader(file) if file.is_file() else None
    try:
        if reader is None:
            raise ReadError(
                "missing" if not file.exists() else "not-an-image", "expected a mask in a supported format here"
            )
        decoder = DECODER.get()
        if decoder is not None and reader in SANDBOXED_READERS:
            return decoder.read_mask(file, item)
        return read_class_numbers(reader, file, item)
    except ReadError as error:
        raise error.with_path(path) from error


def read_class_numbers(reader: Reader, file: Path, item: str | None) -> Volume:
    """Read a mask in this process, see `read_mask`."""
    if isinstance(reader, MaskReader):
        return reader.read_mask(file, item)
    volume = reader.read(file, item)
    return volume.with_array(as_class_numbers(volume.array[0])[None])


def split_item(path: str | Path) -> tuple[Path, str | None]:
    """Split `archive.npz#train/12`, `scan.nii.gz#3` or `IM0001#0` into file and item; other `#` belong to the name."""
    text = str(path)
    match = _ITEM_PATTERN.fullmatch(text)
    if match is None or Path(text).exists():
        return Path(text), None
    name, item = match.group(1, 2) if match[1] else match.group(3, 4)
    return Path(name), item
