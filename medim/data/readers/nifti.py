"""NIfTI-1 and NIfTI-2 (`.nii`, `.nii.gz`), read with nibabel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

from medim.data.readers.base import ReadError, as_float, check_length, ras_volume, single_image
from medim.data.readers.inspection import FileInspection, ImageInfo, RejectedFile
from medim.data.readers.nifti_header import NiftiHeader, open_unzipped, read_nifti_header
from medim.privacy import identity_tokens, make_pseudonym
from medim.types import Array, Volume

_HEADER_SIZES = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # 348, 540
_LABEL_INTENT = 1002
_STATISTIC_INTENTS = range(2, 25)


class NiftiReader:
    """Reader of files with one volume, or with up to 16 volumes that are separate images with numbers as names ("3").

    Trailing axes of length 1 are dropped.
    """

    name = "NIfTI"
    class_folders = False

    def accepts(self, path: Path) -> bool:
        """Whether the suffix is `.nii` or `.nii.gz`; also accepts a `.hdr`/`.img` pair, to reject it with advice."""
        return path.name.lower().endswith((".nii", ".nii.gz")) or _is_pair(path)

    def inspect(self, path: Path) -> FileInspection:
        """Read the whole file once, because damage is only detected by decompressing the voxels."""
        header = _read_single_file_header(path)
        identities = identity_tokens(header.texts)
        try:
            _check_intent(header)
            voxels = _read_voxels(path, header)
        except ReadError as error:
            return FileInspection(
                rejected=(RejectedFile(reason=error.reason, detail=error.detail, identities=identities),)
            )
        names = _parse_bids_names(path)
        images: list[ImageInfo] = []
        rejected: list[RejectedFile] = []
        for index, volume in enumerate(_iterate_volumes(voxels, header)):
            try:
                images += single_image(
                    volume,
                    item=str(index) if header.volumes > 1 else None,
                    identities=identities,
                    quality=header.quality,
                    **names,
                ).images
            except ReadError as error:
                detail = f"volume {index}: {error.detail}" if header.volumes > 1 else error.detail
                rejected.append(RejectedFile(reason=error.reason, detail=detail, identities=identities))
        return FileInspection(images=tuple(images), rejected=tuple(rejected))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume.

        Raises:
            ReadError: the file is empty, truncated, in colour or without geometry, or it has several volumes and
                `item` is None.
        """
        header = _read_single_file_header(path)
        last = header.volumes - 1
        if last and item is None:
            raise ReadError("several-volumes", f"the file has {last + 1} volumes; select one, as in {path.name}#0")
        if item is not None and not (last and item.isdecimal() and int(item) <= last):
            names = f"0 to {last}" if last else "one volume, without a number"
            raise ReadError("no-such-item", f"no volume '{item}' in the file; it has {names}")
        return _scale_volume(_read_voxels(path, header), header, int(item or 0))


def _is_pair(path: Path) -> bool:
    """Whether a file is half of an Analyze or NIfTI pair."""
    header = path.with_suffix(".hdr")
    if path.suffix.lower() not in {".hdr", ".img"} or not header.is_file():
        return False
    try:
        with header.open("rb") as file:
            return file.read(4) in _HEADER_SIZES
    except OSError:
        return False


def _read_single_file_header(path: Path) -> NiftiHeader:
    """Read the header of a single-file NIfTI.

    Raises:
        ReadError: the header is invalid, or the file is half of a `.hdr`/`.img` pair. Pairs are rejected because
            Analyze headers do not define left and right, and the two files can get separated.
    """
    if _is_pair(path):
        raise ReadError("pair-of-files", "half of a .hdr/.img pair; convert it to one file: nib-convert a.img a.nii.gz")
    return read_nifti_header(path)


class _BidsNames(TypedDict):
    """Entities of a BIDS name as arguments of `single_image`."""

    subject: str | None
    aliases: tuple[str, ...]
    session: str | None
    sequence: str | None


def _parse_bids_names(path: Path) -> _BidsNames:
    """Parse subject, session and suffix from BIDS names: the file name first, else the nearest folder name."""
    parts = path.parts[::-1]
    subject = next((match for part in parts if (match := re.search(r"(?:^|_)sub-([A-Za-z0-9]+)", part))), None)
    session = next((match for part in parts if (match := re.search(r"(?:^|_)ses-([A-Za-z0-9]+)", part))), None)
    suffix = re.fullmatch(r"sub-.*_([A-Za-z0-9]+)\.nii(?:\.gz)?", path.name, re.IGNORECASE)
    return {
        "subject": make_pseudonym(subject[1]) if subject else None,
        "aliases": (make_pseudonym(f"sub-{subject[1]}"),) if subject else (),
        "session": make_pseudonym(session[1]) if subject and session else None,
        "sequence": suffix[1] if suffix else None,
    }


def _check_intent(header: NiftiHeader) -> None:
    """Reject a file whose header declares labels or statistics. `read` skips this check, because it also reads masks.

    Raises:
        ReadError: the intent code is one of labels or statistics.
    """
    if header.intent == _LABEL_INTENT or header.intent in _STATISTIC_INTENTS:
        kind = "labels" if header.intent == _LABEL_INTENT else "statistics"
        raise ReadError("not-an-image", f"the header declares the voxels to be {kind} (intent code {header.intent})")


def _read_voxels(path: Path, header: NiftiHeader) -> Array:
    """Read the (volumes, k, j, i) voxels as stored. A gzip file is read to its end, which verifies its checksum.

    Raises:
        ReadError: the voxel data are too short, too long or damaged.
    """
    try:
        with open_unzipped(path, header.gzipped) as file:
            start = len(file.read(header.offset))
            data = file.read(header.data_bytes)
            n_extra = len(file.read(1))
    except Exception as error:  # gzip and zlib raise many exception types for damaged data
        raise ReadError("truncated", f"the voxels end early or are damaged ({type(error).__name__})") from error
    check_length(start + len(data) + n_extra, header.offset + header.data_bytes)
    return np.frombuffer(data, header.dtype).reshape(header.volumes, *reversed(header.shape))


def _iterate_volumes(voxels: Array, header: NiftiHeader) -> Iterator[Volume]:
    """Yield the volumes one after another, so that only one is in memory as float32."""
    for index in range(header.volumes):
        yield _scale_volume(voxels, header, index)


def _scale_volume(voxels: Array, header: NiftiHeader, index: int) -> Volume:
    """Scale one volume of a file to real values."""
    stored_values = voxels[index]
    if header.scaling == (1.0, 0.0):
        return ras_volume(as_float(stored_values.T), header.affine)
    slope, intercept = map(np.float64, header.scaling)
    array = np.empty(stored_values.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        # layer by layer: a float64 copy of the whole volume would take three times the memory
        for layer, numbers in zip(array, stored_values, strict=True):
            layer[...] = numbers * slope + intercept
    return ras_volume(array.T, header.affine)
