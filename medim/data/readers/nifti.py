"""NIfTI-1 and NIfTI-2 (`.nii`, `.nii.gz`), read with nibabel."""

from __future__ import annotations

import gzip
import io
import logging
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from medim.data.identity import pseudonym, tokens
from medim.data.readers.base import (
    ReadError,
    as_float,
    check_size,
    check_start,
    ras_volume,
    seen,
)
from medim.data.readers.sights import Sight
from medim.types import Volume

_silent = logging.Logger("nibabel", logging.CRITICAL + 1)  # what its header checks mend is not worth a line each
_SECOND = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # NIfTI-2: the header's size, 540
_TO_MM = {1: 1000.0, 3: 0.001}  # NIFTI_UNITS_METER, NIFTI_UNITS_MICRON; everything else is taken as mm
_MORE = 64 << 20  # bytes after the voxels that are read over in search of the checksum
_DEFLATE_RATIO = 1100  # no gzip stream unpacks to more than 1032 times its size


class NiftiReader:
    """One volume a file; a trailing axis of length 1 is dropped."""

    name = "NIfTI"

    def accepts(self, path: Path) -> bool:
        """By suffix: `.nii` or `.nii.gz`."""
        return path.name.lower().endswith((".nii", ".nii.gz"))

    def look(self, path: Path) -> Sight:
        """Read the whole file once: damage shows only where the voxels are unpacked."""
        volume, texts = self._read(path)
        bids = re.search(r"(?:^|[/_])sub-([A-Za-z0-9]+)", path.as_posix())
        session = re.search(r"(?:^|[/_])ses-([A-Za-z0-9]+)", path.as_posix())
        suffix = re.fullmatch(r"sub-.*_([A-Za-z0-9]+)\.nii(?:\.gz)?", path.name)
        return seen(
            volume,
            subject=pseudonym(bids[1]) if bids else None,
            aliases=(pseudonym(f"sub-{bids[1]}"),) if bids else (),
            session=pseudonym(session[1]) if bids and session else None,
            sequence=suffix[1] if suffix else None,
            identities=tokens(texts),
        )

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume.

        Raises:
            ReadError: empty, truncated, several volumes, colour, or no geometry.
        """
        return self._read(path)[0]

    def _read(self, path: Path) -> tuple[Volume, frozenset[str]]:
        """The volume, and the free texts of its header."""
        check_start(path)
        try:
            with nibabel.openers.ImageOpener(str(path)) as file:
                kind = nibabel.Nifti2Header if file.read(4) in _SECOND else nibabel.Nifti1Header
                file.seek(0)
                header: Any = kind.from_fileobj(file, check=False)  # type: ignore[no-untyped-call]
            header.check_fix(logger=_silent, error_level=40)
            dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), int(header["vox_offset"])
        except Exception as error:  # a damaged file raises whatever nibabel met
            raise ReadError("unreadable", f"not a whole NIfTI header ({type(error).__name__})") from error
        if dtype.kind not in "uif":
            raise ReadError("not-scalar", f"voxels of type {dtype}; expected one real number a voxel")
        spatial = _spatial_shape(shape)
        announced = check_size(shape, dtype.itemsize)
        _check_bytes(path, offset, announced)
        try:
            packed = path.name.lower().endswith(".gz")
            content = io.BytesIO(_unpack(path, offset + announced)) if packed else str(path)
            stored: Any = ArrayProxy(content, header)  # type: ignore[no-untyped-call]
            array = as_float(np.asanyarray(stored)).reshape(spatial)
        except ReadError:
            raise
        except Exception as error:
            raise ReadError("truncated", f"the voxels end early or are damaged ({type(error).__name__})") from error
        scale = _TO_MM.get(int(header["xyzt_units"]) & 7, 1.0)
        affine = np.diag([scale, scale, scale, 1.0]) @ np.asarray(header.get_best_affine(), dtype=np.float64)
        names = ("db_name", "descrip") if "db_name" in header else ("descrip",)
        texts = frozenset(bytes(header[name].item()).decode("latin-1").strip("\0 ") for name in names)
        return ras_volume(array, affine), texts


def _unpack(path: Path, size: int) -> bytes:
    """The first bytes of a gzip file, which is read to its end, where its checksum stands."""
    with gzip.open(path) as file:
        data = file.read(size)
        more = 0
        while chunk := file.read(1 << 20):
            more += len(chunk)
            if more > _MORE:
                raise ReadError("unreadable", f"more than {_MORE >> 20} MiB follow the voxels")
    return data


def _spatial_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The three spatial axes of a file's shape.

    Raises:
        ReadError: fewer than three axes, or several volumes.
    """
    if len(shape) < 3:
        raise ReadError("wrong-dimensions", f"shape {shape}; expected three spatial axes")
    if any(length != 1 for length in shape[3:]):
        raise ReadError("several-volumes", f"shape {shape}; expected one volume. Split the file, one volume a file")
    return shape[:3]


def _check_bytes(path: Path, offset: int, announced: int) -> None:
    """Refuse a header that announces more than the file can hold, before any memory is taken.

    Raises:
        ReadError: in that case.
    """
    size = path.stat().st_size
    if not 0 <= offset <= _MORE:
        raise ReadError("unreadable", f"the header says that the voxels start at byte {offset}")
    if announced > size * (_DEFLATE_RATIO if path.name.lower().endswith(".gz") else 1):
        raise ReadError("truncated", f"the header announces {announced} bytes of voxels, the file has {size} bytes")
