"""Common parts of all readers: the `Reader` protocol, `ReadError`, reorientation to RAS+, and basic checks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from nibabel import orientations

from medim.data.readers.inspection import FileInspection, ImageInfo
from medim.types import Array, UserError, Volume

_nibabel: Any = orientations  # the module has no type annotations
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MIN_SPACING, MAX_SPACING = 1e-4, 1e4  # mm per voxel
MAX_BYTES = 8 << 30  # no single scan is this large: a header with a larger size is damaged or malicious


class ReadError(UserError):
    """A file that cannot be used as an image.

    Attributes:
        reason: a stable code, as in `rejected.csv`.
        detail: an explanation without patient identities.

    Examples:
        >>> error = ReadError("truncated", "the header specifies 8 bytes of voxels, the file has 4", path="scan.nii")
        >>> error.reason
        'truncated'
        >>> print(error)
        scan.nii: the header specifies 8 bytes of voxels, the file has 4 [truncated]
    """

    def __init__(self, reason: str, detail: str, *, path: str | Path | None = None) -> None:
        super().__init__(f"{path}: {detail} [{reason}]" if path is not None else f"{detail} [{reason}]")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its message, to send it between processes."""
        return _rebuild_error, (self.reason, self.detail, str(self))

    def with_path(self, path: str | Path) -> ReadError:
        """Return the same error with the path of the file."""
        return ReadError(self.reason, self.detail, path=path)


def _rebuild_error(reason: str, detail: str, message: str) -> ReadError:
    error = ReadError(reason, detail)
    error.args = (message,)
    return error


class Reader(Protocol):
    """Reader of a family of file formats. To add one, write a module with a reader and add it to `READERS`."""

    name: str
    class_folders: bool  # whether folder names may be the class labels of its images, as in sets of pictures

    def accepts(self, path: Path) -> bool:
        """Whether a file is of this format, from its name and first bytes."""
        ...

    def inspect(self, path: Path) -> FileInspection:
        """List the images in a file. Runs in a worker process; the result is cached until the file changes.

        Raises:
            ReadError: the file is not an image of this format.
        """
        ...

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one image as float32 (C, ...), RAS+ in 3D.

        Raises:
            ReadError: the file is not an image of this format.
        """
        ...


def single_image(volume: Volume, **info: Any) -> FileInspection:
    """Build the inspection of a file with one image, after reading the whole file.

    Args:
        volume: the image.
        info: further metadata from the file; see `ImageInfo`.

    Raises:
        ReadError: a voxel is not finite, or all are equal.

    Examples:
        >>> volume = flat_volume(np.array([[0.0, 1.0], [2.0, 3.0]], np.float32), spacing=(0.5, 0.5))
        >>> [image] = single_image(volume).images
        >>> image.shape
        (2, 2)
    """
    check_voxels(volume.array)
    return FileInspection(images=(ImageInfo(shape=volume.shape, affine=volume.affine, **info),))


def ras_volume(array: Array, affine: Array) -> Volume:
    """Reorient a 3D array so that its axes point to Right, Anterior and Superior, by flips and transpositions only.

    Args:
        array: (i, j, k), on the grid of the file.
        affine: (4, 4), voxel index on that grid to RAS+ mm.

    Raises:
        ReadError: the affine is not finite or is singular.
    """
    orientation = compute_orientation(affine)
    voxels = np.ascontiguousarray(_nibabel.apply_orientation(array, orientation))[None]
    grid = affine @ _nibabel.inv_ornt_aff(orientation, array.shape)
    return Volume(array=voxels, affine=grid, native_affine=affine, native_shape=array.shape)


def ras_grid(shape: Sequence[int], affine: Array) -> tuple[tuple[int, ...], Array]:
    """Compute the shape and affine of `ras_volume` without the voxels."""
    orientation = compute_orientation(affine)
    order = np.argsort(orientation[:, 0])
    return tuple(int(shape[axis]) for axis in order), affine @ _nibabel.inv_ornt_aff(orientation, tuple(shape))


def compute_orientation(affine: Array) -> Array:
    """Compute the (3, 2) nibabel orientation of an affine.

    Raises:
        ReadError: the affine is not finite or is singular.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if lengths.min() < MIN_SPACING or lengths.max() > MAX_SPACING:
        raise ReadError("bad-geometry", f"voxels of {lengths} mm; expected finite lengths above 0")
    orientation = np.asarray(_nibabel.io_orientation(affine))
    if not np.isfinite(orientation).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ReadError("bad-geometry", "the affine is singular: two axes have the same direction")
    return orientation


def flat_volume(array: Array, spacing: Sequence[float] = (1.0, 1.0)) -> Volume:
    """Build the volume of a 2D image (rows, columns) with its (row, column) spacing in mm.

    Examples:
        >>> volume = flat_volume(np.zeros((2, 3), np.float32), spacing=(0.5, 0.25))
        >>> volume.array.shape, volume.spacing
        ((1, 2, 3), (0.5, 0.25))
    """
    affine = np.diag([float(spacing[0]), float(spacing[1]), 1.0, 1.0])
    return Volume(
        array=np.ascontiguousarray(array)[None], affine=affine, native_affine=affine, native_shape=array.shape
    )


def check_voxels(array: Array) -> None:
    """Reject images without information or with invalid values.

    Raises:
        ReadError: an axis has length 0, a voxel is not finite, or all voxels are equal.
    """
    if array.size == 0:
        raise ReadError("empty-image", "the image has an axis of length 0")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        n_bad = int(array.size - np.isfinite(array).sum())
        raise ReadError("not-finite", f"{n_bad} of {array.size} voxels are NaN or infinite")
    if low == high:
        raise ReadError("constant", f"every voxel has the value {float(low):g}")


def check_size(shape: Iterable[int], item_bytes: int) -> int:
    """Compute the size in bytes of an array from its header.

    Raises:
        ReadError: an axis is not positive, or the array would exceed 8 GiB.
    """
    count = item_bytes
    for length in shape:
        if length < 1:
            raise ReadError("empty-image", f"the header specifies an axis of length {length}")
        count *= int(length)
    if count > MAX_BYTES:
        raise ReadError("too-large", f"the header specifies {count / 2**30:.1f} GiB of voxels; the limit is 8 GiB")
    return count


def check_length(size: int, expected_size: int) -> None:
    """Reject a file whose voxel data differ in length from the header: its shape may be wrong too.

    Raises:
        ReadError: the lengths differ.
    """
    if size < expected_size:
        raise ReadError("truncated", f"the header specifies {expected_size} bytes of voxels, the file has {size}")
    if size > expected_size:
        raise ReadError("length-mismatch", f"the header specifies {expected_size} bytes of voxels, the file has more")


def check_not_empty(path: Path) -> None:
    """Reject a file that is empty or missing.

    Raises:
        ReadError: the file is empty or cannot be opened.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ReadError("unreadable", f"the file cannot be opened ({error.strerror})") from error
    if size == 0:
        raise ReadError("empty-file", "the file has no bytes")


def as_float(array: Array) -> Array:
    """Convert numbers to float32; values out of range become infinite and are rejected by `check_voxels`."""
    with np.errstate(over="ignore"):
        return np.asarray(array, dtype=np.float32)
