"""Predictions as image files on the native grid and as table columns."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from medim.data.preprocessing.steps import to_native
from medim.files import write_bytes
from medim.types import Array, Volume


def write_mask(stem: Path, labels: Array, volume: Volume) -> Path:
    """Write a label map on the voxel grid of the source file.

    3D label maps are written as NIfTI (`.nii.gz`) with qform and sform, 2D label maps as 8-bit PNG (16-bit for values
    above 255) with the labels as grey values.

    Args:
        stem: output path without suffix.
        labels: (*volume.shape) values of the classes, uint8 or uint16.
        volume: original image.

    Returns:
        Path of the file.
    """
    native = to_native(labels[None], volume)[0]
    return _write_png(stem, native) if volume.spatial_dims == 2 else _write_nifti(stem, native, volume)


def write_map(stem: Path, scores: Array, volume: Volume) -> tuple[Path, dict[str, float]]:
    """Write a score map on the voxel grid of the source file.

    3D maps are written as float32 NIfTI with NaN for missing scores. 2D maps are written as 16-bit PNG: 0 for missing
    scores, otherwise 1 to 65535, scaled linearly from the lowest to the highest score.

    Args:
        stem: output path without suffix.
        scores: (*volume.shape) float32; NaN for missing scores.
        volume: original image.

    Returns:
        Path of the file, and the `mean`, `lowest` and `highest` score.
    """
    native = to_native(scores[None], volume)[0]
    statistics = {"mean": np.nanmean(native), "lowest": np.nanmin(native), "highest": np.nanmax(native)}
    if volume.spatial_dims == 3:
        path = _write_nifti(stem, native, volume)
    else:
        steps = (native - statistics["lowest"]) / max(statistics["highest"] - statistics["lowest"], 1e-12) * (2**16 - 2)
        path = _write_png(stem, np.nan_to_num(steps.round() + 1, nan=0).astype(np.uint16))
    return path, {name: round(float(value), 6) for name, value in statistics.items()}


def _write_png(stem: Path, native: Array) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(native).save(buffer, format="PNG")
    path = stem.with_name(f"{stem.name}.png")
    write_bytes(path, buffer.getvalue())
    return path


def _write_nifti(stem: Path, native: Array, volume: Volume) -> Path:
    image: Any = nibabel.Nifti1Image(native, volume.native_affine)  # type: ignore[no-untyped-call]
    image.set_sform(volume.native_affine, code=1)
    image.set_qform(volume.native_affine, code=1)  # without shear, which a qform cannot represent
    if not np.allclose(image.get_qform(), volume.native_affine, atol=1e-3):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    path = stem.with_name(f"{stem.name}.nii.gz")
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    return path
