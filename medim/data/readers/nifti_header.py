"""Read the header of a NIfTI file and locate its voxels, without reading any voxel.

A header may specify the affine twice, as sform and as qform. If both are set, the sform is used, as in nibabel, FSL and
AFNI. A shift or rotation between the two can be intended (a template). A reflection between them is an error that swaps
left and right without being visible, so such a file is rejected.
"""

from __future__ import annotations

import gzip
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np

from medim.data.readers.base import ReadError, check_length, check_not_empty, check_size, compute_orientation
from medim.types import Array

MAX_VOLUMES = 1 << 14  # of one file
_silent_logger = logging.Logger("nibabel", logging.CRITICAL + 1)  # repairs by the header checks are not reported
_NIFTI2_SIZES = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # NIfTI-2: the header's size, 540
_TO_MM = {1: 1000.0, 3: 0.001}  # NIFTI_UNITS_METER, NIFTI_UNITS_MICRON; all other units are read as mm
_MAX_OFFSET = 64 << 20  # largest accepted size of header extensions, in bytes
_DEFLATE_RATIO = 1100  # no gzip stream unpacks to more than 1032 times its size
# mm between the positions of a corner by sform and qform: tolerates rounding, and shear, which a qform cannot represent
_MAX_CORNER_DISTANCE = 1.0
_LAST_CODE = 5  # NIFTI_XFORM_TEMPLATE_OTHER
_TEXT_FIELDS = ("db_name", "descrip", "aux_file", "intent_name")


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """Content of a NIfTI header.

    Attributes:
        shape: shape of one volume, (i, j, k) on the grid of the file.
        volumes: number of volumes.
        dtype: type of the voxels as stored.
        offset: offset of the first voxel byte after decompression.
        scaling: slope and intercept.
        affine: (4, 4), voxel index to RAS+ mm.
        gzipped: whether the file is a gzip stream, independent of its name.
        intent: NIfTI's intent code.
        texts: free texts, which may contain identities.
        quality: codes of accepted irregularities.
    """

    shape: tuple[int, ...]
    volumes: int
    dtype: np.dtype[Any]
    offset: int
    scaling: tuple[float, float]
    affine: Array
    gzipped: bool
    intent: int
    texts: frozenset[str]
    quality: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        """Size of all voxels in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.volumes * self.dtype.itemsize


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read and validate a header.

    Raises:
        ReadError: the header is damaged, describes another kind of data, has no valid affine, or specifies more data
            than the file contains.
    """
    check_not_empty(path)
    try:
        gzipped = _is_gzipped(path)
        with open_unzipped(path, gzipped) as file:
            kind = nibabel.Nifti2Header if file.read(4) in _NIFTI2_SIZES else nibabel.Nifti1Header
            file.seek(0)
            header: Any = kind(file.read(int(kind.sizeof_hdr)), check=False)  # type: ignore[no-untyped-call]
        pixdim = np.array(header["pixdim"], np.float64)  # a copy, because the checks make lengths positive
        codes = int(header["sform_code"]), int(header["qform_code"])
        header.check_fix(logger=_silent_logger, error_level=40)
        dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), float(header["vox_offset"])
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # nibabel raises many exception types for damaged files
        raise ReadError("unreadable", f"incomplete or invalid NIfTI header ({type(error).__name__})") from error
    if dtype.kind not in "uif":
        raise ReadError("not-scalar", f"voxels of type {dtype}; expected one real number per voxel")
    spatial, volumes = _split_axes(shape)
    if not (0 <= offset <= _MAX_OFFSET and offset.is_integer()):
        raise ReadError("unreadable", f"the header specifies an invalid voxel offset of {offset:g} bytes")
    _check_data_size(path, int(offset), check_size(spatial, dtype.itemsize) * check_size([volumes], 1), gzipped)
    affine, quality = _choose_affine(header, codes, pixdim, spatial)
    return NiftiHeader(
        shape=spatial,
        volumes=volumes,
        dtype=dtype,
        offset=int(offset),
        scaling=(1.0 if slope is None else float(slope), float(intercept or 0.0)),
        affine=affine,
        gzipped=gzipped,
        intent=int(header["intent_code"]),
        texts=frozenset(bytes(header[n].item()).decode("latin-1").strip("\0 ") for n in _TEXT_FIELDS if n in header),
        quality=quality,
    )


def open_unzipped(path: Path, gzipped: bool) -> BinaryIO:
    """Open a file, decompressed if it is a gzip stream."""
    return cast(BinaryIO, gzip.open(path)) if gzipped else path.open("rb")


def _is_gzipped(path: Path) -> bool:
    """Whether the first bytes are those of gzip."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _split_axes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Split a shape into the three spatial axes and the number of volumes.

    Raises:
        ReadError: fewer than three axes, more than `MAX_VOLUMES` volumes, or several values per voxel.
    """
    if len(shape) < 3:
        raise ReadError("wrong-dimensions", f"shape {shape}; expected three spatial axes")
    if any(length != 1 for length in shape[4:]):
        raise ReadError("not-scalar", f"shape {shape}: several values per voxel; expected one")
    volumes = shape[3] if len(shape) > 3 else 1
    if volumes > MAX_VOLUMES:
        raise ReadError(
            "too-many-images", f"shape {shape}: {volumes:,} volumes; the limit of one file is {MAX_VOLUMES:,}"
        )
    return shape[:3], volumes


def _check_data_size(path: Path, offset: int, expected_bytes: int, gzipped: bool) -> None:
    """Reject a header whose data size does not match the file, before memory is allocated.

    Raises:
        ReadError: the sizes do not match. The exact size of a compressed file is only checked when it is read.
    """
    size = path.stat().st_size
    if expected_bytes > size * (_DEFLATE_RATIO if gzipped else 1):
        raise ReadError(
            "truncated", f"the header specifies {expected_bytes} bytes of voxels, the file has {size} bytes"
        )
    if not gzipped:
        check_length(size - offset, expected_bytes)


def _choose_affine(
    header: Any, codes: tuple[int, int], pixdim: Array, shape: tuple[int, ...]
) -> tuple[Array, tuple[str, ...]]:
    """Choose the affine in mm, and list quality codes of irregularities.

    Raises:
        ReadError: there is no invertible affine, or sform and qform are mirror images of each other.
    """
    if not all(0 <= code <= _LAST_CODE for code in codes):
        raise ReadError("bad-geometry", f"sform and qform codes {codes}; expected 0 to {_LAST_CODE}")
    scale = _TO_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    to_mm = np.diag([scale, scale, scale, 1.0])
    qform = _read_qform(header, pixdim)
    if codes[0]:
        sform = to_mm @ np.asarray(header.get_sform(), np.float64)
        compute_orientation(sform)
        if codes[1] and (
            qform is None or _sform_qform_differ(sform, to_mm @ qform, shape, same_space=codes[0] == codes[1])
        ):
            return sform, ("sform-qform-differ",)
        return sform, ()
    if qform is None:
        raise ReadError("bad-geometry", "no sform, and invalid voxel lengths or quaternion")
    if codes[1]:
        return to_mm @ qform, ()
    return to_mm @ np.asarray(header.get_base_affine(), np.float64), ("no-place",)


def _read_qform(header: Any, pixdim: Array) -> Array | None:
    """Read the affine from quaternion and voxel lengths; None if they are invalid."""
    lengths = pixdim[1:4]
    if not (np.isfinite(lengths).all() and (lengths > 0).all() and pixdim[0] in (-1, 0, 1)):
        return None
    try:
        qform = np.asarray(header.get_qform(), np.float64)
    except Exception:  # nibabel raises an error for a quaternion longer than 1
        return None
    return qform if np.isfinite(qform).all() else None


def _sform_qform_differ(sform: Array, qform: Array, shape: tuple[int, ...], *, same_space: bool) -> bool:
    """Whether two affines map a corner of the image to different positions.

    Args:
        sform: (4, 4), in mm.
        qform: (4, 4), in mm.
        shape: spatial shape of the image.
        same_space: whether both refer to the same coordinate space, in which case they must not be rotated either.

    Raises:
        ReadError: one affine is the mirror image of the other, so that left and right are ambiguous.
    """
    is_mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    is_reoriented = same_space and not np.array_equal(compute_orientation(sform), compute_orientation(qform))
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), (1,), indexing="ij")).reshape(4, -1)
    distance = np.abs((sform - qform) @ corners).max()
    if distance > _MAX_CORNER_DISTANCE and (is_mirrored or is_reoriented):
        axes = ["".join(nibabel.aff2axcodes(affine)) for affine in (sform, qform)]  # type: ignore[no-untyped-call]
        raise ReadError(
            "sform-qform-conflict",
            f"the sform gives {axes[0]}, the qform {axes[1]}: left and right are ambiguous. Repair the header",
        )
    return bool(distance > _MAX_CORNER_DISTANCE)
