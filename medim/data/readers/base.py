"""What every reader keeps to: the words of a finding, and the way to RAS+."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from nibabel import orientations

from medim.types import Array, Modality, UserError, Volume

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
        return _revived, (self.reason, self.detail, str(self))

    def at(self, path: str | Path) -> ReadError:
        """The same error with the place it happened at."""
        return ReadError(self.reason, self.detail, path=path)


def _revived(reason: str, detail: str, message: str) -> ReadError:
    error = ReadError(reason, detail)
    error.args = (message,)
    return error


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that a reader found, before anything of it is written down: holds identities.

    Attributes:
        files: every file it is made of; the first one stands for it.
        item: its place in a file of many images ("train/12").
        shape: spatial shape as read, (D, H, W) in RAS+ order or (H, W).
        affine: (4, 4), of that grid.
        subject: who it is of, as the file says; None where the file does not say.
        names: other names a table of labels may call it by (its UIDs).
        identities: identity attributes, to be kept out of every output.
    """

    files: tuple[Path, ...]
    shape: tuple[int, ...]
    affine: Array
    item: str | None = None
    subject: str | None = None
    session: str | None = None
    series: str | None = None
    sequence: str | None = None
    scanner: str | None = None
    field_strength: float | None = None
    label: str | None = None
    split: str | None = None
    names: tuple[str, ...] = ()
    identities: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A file, or a series by its first file, that is no image, and why."""

    path: Path
    reason: str
    detail: str
    identities: frozenset[str] = frozenset()


Scanned = tuple[list[Found], list[Refused]]


class Reader(Protocol):
    """A family of file formats. To add one: a module with a reader, and one line in `READERS`."""

    name: str

    def accepts(self, path: Path) -> bool:
        """Whether a file is of this format, from its name and first bytes."""
        ...

    def scan(self, paths: Sequence[Path], modality: Modality) -> Scanned:
        """Find the images in files that this reader accepts; each file ends in one of the two lists."""
        ...

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read one image as float32 (C, ...), RAS+ in 3D.

        Raises:
            ReadError: the file is no image of this format.
        """
        ...


def scan_each(paths: Sequence[Path], look: Callable[[Path], Found]) -> Scanned:
    """Look at each file on its own, a few at a time (unpacking and decoding leave Python's lock)."""

    def attempt(path: Path) -> Found | Refused:
        try:
            return look(path)
        except ReadError as error:
            return Refused(path=path, reason=error.reason, detail=error.detail)

    if not paths:
        return [], []
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        results = list(pool.map(attempt, paths))
    return [r for r in results if isinstance(r, Found)], [r for r in results if isinstance(r, Refused)]


def ras_volume(array: Array, affine: Array) -> Volume:
    """Turn a 3D array so that its axes run to Right, Anterior, Superior; flips and swaps only.

    Args:
        array: (i, j, k), on the file's own grid.
        affine: (4, 4), its voxel index to RAS+ mm.

    Raises:
        ReadError: the affine is not finite or flattens space.
    """
    orientation = orientation_of(affine)
    turned = np.ascontiguousarray(_nibabel.apply_orientation(array, orientation))[None]
    grid = affine @ _nibabel.inv_ornt_aff(orientation, array.shape)
    return Volume(array=turned, affine=grid, native_affine=affine, native_shape=array.shape)


def ras_grid(shape: Sequence[int], affine: Array) -> tuple[tuple[int, ...], Array]:
    """Shape and affine that `ras_volume` would give, without voxels."""
    orientation = orientation_of(affine)
    order = np.argsort(orientation[:, 0])
    return tuple(int(shape[axis]) for axis in order), affine @ _nibabel.inv_ornt_aff(orientation, tuple(shape))


def orientation_of(affine: Array) -> Array:
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
        bad = int(array.size - np.isfinite(array).sum())
        raise ReadError("not-finite", f"{bad} of {array.size} voxels are NaN or infinite")
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


def check_start(path: Path) -> None:
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
