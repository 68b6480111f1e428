"""MetaImage (`.mha`, `.mhd`) and NRRD (`.nrrd`, `.nhdr`), read with SimpleITK (in the train extra).

The text header is parsed here before ITK opens the file, for two reasons: the header may refer to another file, and
ITK does not report the defaults that it uses for missing fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medim.data.readers.base import (
    CHUNK_BYTES,
    LPS_TO_RAS,
    LevelCounter,
    ReadError,
    VoxelRange,
    as_class_numbers,
    as_float,
    check_compression,
    check_length,
    check_memory,
    check_not_empty,
    check_size,
    fill_padding,
    ras_grid,
    ras_volume,
)
from medim.data.readers.compressed import CODECS, check_compressed_voxels
from medim.data.readers.inspection import FileInspection, ImageInfo
from medim.types import Array, Volume
from medim.version import install_command

_MAX_TEXT_BYTES = 1 << 16  # longest header in bytes
_HEADER_SUFFIXES = {".mha", ".mhd", ".nrrd", ".nhdr"}
_DATA_FILE_FIELDS = ("elementdatafile", "datafile")
_NRRD_SPACES = {  # NRRD spaces that ITK converts to patient coordinates
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip


class ItkReader:
    """Reader of files with one scalar volume. NaN is padding, as in NIfTI."""

    name = "MetaImage, NRRD"
    class_folders = False

    def accepts(self, path: Path) -> bool:
        """Whether the file name has a MetaImage or NRRD suffix."""
        return path.suffix.lower() in _HEADER_SUFFIXES

    def inspect(self, path: Path) -> FileInspection:
        """Read the whole file once, with the voxels as stored."""
        image = _read_stored_image(path)
        shape, affine = ras_grid(image.array.shape, image.affine)
        voxel_range, counter = VoxelRange(nan_is_padding=True), LevelCounter()
        layers = image.array.transpose()
        step = max(1, CHUNK_BYTES * len(layers) // max(layers.nbytes, 1))
        for start in range(0, len(layers), step):
            values = as_float(layers[start : start + step])
            voxel_range.update(values)
            counter.update(np.where(np.isnan(values), 0, values) if voxel_range.has_padding else values)
        voxel_range.check()
        quality = (*image.quality, *(("padded",) if voxel_range.has_padding else ()))
        info = ImageInfo(shape=shape, affine=affine, quality=quality, levels=counter.levels, flatness=counter.flatness)
        return FileInspection(images=(info,))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume, converted from LPS to RAS+.

        Raises:
            ReadError: SimpleITK is missing; or the file is damaged, in colour or not 3D, or its voxels are in another
                folder.
        """
        image = _read_stored_image(path, copy_bytes=4)
        volume = ras_volume(image.array, image.affine)
        if image.array.dtype.kind == "f":
            fill_padding(volume.array[0])
        return volume

    def read_mask(self, path: Path, item: str | None = None) -> Volume:
        """Read the values of a mask as uint8 or uint16. Masks may be compressed more than images.

        Raises:
            ReadError: as `read`, or a voxel is not an integer from 0 to 65535.
        """
        image = _read_stored_image(path, copy_bytes=2, is_mask=True)
        labels = as_class_numbers(image.array.transpose()).transpose()
        return ras_volume(labels, image.affine, labels.dtype)


@dataclass(frozen=True)
class _StoredImage:
    """Image as stored in a file.

    Attributes:
        array: (i, j, k), on the grid of the file; a view of the memory of `owner`.
        affine: (4, 4), voxel index to RAS+ mm.
        quality: codes of missing geometry.
        owner: image of SimpleITK.
    """

    array: Array
    affine: Array
    quality: tuple[str, ...]
    owner: Any


def _read_stored_image(path: Path, *, copy_bytes: int = 0, is_mask: bool = False) -> _StoredImage:
    """Read a file with SimpleITK.

    Args:
        path: file with the header.
        copy_bytes: bytes per voxel of the copies that the caller makes.
        is_mask: whether the file may be compressed more than images.

    Raises:
        ReadError: SimpleITK is missing; or the file is damaged, in colour or not 3D, does not fit into memory, or its
            voxels are in another folder.
    """
    header = _read_text_header(path)
    voxel_file = _find_voxel_file(path, header)
    sitk = _import_simple_itk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        item_bytes = sitk.Image([1] * len(size), reader.GetPixelID(), components).GetSizeOfPixelComponent()
        expected_bytes = check_size((*size, components), item_bytes)
        if header.encoding in CODECS and not is_mask:
            check_compression(expected_bytes // item_bytes, expected_bytes, voxel_file.stat().st_size)
        check_memory(expected_bytes + expected_bytes // item_bytes * copy_bytes)
        _check_stored_voxels(voxel_file, header, expected_bytes)
        image = reader.Execute()
    except RuntimeError as error:
        raise ReadError(
            "unreadable", "SimpleITK cannot read the file: damaged, truncated or of another format"
        ) from error
    if components != 1:
        raise ReadError("not-scalar", f"{components} values per voxel; expected one")
    if len(size) != 3:
        raise ReadError("wrong-dimensions", f"{len(size)} axes; expected 3")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return _StoredImage(
        array=sitk.GetArrayViewFromImage(image).transpose(2, 1, 0),  # (k, j, i) to (i, j, k)
        affine=LPS_TO_RAS @ affine,
        quality=_find_missing_geometry(header),
        owner=image,
    )


@dataclass(frozen=True)
class _TextHeader:
    """Text header of a file.

    Attributes:
        fields: values by name; the names are in lower case and contain no blanks.
        start: offset of the first byte after the header.
        is_metaimage: whether the file is a MetaImage; otherwise it is NRRD.
    """

    fields: dict[str, str]
    start: int
    is_metaimage: bool

    @property
    def encoding(self) -> str:
        """Encoding of the voxels: `raw`, `zlib`, `gzip`, `bzip2`, `text` or `hex`; other values as in the header."""
        if not self.is_metaimage:
            name = self.fields.get("encoding", "raw").lower()
            return {"gz": "gzip", "bz2": "bzip2", "txt": "text", "ascii": "text"}.get(name, name)
        if self.fields.get("compresseddata", "false").lower() == "true":
            return "zlib"
        return "raw" if self.fields.get("binarydata", "true").lower() == "true" else "text"

    def skip(self, name: str) -> int:
        """Return the number of bytes or lines to skip before the voxels; -1 counts from the end of the file.

        Raises:
            ReadError: the value is not an integer of at least -1.
        """
        text = self.fields.get(name, "0")
        if not re.fullmatch(r"-1|\d+", text):
            raise ReadError("unreadable", f"the header field '{name}' is '{text[:20]}'; expected an integer")
        return int(text)


def _read_text_header(path: Path) -> _TextHeader:
    """Read the header fields up to the voxels.

    Raises:
        ReadError: the file is empty or missing.
    """
    check_not_empty(path)
    is_metaimage = path.suffix.lower() in {".mha", ".mhd"}
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while file.tell() < _MAX_TEXT_BYTES and (line := file.readline(_MAX_TEXT_BYTES)):
            name, _, value = line.decode("latin-1").strip().partition("=" if is_metaimage else ":")
            if not is_metaimage and not name:
                break
            name = re.sub(r"\s", "", name.lower())
            fields.setdefault(name, value.strip())
            if is_metaimage and name == "elementdatafile":
                break
        return _TextHeader(fields, file.tell(), is_metaimage)


def _find_voxel_file(path: Path, header: _TextHeader) -> Path:
    """Find the file with the voxels: the header's own file, or one in the same folder.

    Raises:
        ReadError: the voxel file is missing or in another folder, or there are several.
    """
    name = next((header.fields[field] for field in _DATA_FILE_FIELDS if field in header.fields), "LOCAL")
    if name.upper() == "LOCAL":
        return path
    if name.upper().startswith("LIST") or "%" in name:
        raise ReadError("several-files", "the header distributes its voxels over several files; expected one")
    if PurePosixPath(name).name != name or "\\" in name:
        raise ReadError(
            "outside-folder", "the header refers to a data file in another folder; expected one in the same folder"
        )
    if not (path.parent / name).is_file():
        raise ReadError("missing", "the data file of the header is not in the same folder")
    return path.parent / name


def _check_stored_voxels(voxel_file: Path, header: _TextHeader, expected_bytes: int) -> None:
    """Compare the stored voxels with the header: length, and checksum if they are compressed.

    Args:
        voxel_file: file with the voxels, which may be the file with the header.
        header: text header.
        expected_bytes: length of the voxels according to the header.

    Raises:
        ReadError: the voxels are damaged or of another length, or their encoding is unknown.
    """
    start = header.start if voxel_file.suffix.lower() in _HEADER_SUFFIXES else 0
    byte_skip = header.skip("headersize" if header.is_metaimage else "byteskip")
    line_skip = 0 if header.is_metaimage else header.skip("lineskip")
    if header.encoding in CODECS:
        if byte_skip > 0 or line_skip:
            raise ReadError("unreadable", "compressed voxels after skipped bytes or lines; expected none")
        check_compressed_voxels(voxel_file, start, header.encoding, expected_bytes)
        return
    with voxel_file.open("rb") as file:
        file.seek(start)
        for _ in range(line_skip):
            file.readline()
        available_bytes = voxel_file.stat().st_size - file.tell()
        if header.encoding == "raw":
            # -1: the voxels are the last bytes of the file, and the bytes before them have any length
            check_length(
                min(available_bytes, expected_bytes) if byte_skip < 0 else available_bytes - byte_skip, expected_bytes
            )
        elif header.encoding == "hex":
            check_length(sum(len(line.strip()) for line in file) // 2, expected_bytes)
        elif header.encoding != "text":
            raise ReadError("unreadable", f"voxels in the encoding '{header.encoding[:20]}', which is unknown")


def _find_missing_geometry(header: _TextHeader) -> tuple[str, ...]:
    """List quality codes for geometry fields that are missing, which ITK replaces by defaults."""
    has_spacing = {"elementspacing", "elementsize", "spacings", "spacedirections"} & set(header.fields)
    has_placement = bool({"transformmatrix", "rotation", "orientation"} & set(header.fields))
    if not header.is_metaimage:
        has_placement = header.fields.get("space", "").lower() in _NRRD_SPACES
    return tuple(code for code, is_known in (("no-spacing", has_spacing), ("no-place", has_placement)) if not is_known)


def _import_simple_itk() -> Any:
    """Import SimpleITK, with its warnings disabled."""
    try:
        import SimpleITK
    except ModuleNotFoundError as error:
        raise ReadError(
            "reader-missing",
            f"SimpleITK is required for this format and is not installed: {install_command('train')}",
        ) from error
    sitk: Any = SimpleITK
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk
