"""The header of a NIfTI file: what it announces, and where its voxels lie. No voxel is touched.

A header may state the place twice. Where both are set the sform counts, as in nibabel, FSL and AFNI. That the two move
or turn the image may be meant (a template); that one mirrors it is an error which nobody would see.
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

MAX_VOLUMES = 16  # sequences of one visit; a file of more is a functional or diffusion run
_silent_logger = logging.Logger("nibabel", logging.CRITICAL + 1)  # what its header checks mend is not worth a line each
_NIFTI2_SIZES = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # NIfTI-2: the header's size, 540
_TO_MM = {1: 1000.0, 3: 0.001}  # NIFTI_UNITS_METER, NIFTI_UNITS_MICRON; everything else is taken as mm
_MAX_OFFSET = 64 << 20  # bytes of header extensions that are believed
_DEFLATE_RATIO = 1100  # no gzip stream unpacks to more than 1032 times its size
_MAX_CORNER_DISTANCE = (
    1.0  # mm between a corner's two places: what rounding and a shear that a qform cannot hold may do
)
_LAST_CODE = 5  # NIFTI_XFORM_TEMPLATE_OTHER
_TEXT_FIELDS = ("db_name", "descrip", "aux_file", "intent_name")


@dataclass(frozen=True)
class NiftiHeader:
    """What a file says before its voxels.

    Attributes:
        shape: of one volume, (i, j, k) on the file's own grid.
        volumes: how many follow each other.
        dtype: of the voxels as stored.
        offset: byte where they start, once unpacked.
        scaling: slope and intercept.
        affine: (4, 4), voxel index to RAS+ mm.
        gzipped: whether the file is a gzip stream, whatever its name.
        intent: NIfTI's intent code.
        texts: free texts, which may name somebody.
        quality: codes of what is odd and accepted.
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
        """Of all voxels."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.volumes * self.dtype.itemsize


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read and judge a header.

    Raises:
        ReadError: damaged, of another kind of data, without a place in space, or announcing more than the file holds.
    """
    check_not_empty(path)
    try:
        gzipped = _is_gzipped(path)
        with open_unzipped(path, gzipped) as file:
            kind = nibabel.Nifti2Header if file.read(4) in _NIFTI2_SIZES else nibabel.Nifti1Header
            file.seek(0)
            header: Any = kind(file.read(int(kind.sizeof_hdr)), check=False)  # type: ignore[no-untyped-call]
        pixdim = np.array(header["pixdim"], np.float64)  # as it is: the checks make lengths positive
        codes = int(header["sform_code"]), int(header["qform_code"])
        header.check_fix(logger=_silent_logger, error_level=40)
        dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), float(header["vox_offset"])
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # a damaged file raises whatever nibabel met
        raise ReadError("unreadable", f"not a whole NIfTI header ({type(error).__name__})") from error
    if dtype.kind not in "uif":
        raise ReadError("not-scalar", f"voxels of type {dtype}; expected one real number a voxel")
    spatial, volumes = _split_axes(shape)
    if not (0 <= offset <= _MAX_OFFSET and offset.is_integer()):
        raise ReadError("unreadable", f"the header says that the voxels start at byte {offset:g}")
    _check_data_size(path, int(offset), check_size(shape, dtype.itemsize), gzipped)
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
    """The file, or the stream that it packs."""
    return cast(BinaryIO, gzip.open(path)) if gzipped else path.open("rb")


def _is_gzipped(path: Path) -> bool:
    """Whether the first bytes are gzip's."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _split_axes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The three spatial axes, and the number of volumes.

    Raises:
        ReadError: fewer than three axes, more volumes than a visit has sequences, or several values a voxel.
    """
    if len(shape) < 3:
        raise ReadError("wrong-dimensions", f"shape {shape}; expected three spatial axes")
    if any(length != 1 for length in shape[4:]):
        raise ReadError("not-scalar", f"shape {shape}: several values a voxel; expected one")
    volumes = shape[3] if len(shape) > 3 else 1
    if volumes > MAX_VOLUMES:
        raise ReadError(
            "several-volumes",
            f"shape {shape}: a functional or diffusion run; at most {MAX_VOLUMES} volumes are read as images. "
            "Split the file, or average it to one volume",
        )
    return shape[:3], volumes


def _check_data_size(path: Path, offset: int, expected_bytes: int, gzipped: bool) -> None:
    """Refuse a header that announces another length than the file has, before any memory is taken.

    Raises:
        ReadError: in that case. How long a packed file is shows when it is unpacked.
    """
    size = path.stat().st_size
    if expected_bytes > size * (_DEFLATE_RATIO if gzipped else 1):
        raise ReadError(
            "truncated", f"the header announces {expected_bytes} bytes of voxels, the file has {size} bytes"
        )
    if not gzipped:
        check_length(size - offset, expected_bytes)


def _choose_affine(
    header: Any, codes: tuple[int, int], pixdim: Array, shape: tuple[int, ...]
) -> tuple[Array, tuple[str, ...]]:
    """The affine in mm, and what is odd about it.

    Raises:
        ReadError: no affine that spans space, or two that mirror each other.
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
        raise ReadError("bad-geometry", "no sform, and voxel lengths or quaternion that are none")
    if codes[1]:
        return to_mm @ qform, ()
    return to_mm @ np.asarray(header.get_base_affine(), np.float64), ("no-place",)


def _read_qform(header: Any, pixdim: Array) -> Array | None:
    """The affine of quaternion and voxel lengths; None where they are none."""
    lengths = pixdim[1:4]
    if not (np.isfinite(lengths).all() and (lengths > 0).all() and pixdim[0] in (-1, 0, 1)):
        return None
    try:
        qform = np.asarray(header.get_qform(), np.float64)
    except Exception:  # nibabel's word for a quaternion longer than 1
        return None
    return qform if np.isfinite(qform).all() else None


def _sform_qform_differ(sform: Array, qform: Array, shape: tuple[int, ...], *, same_space: bool) -> bool:
    """Whether two affines put a corner of the image at different places.

    Args:
        sform: (4, 4), in mm.
        qform: (4, 4), in mm.
        shape: of the image.
        same_space: whether both claim to be of one space: then they may not turn it either.

    Raises:
        ReadError: one is the other one's mirror image, so that left and right are not known.
    """
    is_mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    is_reoriented = same_space and not np.array_equal(compute_orientation(sform), compute_orientation(qform))
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), (1,), indexing="ij")).reshape(4, -1)
    distance = np.abs((sform - qform) @ corners).max()
    if distance > _MAX_CORNER_DISTANCE and (is_mirrored or is_reoriented):
        axes = ["".join(nibabel.aff2axcodes(affine)) for affine in (sform, qform)]  # type: ignore[no-untyped-call]
        raise ReadError(
            "sform-qform-conflict",
            f"the sform says {axes[0]}, the qform {axes[1]}: left and right are not known. Repair the header",
        )
    return bool(distance > _MAX_CORNER_DISTANCE)
