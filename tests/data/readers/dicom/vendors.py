"""DICOM series as vendors write them, with invented content: mosaics, functional groups, orders, tilts and gaps."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items

from tests.data.synthetic import AXIAL, dataset, enhanced, noise, save

OBLIQUE = (0.991332, 0.114987, -0.063548, -0.118794, 0.991118, -0.059771)
ORIGIN = (-40.5, -30.25, 12.75)
SCANNER = {"FrameOfReferenceUID": "1.2.3", "SeriesNumber": 3, "StudyDate": "20200101", "StudyTime": "120000"}


def find_places(count: int, gap: float, orientation: Sequence[float] = AXIAL) -> list[list[float]]:
    """Positions of slices along the normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [[float(f"{v:.8f}") for v in np.array(ORIGIN) + gap * k * normal] for k in range(count)]


def smooth(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Whole numbers from 1 to 1000."""
    return noise(*shape, seed=seed).astype(np.uint16) + 1


def make_csa_header(tags: dict[str, tuple[str, list[str]]]) -> bytes:
    """A CSA header of version 2: VR and values of each tag."""
    out = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, (vr, values) in tags.items():
        out += struct.pack("<64si4s3i", name.encode(), len(values), vr.encode(), 0, len(values), 77)
        for value in values:
            content = value.encode() + b"\0"
            out += struct.pack("<4i", *[len(content), len(content), 77, len(content)])
            out += content + bytes(-len(content) % 4)
    return out


def tile(slices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Arrange slices (n, rows, columns) as a mosaic, row by row."""
    count, rows, columns = slices.shape
    tiles = int(np.ceil(np.sqrt(count)))
    whole = np.zeros((tiles * tiles, rows, columns), slices.dtype)
    whole[:count] = slices
    return whole.reshape(tiles, tiles, rows, columns).swapaxes(1, 2).reshape(tiles * rows, tiles * columns)


def make_siemens_mosaic(
    slices: np.ndarray[Any, Any], gap: float, orientation: Sequence[float] = OBLIQUE, *, sign: int = 1, **tags: Any
) -> FileDataset:
    """A mosaic of Siemens; `sign` is that of the slices along the normal of the rows and columns."""
    row, column = np.reshape(orientation, (2, 3))
    normal = sign * np.cross(row, column)
    tiles = int(np.ceil(np.sqrt(len(slices))))
    shift = (tiles - 1) / 2 * (column * slices.shape[1] * 2.0 + row * slices.shape[2] * 1.5)
    made = dataset(
        tile(slices),
        **{
            "Manufacturer": "SIEMENS",
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"],
            "ImageOrientationPatient": list(orientation),
            "ImagePositionPatient": [float(f"{v:.8f}") for v in np.array(ORIGIN) - shift],
            "PixelSpacing": [2.0, 1.5],
            "SliceThickness": gap - 0.5,
            "SpacingBetweenSlices": gap,
            "InstanceNumber": 1,
            **SCANNER,
            **tags,
        },
    )
    block = made.private_block(0x29, "SIEMENS CSA HEADER", create=True)
    csa = make_csa_header(
        {
            "NumberOfImagesInMosaic": ("US", [str(len(slices))]),
            "SliceNormalVector": ("FD", [f"{v:.8f}" for v in normal]),
        }
    )
    block.add_new(0x10, "OB", csa)
    return made


def make_uih_mosaic(slices: np.ndarray[Any, Any], gap: float, orientation: Sequence[float] = AXIAL) -> FileDataset:
    """A grid of United Imaging: the geometry of each tile in a private sequence."""
    made = dataset(
        tile(slices),
        Manufacturer="UIH",
        ImageType=["ORIGINAL", "PRIMARY", "NONE", "NONE", "VFRAME"],
        ImageOrientationPatient=None,
        ImagePositionPatient=None,
        PixelSpacing=[2.0, 1.5],
        SliceThickness=gap,
        InstanceNumber=1,
        **SCANNER,
    )
    block = made.private_block(0x65, "Image Private Header", create=True)
    block.add_new(0x50, "DS", str(len(slices)))
    items = []
    for place in find_places(len(slices), gap, orientation):
        item = Dataset()
        item.ImagePositionPatient, item.ImageOrientationPatient = place, list(orientation)
        items.append(item)
    block.add_new(0x51, "SQ", Items(items))
    return made


def make_enhanced(volumes: int, count: int, gap: float, *, per_frame: bool) -> FileDataset:
    """An enhanced object of several volumes, slice by slice; spacing and orientation shared or frame by frame."""
    places = find_places(count, gap)
    frames = smooth(volumes * count, 10, 12)
    made = enhanced(frames, [places[k // volumes] for k in range(volumes * count)], Manufacturer="Philips", **SCANNER)
    shared = made.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence[0].SliceThickness = gap
    shared.PixelMeasuresSequence[0].SpacingBetweenSlices = gap
    for k, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        del group.PixelValueTransformationSequence
        content = Dataset()
        content.TemporalPositionIndex, content.InStackPositionNumber = k % volumes + 1, k // volumes + 1
        content.StackID, content.DimensionIndexValues = "1", [k // volumes + 1, k % volumes + 1]
        group.FrameContentSequence = [content]
        if per_frame:
            group.PixelMeasuresSequence = shared.PixelMeasuresSequence
            group.PlaneOrientationSequence = shared.PlaneOrientationSequence
    if per_frame:
        del shared.PixelMeasuresSequence
        del shared.PlaneOrientationSequence
    made.DimensionIndexSequence = [Dataset(), Dataset()]
    for item, pointer in zip(made.DimensionIndexSequence, (0x00209057, 0x00209128), strict=True):
        item.DimensionIndexPointer, item.FunctionalGroupPointer = pointer, 0x00209111
    return made


def write_slices(
    folder: Path,
    places: Sequence[Sequence[float]],
    *,
    volumes: int = 1,
    gap: float = 3.0,
    order: Sequence[int] | None = None,
    **tags: Any,
) -> None:
    """A series of one file a slice, numbered volume by volume; `order` is that of the slices in each volume."""
    order = list(range(len(places))) if order is None else list(order)
    for volume in range(volumes):
        for number, k in enumerate(order):
            own = {
                "ImagePositionPatient": list(places[k]),
                "InstanceNumber": volume * len(order) + number + 1,
                "PixelSpacing": [2.0, 1.5],
                "SliceThickness": gap,
                "SpacingBetweenSlices": gap,
                "AcquisitionNumber": 1,
                "Manufacturer": "GE MEDICAL SYSTEMS",
                **SCANNER,
                **tags,
            }
            made = dataset(smooth(10, 12, seed=100 * volume + k), **own)
            save(made, folder / f"{volume * len(order) + number:03d}.dcm")
