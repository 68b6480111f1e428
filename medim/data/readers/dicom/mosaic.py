"""Mosaics: the slices of a volume as tiles of one image, with their layout in a private header of the vendor.

Siemens places the tiles of a volume around the position of a mosaic plane, and gives their number and the direction of
the slices in the CSA header, which nibabel parses. United Imaging (UIH) gives the position of each tile. A mosaic
without such a header is rejected: the order and the positions of its slices are unknown.
"""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.frames import ATTRIBUTES, read_plane
from medim.data.readers.dicom.values import DicomHeader
from medim.data.readers.inspection import FramePlane
from medim.types import Array

MOSAIC_TYPES = {"MOSAIC", "VFRAME"}  # values of ImageType: of Siemens, and of UIH
MOSAIC_KEYWORDS = ATTRIBUTES | {
    "ImageType", "Rows", "Columns", "NumberOfFrames", "SpecificCharacterSet", "SiemensCsaCreator",
    "SiemensCsaImageHeader", "UihCreator", "UihSlices", "UihFrames",
}  # fmt: skip
_MAX_TILES = 4096
_MIN_COSINE = 0.999  # between the normal of the tiles and the direction of the slices
_MOSAIC_REMEDY = "Convert it with dcm2niix"


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Layout of a mosaic.

    Attributes:
        planes: plane of each slice, in the order of the tiles, row by row.
        tiles: tiles per row and per column; the last ones may be empty.
    """

    planes: tuple[FramePlane, ...]
    tiles: int

    def split_frame(self, frame: Array) -> Array:
        """Split a (rows, columns) mosaic into (slices, rows, columns)."""
        rows, columns = (length // self.tiles for length in frame.shape)
        tiles = frame.reshape(self.tiles, rows, self.tiles, columns).swapaxes(1, 2)
        return np.ascontiguousarray(tiles.reshape(-1, rows, columns)[: len(self.planes)])


def read_mosaic(header: DicomHeader) -> Mosaic | None:
    """Read the layout of a mosaic; None if the image type is that of another image.

    Raises:
        ReadError: the header has no layout of a known vendor, or an inconsistent one.
    """
    if not MOSAIC_TYPES & {value.upper() for value in header.texts("ImageType")}:
        return None
    if header.integer("NumberOfFrames", 1) > 1:
        raise ReadError("mosaic", f"a mosaic of slices in each of several frames. {_MOSAIC_REMEDY}")
    if header.text("SiemensCsaCreator") == "SIEMENS CSA HEADER" and header.raw.get("SiemensCsaImageHeader"):
        return _read_siemens_mosaic(header)
    if header.text("UihCreator").startswith("Image Private Header") and header.items("UihFrames"):
        return _read_uih_mosaic(header)
    raise ReadError("mosaic", f"a mosaic of slices in one image, without the vendor's header. {_MOSAIC_REMEDY}")


def _read_siemens_mosaic(header: DicomHeader) -> Mosaic:
    count, normal = _read_csa_layout(header.raw["SiemensCsaImageHeader"])
    position, orientation = (header.numbers(name) for name in ("ImagePositionPatient", "ImageOrientationPatient"))
    spacing = header.numbers("PixelSpacing")
    gap = next((v for name in ("SpacingBetweenSlices", "SliceThickness") for v in header.numbers(name)[:1] if v), 0.0)
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2) or not (math.isfinite(gap) and gap > 0):
        raise ReadError("mosaic", f"a mosaic without position, orientation or spacing of its slices. {_MOSAIC_REMEDY}")
    row, column = np.reshape(orientation, (2, 3))
    if not abs(np.cross(row, column) @ normal) > _MIN_COSINE:
        raise ReadError("mosaic", f"a mosaic whose slices are not parallel to its plane. {_MOSAIC_REMEDY}")
    tiles, size = _find_tile_size(header, count)
    # the position is that of the corner of the whole mosaic, as if its centre were the centre of a slice
    n_rows, n_columns = (length * (tiles - 1) / 2 for length in size)
    first = np.array(position) + row * spacing[1] * n_columns + column * spacing[0] * n_rows
    positions = [first + index * gap * normal for index in range(count)]
    raw = dict(header.raw) | _encode_size(size, header.byte_order)
    planes = [
        read_plane([DicomHeader({**raw, "ImagePositionPatient": _encode_position(place)}, header.byte_order)])
        for place in positions
    ]
    return _build_mosaic(planes, tiles)


def _read_csa_layout(content: bytes) -> tuple[int, Array]:
    """Read the number of slices and their (3,) direction from a CSA header.

    Raises:
        ReadError: the header is damaged or lacks them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel warns that its DICOM readers are experimental
            from nibabel.nicom import csareader
        tags: Any = csareader.read(content)["tags"]  # type: ignore[no-untyped-call]
        (count,), normal = tags["NumberOfImagesInMosaic"]["items"], np.array(tags["SliceNormalVector"]["items"], float)
        count = int(count)
    except Exception as error:  # nibabel raises many exception types for damaged headers
        detail = f"a mosaic with an incomplete CSA header ({type(error).__name__}). {_MOSAIC_REMEDY}"
        raise ReadError("mosaic", detail) from error
    if normal.shape != (3,) or not abs(np.linalg.norm(normal) - 1) < 0.01:
        raise ReadError("mosaic", f"a mosaic without the direction of its slices. {_MOSAIC_REMEDY}")
    return count, normal


def _read_uih_mosaic(header: DicomHeader) -> Mosaic:
    items = header.items("UihFrames")
    count = header.integer("UihSlices", len(items))
    if count != len(items):
        raise ReadError("mosaic", f"a mosaic of {count} slices with {len(items)} positions. {_MOSAIC_REMEDY}")
    tiles, size = _find_tile_size(header, count)
    own = {name: value for name, value in header.raw.items() if name != "ImagePositionPatient"}
    shared = DicomHeader(own | _encode_size(size, header.byte_order), header.byte_order)
    return _build_mosaic([read_plane([item, shared]) for item in items], tiles)


def _find_tile_size(header: DicomHeader, count: int) -> tuple[int, tuple[int, int]]:
    """Compute the tiles per row, and the rows and columns of a tile.

    Raises:
        ReadError: the image cannot be divided into that many tiles.
    """
    rows, columns = header.integer("Rows"), header.integer("Columns")
    tiles = math.ceil(math.sqrt(count)) if 1 <= count <= _MAX_TILES else 0
    if not tiles or rows % tiles or columns % tiles:
        raise ReadError("mosaic", f"a mosaic of {rows}x{columns} pixels with {count} slices. {_MOSAIC_REMEDY}")
    return tiles, (rows // tiles, columns // tiles)


def _build_mosaic(planes: list[FramePlane | None], tiles: int) -> Mosaic:
    complete = tuple(plane for plane in planes if plane is not None)
    if len(complete) < len(planes):
        raise ReadError("mosaic", f"a mosaic without position, orientation or spacing of its slices. {_MOSAIC_REMEDY}")
    return Mosaic(complete, tiles)


def _encode_size(size: tuple[int, int], byte_order: str) -> dict[str, bytes]:
    return {name: struct.pack(f"{byte_order}H", length) for name, length in zip(("Rows", "Columns"), size, strict=True)}


def _encode_position(position: Array) -> bytes:
    return "\\".join(f"{value:.10g}" for value in position).encode()
