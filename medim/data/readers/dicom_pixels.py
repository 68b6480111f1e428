"""Decode DICOM pixels to what they mean: real values, bright where the picture is bright."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels.processing import apply_modality_lut

from medim.data.readers.base import ReadError
from medim.data.readers.dicom_header import quiet
from medim.types import Array


def frames_of(path: Path) -> Array:
    """The frames of a file, rescaled, MONOCHROME1 inverted, overlays left out.

    Returns:
        (frames, rows, columns) float32.

    Raises:
        ReadError: the pixels cannot be decoded.
    """
    with quiet():
        dataset = _parse(path)
        stored = _stored(dataset)
        low, high = _range(dataset)
        frames = np.empty(stored.shape, np.float32)
        for place, frame in enumerate(stored):
            try:
                rescaled = _rescale(dataset, place, frame)
                if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
                    ends = _rescale(dataset, place, np.array([low, high], dtype=stored.dtype))
                    rescaled = ends.sum(dtype=np.float64) - rescaled
            except Exception as error:  # a broken lookup table or slope
                raise ReadError("undecodable", f"the rescaling cannot be applied ({type(error).__name__})") from error
            frames[place] = rescaled
    return frames


def same_pixels(one: Path, other: Path) -> bool:
    """Whether two files hold the same picture, whatever their transfer syntax."""
    if filecmp.cmp(one, other, shallow=False):
        return True
    try:
        return bool(np.array_equal(frames_of(one), frames_of(other)))
    except ReadError:
        return False


def _parse(path: Path) -> pydicom.FileDataset:
    try:
        return pydicom.dcmread(path, force=True)
    except Exception as error:  # pydicom raises whatever its parsing met
        raise ReadError("unreadable", f"not a whole DICOM file ({type(error).__name__})") from error


def _stored(dataset: pydicom.FileDataset) -> Array:
    """(frames, rows, columns) stored values, without the overlay bits above the highest one."""
    try:
        if not getattr(dataset.file_meta, "TransferSyntaxUID", None):
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        stored: Array = dataset.pixel_array
        stored = stored.reshape(-1, int(dataset.Rows), int(dataset.Columns))
    except Exception as error:  # a decoder's own exceptions, of which there are many
        raise ReadError("undecodable", f"the pixels cannot be decoded ({type(error).__name__})") from error
    spare = stored.dtype.itemsize * 8 - int(dataset.get("BitsStored") or stored.dtype.itemsize * 8)
    if stored.dtype.kind in "ui" and spare > 0 and int(dataset.get("HighBit") or 0) + 1 == int(dataset.BitsStored):
        stored = np.right_shift(np.left_shift(stored, spare), spare)  # keeps the sign where there is one
    return stored


def _range(dataset: pydicom.FileDataset) -> tuple[int, int]:
    """Lowest and highest value that can be stored."""
    bits = int(dataset.get("BitsStored") or 16)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dataset.get("PixelRepresentation") else (0, (1 << bits) - 1)


def _rescale(dataset: pydicom.FileDataset, place: int, stored: Array) -> Array:
    """Stored values as real ones: the frame's own slope and intercept, the file's, or its modality lookup table."""
    holder: Any = dataset
    for group in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        items = dataset.get(group) or []
        item = items[place if group.startswith("Per") and place < len(items) else 0] if items else None
        if item is not None and item.get("PixelValueTransformationSequence"):
            holder = item.PixelValueTransformationSequence[0]
    return np.asarray(apply_modality_lut(stored, holder), dtype=np.float64)
