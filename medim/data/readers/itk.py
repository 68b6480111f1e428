"""MetaImage (`.mha`, `.mhd`) and NRRD (`.nrrd`, `.nhdr`), read with SimpleITK, which the train extra brings.

Their headers are text. It is read here first, for it may send ITK to another file, and ITK does not tell what it made
up where the header is silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medim.data.readers.base import (
    LPS_TO_RAS,
    ReadError,
    as_float,
    check_length,
    check_size,
    check_start,
    ras_volume,
    seen,
)
from medim.data.readers.inspection import Sight
from medim.types import Volume

_LONGEST = 1 << 16  # bytes of a header
_DATA_FILE = ("elementdatafile", "data file", "datafile")
_SPACES = {  # of NRRD; ITK knows how they lie in the body
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip


class ItkReader:
    """One scalar volume a file."""

    name = "MetaImage, NRRD"

    def accepts(self, path: Path) -> bool:
        """By suffix."""
        return path.suffix.lower() in {".mha", ".mhd", ".nrrd", ".nhdr"}

    def look(self, path: Path) -> Sight:
        """Read the whole file once."""
        text = _read_text(path)
        return seen(self.read(path), quality=_oddities(text))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume, LPS turned to RAS+.

        Raises:
            ReadError: SimpleITK is missing, or the file is damaged, colour, not 3D, or of voxels that lie elsewhere.
        """
        text = _read_text(path)
        voxels = _voxel_file(path, text)
        sitk = _simple_itk()
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
            size, components = reader.GetSize(), reader.GetNumberOfComponents()
            check_size((*size, components), 1)
            image = reader.Execute()
        except RuntimeError as error:
            raise ReadError(
                "unreadable", "SimpleITK cannot read the file: damaged, truncated or of another format"
            ) from error
        if components != 1:
            raise ReadError("not-scalar", f"{components} values a voxel; expected one")
        if len(size) != 3:
            raise ReadError("wrong-dimensions", f"{len(size)} axes; expected 3")
        stored = sitk.GetArrayViewFromImage(image)
        if not text.packed:
            check_length(voxels.stat().st_size - (text.start if voxels == path else 0), stored.nbytes)
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        array = as_float(stored.transpose(2, 1, 0))  # (k, j, i) to (i, j, k)
        return ras_volume(array, LPS_TO_RAS @ affine)


@dataclass(frozen=True)
class _Text:
    """A header: what it says by field (lower case), and the byte after it."""

    said: dict[str, str]
    start: int
    meta: bool

    @property
    def packed(self) -> bool:
        """Whether the voxels' length is none that the header tells."""
        skips = {"headersize", "byte skip", "byteskip", "line skip", "lineskip"} & set(self.said)
        raw = self.said.get("compresseddata", "false").lower() == "false" and self.said.get("encoding", "raw") == "raw"
        return bool(skips) or not raw or self.said.get("binarydata", "true").lower() == "false"


def _read_text(path: Path) -> _Text:
    """Read the fields up to the voxels.

    Raises:
        ReadError: the file is empty or not there.
    """
    check_start(path)
    meta = path.suffix.lower() in {".mha", ".mhd"}
    said: dict[str, str] = {}
    with path.open("rb") as file:
        while file.tell() < _LONGEST and (line := file.readline(_LONGEST)):
            name, _, value = line.decode("latin-1").strip().partition("=" if meta else ":")
            if not meta and not name:
                break
            said.setdefault(name.strip().lower(), value.strip())
            if meta and name.strip().lower() == "elementdatafile":
                break
        return _Text(said, file.tell(), meta)


def _voxel_file(path: Path, text: _Text) -> Path:
    """The file that holds the voxels: the header's own, or one beside it.

    Raises:
        ReadError: it is missing, lies in another folder, or there are several.
    """
    name = next((text.said[field] for field in _DATA_FILE if field in text.said), "LOCAL")
    if name.upper() == "LOCAL":
        return path
    if name.upper().startswith("LIST") or "%" in name:
        raise ReadError("several-files", "the header spreads its voxels over several files; expected one")
    if PurePosixPath(name).name != name or "\\" in name:
        raise ReadError("outside-folder", "the header names a data file in another folder; expected one beside it")
    if not (path.parent / name).is_file():
        raise ReadError("missing", "the header's data file does not lie beside it")
    return path.parent / name


def _oddities(text: _Text) -> tuple[str, ...]:
    """Codes of what ITK had to make up."""
    spaced = {"elementspacing", "elementsize", "spacings", "space directions"} & set(text.said)
    placed = bool({"transformmatrix", "rotation", "orientation"} & set(text.said))
    if not text.meta:
        placed = text.said.get("space", "").lower() in _SPACES
    return tuple(code for code, known in (("no-spacing", spaced), ("no-place", placed)) if not known)


def _simple_itk() -> Any:
    """SimpleITK, silent."""
    try:
        import SimpleITK
    except ModuleNotFoundError as error:
        raise ReadError(
            "reader-missing",
            'expected SimpleITK to read this format, which is not installed: pip install "medim[train]"',
        ) from error
    sitk: Any = SimpleITK
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk
