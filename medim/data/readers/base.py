"""What every reader keeps to: the words of a finding, and the way to RAS+."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from nibabel import orientations

from medim.data.readers.inspection import FileInspection, ImageInfo
from medim.types import Array, UserError, Volume

_nibabel: Any = orientations  # carries no types
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MIN_SPACING, MAX_SPACING = 1e-4, 1e4  # mm a voxel
MAX_BYTES = 8 << 30  # no single scan is this large; a header that announces more is broken or hostile


class ReadError(UserError):
    """A file that cannot be used as an image.

    Attributes:
        reason: a stable code, as in `rejected.csv`.
        detail: a sentence without any patient identity.
    """

    def __init__(self, reason: str, detail: str, *, path: str | Path | None = None) -> None:
        super().__init__(f"{path}: {detail} [{reason}]" if path is not None else f"{detail} [{reason}]")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes, with the message as it is."""
        return _rebuild_error, (self.reason, self.detail, str(self))

    def with_path(self, path: str | Path) -> ReadError:
        """The same error with the place it happened at."""
        return ReadError(self.reason, self.detail, path=path)


def _rebuild_error(reason: str, detail: str, message: str) -> ReadError:
    error = ReadError(reason, detail)
    error.args = (message,)
    return error


class Reader(Protocol):
    """A family of file formats. To add one: a module with a reader, and one line in `READERS`."""

    name: str

    def accepts(self, path: Path) -> bool:
        """Whether a file is of this format, from its name and first bytes."""
        ...

    def inspect(self, path: Path) -> FileInspection:
        """What a file holds. Runs in a process of its own, and again only where the file has changed.

        Raises:
            ReadError: the file is no image of this format.
        """
        ...

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one image as float32 (C, ...), RAS+ in 3D.

        Raises:
            ReadError: the file is no image of this format.
        """
        ...


def single_image(volume: Volume, **info: Any) -> FileInspection:
    """A file with one image, which was read whole.

    Args:
        volume: what was read.
        info: what the file says beside; see `ImageInfo`.

    Raises:
        ReadError: a voxel is not finite, or all are equal.
    """
    check_voxels(volume.array)
    return FileInspection(found=(ImageInfo(shape=volume.shape, affine=volume.affine, **info),))


def ras_volume(array: Array, affine: Array) -> Volume:
    """Turn a 3D array so that its axes run to Right, Anterior, Superior; flips and swaps only.

    Args:
        array: (i, j, k), on the file's own grid.
        affine: (4, 4), its voxel index to RAS+ mm.

    Raises:
        ReadError: the affine is not finite or flattens space.
    """
    orientation = compute_orientation(affine)
    voxels = np.ascontiguousarray(_nibabel.apply_orientation(array, orientation))[None]
    grid = affine @ _nibabel.inv_ornt_aff(orientation, array.shape)
    return Volume(array=voxels, affine=grid, native_affine=affine, native_shape=array.shape)


def ras_grid(shape: Sequence[int], affine: Array) -> tuple[tuple[int, ...], Array]:
    """Shape and affine that `ras_volume` would give, without voxels."""
    orientation = compute_orientation(affine)
    order = np.argsort(orientation[:, 0])
    return tuple(int(shape[axis]) for axis in order), affine @ _nibabel.inv_ornt_aff(orientation, tuple(shape))


def compute_orientation(affine: Array) -> Array:
    """(3, 2) nibabel orientation of an affine.

    Raises:
        ReadError: the affine is not finite or flattens space.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if lengths.min() < MIN_SPACING or lengths.max() > MAX_SPACING:
        raise ReadError("bad-geometry", f"voxels of {lengths} mm; expected finite lengths above 0")
    orientation = np.asarray(_nibabel.io_orientation(affine))
    if not np.isfinite(orientation).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ReadError("bad-geometry", "the affine flattens space: two axes run in one direction")
    return orientation


def flat_volume(array: Array, spacing: Sequence[float] = (1.0, 1.0)) -> Volume:
    """A 2D picture (rows, columns) with its (row, column) spacing in mm."""
    affine = np.diag([float(spacing[0]), float(spacing[1]), 1.0, 1.0])
    return Volume(
        array=np.ascontiguousarray(array)[None], affine=affine, native_affine=affine, native_shape=array.shape
    )


def check_voxels(array: Array) -> None:
    """Refuse what no model should ever see.

    Raises:
        ReadError: a voxel is not finite, or all are equal.
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
    """Bytes of an array as a header announces it.

    Raises:
        ReadError: an axis is not positive, or the array would exceed 8 GiB.
    """
    count = item_bytes
    for length in shape:
        if length < 1:
            raise ReadError("empty-image", f"the header announces an axis of length {length}")
        count *= int(length)
    if count > MAX_BYTES:
        raise ReadError("too-large", f"the header announces {count / 2**30:.1f} GiB of voxels; at most 8 GiB is read")
    return count


def check_length(size: int, expected_size: int) -> None:
    """Refuse voxels of another number than the header's: one of the two is wrong, and so may be the shape.

    Raises:
        ReadError: in that case.
    """
    if size < expected_size:
        raise ReadError("truncated", f"the header announces {expected_size} bytes of voxels, the file has {size}")
    if size > expected_size:
        raise ReadError("length-mismatch", f"the header announces {expected_size} bytes of voxels, more follow")


def check_not_empty(path: Path) -> None:
    """Refuse a file that is empty or not there.

    Raises:
        ReadError: always in those cases.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ReadError("unreadable", f"the file cannot be opened ({error.strerror})") from error
    if size == 0:
        raise ReadError("empty-file", "the file has no bytes")


def as_float(array: Array) -> Array:
    """Numbers as float32; values too large for it become infinite and are refused by `check_voxels`."""
    with np.errstate(over="ignore"):
        return np.asarray(array, dtype=np.float32)
