"""Common parts of all readers: the `Reader` protocol, `ReadError`, reorientation to RAS+, and basic checks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from nibabel import orientations

from medim.data.memory import available_memory
from medim.data.readers.inspection import FileInspection, ImageInfo
from medim.types import Array, UserError, Volume

_nibabel: Any = orientations  # the module has no type annotations
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MIN_SPACING, MAX_SPACING = 1e-4, 1e4  # mm per voxel
MAX_VOXELS = 1 << 29  # of one image: no scan is this large, a header with more is damaged or malicious
# An image of more than MIN_RATIO_VOXELS voxels must not unpack to more than MAX_RATIO times its file. Measured on 5,752
# files of the test data: at most 30 for images in any format, and 286 for masks, to which the ratio does not apply.
MAX_RATIO = 200
MIN_RATIO_VOXELS = 1 << 26
MAX_SHORT_RUN = 16  # sequences of one visit; more volumes in one series or file are a functional or diffusion run
MIN_CHECKED_BYTES = 1 << 28  # for less, the free memory is not measured
_FEW_LEVELS = 16  # distinct values of a label map, whether in flat areas or not
_FLAT_FRACTION = 0.7  # of equal neighbours in a label map of more levels
_VERY_FLAT_FRACTION = 0.85  # of equal neighbours in a label map of ordered classes; 0.8 in a scan enlarged 3 times
_MIN_SMOOTH_LEVELS = 8  # of an image whose values change smoothly; a label map of fewer classes may be nested
_MIN_LABEL_STEP = 0.25  # between neighbours of two classes, of all levels: above 0.3 in label maps, below 0.2 in scans
_MAX_LABEL_RANGE = 1 << 16  # from the lowest to the highest value of a label map
_BLOCK_SIZE = 1 << 15  # voxels that are counted at once
_SAMPLE_SIZE = 4096  # voxels that are examined first
CHUNK_BYTES = 1 << 22  # of stored voxels that are converted at once


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


@runtime_checkable
class MaskReader(Protocol):
    """Reader with a separate method for masks: one that needs less memory, or that reads other values than `read`."""

    def read_mask(self, path: Path, item: str | None = None) -> Volume:
        """Read the values of a mask: uint8, or uint16 if one is above 255.

        Raises:
            ReadError: the file cannot be read, or a voxel is not an integer from 0 to 65535.
        """
        ...


class Decoder(Protocol):
    """Interface of `sandbox.DecoderProcess`."""

    def decode_frames(self, path: Path) -> Array:
        """Decode the frames of a DICOM file, see `dicom.pixels.decode_frames`."""
        ...

    def inspect(self, path: Path) -> FileInspection:
        """List the images in a file, see `Reader.inspect`."""
        ...

    def read(self, path: Path, item: str | None) -> Volume:
        """Read one image, see `Reader.read`."""
        ...

    def read_mask(self, path: Path, item: str | None) -> Volume:
        """Read one mask, see `MaskReader.read_mask`."""
        ...


# The process that decodes files: None decodes in this process; `sandbox.sandboxed_decoding` sets one with limits.
DECODER: ContextVar[Decoder | None] = ContextVar("decoder", default=None)


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
    counter = LevelCounter(64 if volume.spatial_dims == 2 else 1024)
    counter.update(volume.array)
    image = ImageInfo(
        shape=volume.shape, affine=volume.affine, levels=counter.levels, flatness=counter.flatness, **info
    )
    return FileInspection(images=(image,))


def ras_volume(array: Array, affine: Array, dtype: type = np.float32) -> Volume:
    """Reorient a 3D array so that its axes point to Right, Anterior and Superior, by flips and transpositions only.

    Args:
        array: (i, j, k) numbers as stored, on the grid of the file.
        affine: (4, 4), voxel index on that grid to RAS+ mm.
        dtype: type of the voxels; values that exceed float32 become infinite and are rejected by `check_voxels`.

    Raises:
        ReadError: the affine is not finite or is singular.
    """
    volume, grid = allocate_volume(array.shape, affine, dtype)
    with np.errstate(over="ignore"):
        grid[...] = array
    return volume


def allocate_volume(shape: Sequence[int], affine: Array, dtype: type = np.float32) -> tuple[Volume, Array]:
    """Allocate an image in RAS+ order, to be filled through a view on the grid of the file, without a second copy.

    Args:
        shape: (i, j, k), shape on the grid of the file.
        affine: (4, 4), voxel index on that grid to RAS+ mm.
        dtype: type of the voxels.

    Returns:
        The image with undefined voxels, and the (i, j, k) view.

    Raises:
        ReadError: the affine is not finite or is singular.
    """
    orientation = compute_orientation(affine)
    ras_shape, grid_affine = _reorient_grid(shape, affine, orientation)
    voxels: Array = np.empty((1, *ras_shape), dtype)
    view = voxels[0].transpose(orientation[:, 0].astype(int))
    view = np.flip(view, tuple(int(axis) for axis in np.flatnonzero(orientation[:, 1] < 0)))
    volume = Volume(array=voxels, affine=grid_affine, native_affine=affine, native_shape=tuple(shape))
    return volume, view


def ras_grid(shape: Sequence[int], affine: Array) -> tuple[tuple[int, ...], Array]:
    """Compute the shape and affine of `ras_volume` without the voxels."""
    return _reorient_grid(shape, affine, compute_orientation(affine))


def _reorient_grid(shape: Sequence[int], affine: Array, orientation: Array) -> tuple[tuple[int, ...], Array]:
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


class VoxelRange:
    """Range of the voxels of an image that is read in parts.

    Args:
        nan_is_padding: whether NaN marks padding, which `fill_padding` replaces; otherwise, NaN is invalid.

    Examples:
        >>> voxel_range = VoxelRange()
        >>> voxel_range.update(np.array([1.0, 2.0]))
        >>> voxel_range.check()
    """

    def __init__(self, *, nan_is_padding: bool = False) -> None:
        self._size = self._n_invalid = self._n_nan = 0
        self._low, self._high = math.inf, -math.inf
        self._nan_is_padding = nan_is_padding

    @property
    def has_padding(self) -> bool:
        """Whether some voxels are NaN, which counts as padding."""
        return self._n_nan > 0

    def update(self, values: Array) -> None:
        """Include the voxels of another part, as float32 or integers."""
        if values.size == 0:
            return
        self._size += values.size
        low, high = float(values.min()), float(values.max())
        if self._nan_is_padding and math.isnan(low):
            is_nan = np.isnan(values)
            self._n_nan += int(is_nan.sum())
            values = values[~is_nan]
            if values.size == 0:
                return
            low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            self._n_invalid += int(values.size - np.isfinite(values).sum())
        self._low, self._high = min(self._low, low), max(self._high, high)

    def check(self) -> None:
        """Reject images without information or with invalid values.

        Raises:
            ReadError: there is no voxel, a voxel is not finite, or all voxels are equal.
        """
        if self._size == 0:
            raise ReadError("empty-image", "the image has an axis of length 0")
        if self._n_nan == self._size:
            raise ReadError("not-finite", "every voxel is NaN")
        if self._n_invalid:
            raise ReadError("not-finite", f"{self._n_invalid} of {self._size} voxels are NaN or infinite")
        if self._low == self._high:
            padding = ", except padding (NaN)" if self.has_padding else ""
            raise ReadError("constant", f"every voxel has the value {self._low:g}{padding}")


def fill_padding(layers: Array) -> Array:
    """Replace NaN, which marks padding, by the lowest of the other values, so that it counts as background.

    Args:
        layers: (N, ...) float32, changed in place; an array of NaN is unchanged.
    """
    has_padding, lowest = False, None
    for layer in layers:  # one after the other, because a mask of all would take a quarter of their memory
        values = layer[~np.isnan(layer)]
        has_padding |= values.size < layer.size
        if values.size:
            lowest = values.min() if lowest is None else min(lowest, values.min())
    for layer in layers if has_padding and lowest is not None else ():
        layer[np.isnan(layer)] = lowest
    return layers


class LevelCounter:
    """Counter of the levels of an image that is read in parts, to recognise label maps.

    Examples:
        >>> counter = LevelCounter()
        >>> counter.update(np.array([[0.0, 0.0, 1.0, 1.0, 1.0, 4.0]]))
        >>> counter.levels
        3
    """

    def __init__(self, max_levels: int = 1024) -> None:
        self._max_levels = max_levels
        self._is_image = False
        self._values: set[int] = set()
        self._equal_counts = Counter[int]()  # pairs of equal neighbours by value
        self._n_unequal = 0
        self._edge_counts = Counter[int]()  # pairs of unequal neighbours with a higher value, minus those with a lower

    def update(self, values: Array) -> None:
        """Include the voxels of another part: whole rows, with at least two axes."""
        if self._is_image or values.size == 0:
            return
        sample = values.reshape(-1)[:: max(1, values.size // _SAMPLE_SIZE)]
        self._is_image = not _are_whole(sample) or len(np.unique(sample)) > self._max_levels
        rows = values.reshape(-1, values.shape[-1])
        n_rows = max(1, _BLOCK_SIZE // values.shape[-1])
        for start in range(0, len(rows), n_rows):  # small blocks, because their copies take memory
            if self._is_image:
                return
            self._is_image = not self._count_block(rows[start : start + n_rows])
        self._is_image |= len(self._values) > _FEW_LEVELS and self._measure_flatness() < _FLAT_FRACTION

    def _count_block(self, rows: Array) -> bool:
        """Count the levels and equal neighbours of some rows; whether they may be those of a label map."""
        if not _are_whole(rows) or float(rows.max()) - float(rows.min()) > _MAX_LABEL_RANGE:
            return False
        lowest = int(rows.min())
        self._values.update(_count_values(rows, lowest))
        if len(self._values) > self._max_levels:
            return False
        left, right = rows[:, :-1], rows[:, 1:]
        self._equal_counts.update(_count_values(left[left == right], lowest))
        self._n_unequal += int((left != right).sum())
        self._edge_counts.update(_count_values(np.maximum(left, right), lowest))
        self._edge_counts.subtract(_count_values(np.minimum(left, right), lowest))
        return True

    def _is_smooth(self) -> bool:
        """Whether the values change in small steps, as in a scan of few levels."""
        if len(self._values) < _MIN_SMOOTH_LEVELS or self._measure_flatness() >= _VERY_FLAT_FRACTION:
            return False
        return self._measure_steps() < _MIN_LABEL_STEP

    def _measure_flatness(self) -> float:
        """Measure the fraction of equal neighbours outside the background: the flattest value, or 0 with many."""
        background = {value for value, _ in self._equal_counts.most_common(1)}
        if len(self._values) > _FEW_LEVELS:
            background.add(0)
        n_equal = self._equal_counts.total() - sum(self._equal_counts[value] for value in background)
        n_pairs = n_equal + self._n_unequal
        return n_equal / n_pairs if n_pairs else 1.0

    def _measure_steps(self) -> float:
        """Measure the mean step between unequal neighbours in levels, as a fraction of all levels."""
        ranks = {value: rank for rank, value in enumerate(sorted(self._values))}
        total = sum(count * ranks[value] for value, count in self._edge_counts.items())
        return total / max(1, self._n_unequal) / max(1, len(ranks) - 1)

    @property
    def levels(self) -> int:
        """Number of levels of a label map; 0 for an image."""
        return 0 if self._is_image or self._is_smooth() else len(self._values)

    @property
    def flatness(self) -> float:
        """Fraction of neighbours along a row of a label map with equal values, without background; 0 for an image."""
        return self._measure_flatness() if self.levels else 0.0


def _count_values(values: Array, lowest: int) -> dict[int, int]:
    """Count whole numbers that are not below the lowest."""
    counts = np.bincount((values.reshape(-1) - lowest).astype(np.int64))
    return {int(value) + lowest: int(counts[value]) for value in np.flatnonzero(counts)}


def _are_whole(values: Array) -> bool:
    """Whether all values are whole numbers."""
    return values.dtype.kind in "bui" or bool((values == np.rint(values)).all())


def check_voxels(array: Array) -> None:
    """Reject images without information or with invalid values.

    Raises:
        ReadError: an axis has length 0, a voxel is not finite, or all voxels are equal.
    """
    voxel_range = VoxelRange()
    voxel_range.update(array)
    voxel_range.check()


def check_size(shape: Iterable[int], item_bytes: int) -> int:
    """Compute the size in bytes of an image from its header.

    Raises:
        ReadError: an axis is not positive, or the image would have more than 2^29 voxels.
    """
    n_voxels = 1
    for length in shape:
        if length < 1:
            raise ReadError("empty-image", f"the header specifies an axis of length {length}")
        n_voxels *= int(length)
    if n_voxels > MAX_VOXELS:
        raise ReadError("too-large", f"the header specifies {n_voxels:,} voxels; the limit is {MAX_VOXELS:,}")
    return n_voxels * item_bytes


def check_compression(n_voxels: int, unpacked_bytes: int, packed_bytes: int) -> None:
    """Reject a large image that is compressed far more than images with content can be.

    Masks compress as much as hostile files and are not checked. The number of their voxels is limited.

    Args:
        n_voxels: voxels that the header specifies.
        unpacked_bytes: size of these voxels.
        packed_bytes: size of the file.

    Raises:
        ReadError: the image has more than 2^26 voxels, and the file unpacks to more than 200 times its size.
    """
    if n_voxels > MIN_RATIO_VOXELS and unpacked_bytes > MAX_RATIO * packed_bytes:
        ratio = unpacked_bytes / max(packed_bytes, 1)
        detail = f"{n_voxels:,} voxels unpack to {ratio:,.0f} times the size of the file; the limit is {MAX_RATIO}"
        raise ReadError("compression-ratio", detail)


def check_memory(n_bytes: int) -> None:
    """Reject an image that does not fit into the free memory, before it is decoded.

    The kernel ends a process that exceeds the memory of its machine or control group, together with the work on all
    other images.

    Args:
        n_bytes: estimate of the memory that the image requires.

    Raises:
        ReadError: less memory is available. Small requirements are not checked.
    """
    if n_bytes < MIN_CHECKED_BYTES:
        return
    free_bytes = available_memory()
    if n_bytes > free_bytes:
        raise ReadError(
            "too-much-memory",
            f"the image requires about {n_bytes / 2**30:.2g} GiB of memory; {free_bytes / 2**30:.2g} GiB are available",
        )


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


def as_class_numbers(values: Array) -> Array:
    """Convert the voxels of a mask to uint8, or to uint16 if a value is above 255.

    Raises:
        ReadError: a voxel is not an integer from 0 to 65535.
    """
    labels = np.empty(values.shape, np.uint8 if values.dtype in (np.uint8, np.bool_) else np.uint16)
    step = max(1, CHUNK_BYTES * len(values) // max(values.nbytes, 1))
    for start in range(0, len(values), step):
        numbers = as_float(values[start : start + step])
        with np.errstate(invalid="ignore"):
            labels[start : start + step] = numbers
        if (is_wrong := labels[start : start + step] != numbers).any():
            detail = f"expected integers from 0 to 65535, one per class; got {numbers[is_wrong][0]:g}"
            raise ReadError("not-a-mask", detail)
    return narrow_class_numbers(labels)


def narrow_class_numbers(labels: Array) -> Array:
    """Convert mask values to uint8 if none is above 255."""
    return labels.astype(np.uint8) if labels.itemsize > 1 and labels.max(initial=0) < 256 else labels
