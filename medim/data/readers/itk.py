"""MetaImage (`.mha`, `.mhd`) and NRRD (`.nrrd`, `.nhdr`), read with SimpleITK, which the train extra brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medim.data.readers.base import (
    LPS_TO_RAS,
    ReadError,
    as_float,
    check_size,
    check_start,
    ras_volume,
    seen,
)
from medim.data.readers.sights import Sight
from medim.types import Volume


class ItkReader:
    """One scalar volume a file."""

    name = "MetaImage, NRRD"

    def accepts(self, path: Path) -> bool:
        """By suffix."""
        return path.suffix.lower() in {".mha", ".mhd", ".nrrd", ".nhdr"}

    def look(self, path: Path) -> Sight:
        """Read the whole file once."""
        return seen(self.read(path))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume, LPS turned to RAS+.

        Raises:
            ReadError: SimpleITK is missing, or the file is damaged, colour, or not 3D.
        """
        check_start(path)
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
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        array = as_float(sitk.GetArrayFromImage(image).transpose(2, 1, 0))  # (k, j, i) to (i, j, k)
        return ras_volume(array, LPS_TO_RAS @ affine)


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
