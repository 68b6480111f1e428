"""Answers as files on the image's own grid and as columns of a table."""

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
    return _write_png(stem, native) if volume.spatial_dims == 2 else _write_nifti(stem, native, volume)


def write_map(stem: Path, scores: Array, volume: Volume) -> tuple[Path, dict[str, float]]:
    """Write scores with the geometry of the file that the image came from, as `write_mask` does.

    3D becomes float32 NIfTI, NaN where there is no score; 2D a 16-bit PNG: 0 where there is no score, else 1 to 65535
    in even steps from the lowest score to the highest.

    Args:
        stem: the file without its suffix.
        scores: (*volume.shape) float32; NaN is no score.
        volume: the image as read.

    Returns:
        the file written, and the `mean`, `lowest` and `highest` score.
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
    image.set_qform(volume.native_affine, code=1)  # without the shear, which a qform cannot hold
    if not np.allclose(image.get_qform(), volume.native_affine, atol=1e-3):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    path = stem.with_name(f"{stem.name}.nii.gz")
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    return path
