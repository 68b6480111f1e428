"""Segmentations as files on the image's own grid, and their sizes."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from medim.data.preprocessing import to_native
from medim.files import write_bytes
from medim.types import Array, Volume


def write_mask(stem: Path, labels: Array, volume: Volume) -> Path:
    """Write labels with the geometry of the file that the image came from: voxel for voxel the same grid.

    3D becomes NIfTI (`.nii.gz`), qform and sform both set; 2D an 8-bit PNG whose grey values are the labels.

    Args:
        stem: the file without its suffix.
        labels: (*volume.shape) uint8.
        volume: the image as read.

    Returns:
        the file written.
    """
    native = to_native(labels[None], volume)[0]
    if volume.spatial_dims == 2:
        buffer = io.BytesIO()
        Image.fromarray(native).save(buffer, format="PNG")
        path = stem.with_name(f"{stem.name}.png")
        write_bytes(path, buffer.getvalue())
        return path
    image: Any = nibabel.Nifti1Image(native, volume.native_affine)  # type: ignore[no-untyped-call]
    image.set_sform(volume.native_affine, code=1)
    image.set_qform(volume.native_affine, code=1)  # without the shear, which a qform cannot hold
    if not np.allclose(image.get_qform(), volume.native_affine, atol=1e-3):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    path = stem.with_name(f"{stem.name}.nii.gz")
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    return path


def sizes(labels: Array, volume: Volume, classes: tuple[str, ...]) -> dict[str, float]:
    """Size of each class: `ml_<class>` in 3D, `mm2_<class>` in 2D."""
    dims = volume.spatial_dims
    voxel = abs(float(np.linalg.det(volume.affine[:dims, :dims])))  # mm3 or mm2
    unit, scale = ("ml", 1e-3) if dims == 3 else ("mm2", 1.0)
    counts = np.bincount(labels.reshape(-1), minlength=len(classes) + 1)[1:]
    return {f"{unit}_{name}": round(float(n) * voxel * scale, 6) for name, n in zip(classes, counts, strict=True)}
