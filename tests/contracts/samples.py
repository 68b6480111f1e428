"""Sample files of every reader, for the contract of readers: a new reader adds its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim.types import Modality
from tests.data.synthetic import dataset, noise, save, write_archive, write_nifti, xray


def write_itk(path: Path) -> Path:
    sitk: Any = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(noise(4, 5, 6)), str(path))
    return path


def write_png(path: Path) -> Path:
    Image.fromarray(noise(4, 6).astype(np.uint8)).save(path)
    return path


def write_npy(path: Path) -> Path:
    np.save(path, noise(4, 5, 6))
    return path


Sample = tuple[str, Modality, Callable[[Path], Path]]
SAMPLES: dict[str, list[Sample]] = {  # name of the reader: file name, modality, writer
    "NIfTI": [("a.nii", "mri", write_nifti), ("b.nii.gz", "mri", write_nifti)],
    "PNG, JPEG, TIFF, BMP": [(name, "xray", write_png) for name in ("a.png", "b.jpg", "c.tif", "d.bmp")],
    "npy, MedMNIST npz": [("a.npy", "mri", write_npy), ("b.npz", "xray", write_archive)],
    "MetaImage, NRRD": [("a.mha", "mri", write_itk), ("b.nrrd", "mri", write_itk)],
    "DICOM": [
        ("a.dcm", "mri", lambda path: save(dataset(noise(4, 6)), path)),
        ("IM0001", "xray", lambda path: save(xray(noise(4, 6)), path)),
    ],
}
