"""NIfTI-1 and NIfTI-2 (`.nii`, `.nii.gz`), read with nibabel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np

from medim.data.readers.base import (
    CHUNK_BYTES,
    MAX_SHORT_RUN,
    LevelCounter,
    ReadError,
    VoxelRange,
    allocate_volume,
    as_class_numbers,
    as_float,
    check_compression,
    check_length,
    check_memory,
    fill_padding,
    ras_grid,
)
from medim.data.readers.inspection import FileInspection, ImageInfo, RejectedFile
from medim.data.readers.nifti_header import NiftiHeader, open_unzipped, read_nifti_header
from medim.neutral_names import is_neutral_name
from medim.privacy import make_pseudonym, text_tokens
from medim.types import Array, Volume

_HEADER_SIZES = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # 348, 540
_LABEL_INTENT = 1002
_STATISTIC_INTENTS = range(2, 25)


class NiftiReader:
    """Reader of files with one volume, or with several volumes that are separate images with numbers as names ("3").

    Trailing axes of length 1 are dropped. NaN is padding, as programs write it that move an image onto another grid
    (SPM); it is read as the lowest of the other values.
    """

    name = "NIfTI"
    class_folders = False

    def accepts(self, path: Path) -> bool:
        """Whether the suffix is `.nii` or `.nii.gz`; also accepts a `.hdr`/`.img` pair, to reject it with advice."""
        return path.name.lower().endswith((".nii", ".nii.gz")) or _is_pair(path)

    def inspect(self, path: Path) -> FileInspection:
        """Read the whole file once in constant memory, because damage is only detected by decompressing the voxels."""
        header = _read_single_file_header(path)
        identities = text_tokens(header.texts)
        ranges = [VoxelRange(nan_is_padding=True) for _ in range(header.volumes)]
        counters = [LevelCounter() for _ in range(header.volumes)]
        try:
            _check_intent(header)
            _check_image_compression(path, header)
            shape, affine = ras_grid(header.shape, header.affine)
            for number, _, values in _iterate_layers(path, header):
                scaled_values = _scale_values(values, header)
                ranges[number].update(scaled_values)
                if ranges[number].has_padding:
                    scaled_values = np.where(np.isnan(scaled_values), 0, scaled_values)
                counters[number].update(scaled_values)
        except ReadError as error:
            return FileInspection(
                rejected=(RejectedFile(reason=error.reason, detail=error.detail, identities=identities),)
            )
        names = _parse_bids_names(path)
        run_quality = (*header.quality, *(("long-run",) if header.volumes > MAX_SHORT_RUN else ()))
        images: list[ImageInfo] = []
        rejected: list[RejectedFile] = []
        for number, voxel_range in enumerate(ranges):
            try:
                voxel_range.check()
            except ReadError as error:
                detail = f"volume {number}: {error.detail}" if header.volumes > 1 else error.detail
                rejected.append(RejectedFile(reason=error.reason, detail=detail, identities=identities))
                continue
            item = str(number) if header.volumes > 1 else None
            quality = (*run_quality, *(("padded",) if voxel_range.has_padding else ()))
            images.append(
                ImageInfo(
                    shape=shape,
                    affine=affine,
                    item=item,
                    identities=identities,
                    quality=quality,
                    levels=counters[number].levels,
                    flatness=counters[number].flatness,
                    **names,
                )
            )
        return FileInspection(images=tuple(images), rejected=tuple(rejected))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume.

        Raises:
            ReadError: the file is empty, truncated, in colour or without geometry, or it has several volumes and
                `item` is None.
        """
        header = _read_single_file_header(path)
        _check_image_compression(path, header)
        return _read_one_volume(path, header, item, as_mask=False)

    def read_mask(self, path: Path, item: str | None = None) -> Volume:
        """Read the values of a mask as uint8 or uint16. Masks may be compressed more than images.

        Raises:
            ReadError: as `read`, or a voxel is not an integer from 0 to 65535.
        """
        return _read_one_volume(path, _read_single_file_header(path), item, as_mask=True)


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
        "sequence": suffix[1] if suffix and is_neutral_name(suffix[1]) else None,
    }


def _check_intent(header: NiftiHeader) -> None:
    """Reject a file whose header declares labels or statistics. `read` skips this check, because it also reads masks.

    Raises:
        ReadError: the intent code is one of labels or statistics.
    """
    if header.intent == _LABEL_INTENT or header.intent in _STATISTIC_INTENTS:
        kind = "labels" if header.intent == _LABEL_INTENT else "statistics"
        raise ReadError("not-an-image", f"the header declares the voxels to be {kind} (intent code {header.intent})")


def _check_image_compression(path: Path, header: NiftiHeader) -> None:
    n_voxels = header.data_bytes // header.dtype.itemsize
    check_compression(n_voxels, header.data_bytes, path.stat().st_size)


def _read_one_volume(path: Path, header: NiftiHeader, item: str | None, *, as_mask: bool) -> Volume:
    """Read one volume of a file into its final order, so that memory is needed for one copy.

    Raises:
        ReadError: the voxels are damaged, do not fit into memory or are no class numbers, or the item does not exist.
    """
    last = header.volumes - 1
    if last and item is None:
        raise ReadError("several-volumes", f"the file has {last + 1} volumes; select one by its number, such as #0")
    if item is not None and not (last and item.isdecimal() and int(item) <= last):
        names = f"0 to {last}" if last else "one volume, without a number"
        raise ReadError("no-such-item", f"no volume '{item}' in the file; it has {names}")
    dtype = np.uint8 if as_mask else np.float32  # a mask is widened if it has a value above 255
    check_memory(header.data_bytes // header.volumes // header.dtype.itemsize * np.dtype(dtype).itemsize)
    volume, grid = allocate_volume(header.shape, header.affine, dtype)
    wanted = int(item or 0)
    for number, start, stored_values in _iterate_layers(path, header, wanted):
        if number != wanted:
            continue
        values = _scale_values(stored_values, header)
        if as_mask:
            values = as_class_numbers(values)
            if values.itemsize > grid.itemsize:
                narrow_grid = grid
                volume, grid = allocate_volume(header.shape, header.affine, np.uint16)
                grid[..., :start] = narrow_grid[..., :start]
        grid[..., start : start + len(values)] = values.T
    if as_mask:
        return volume
    if header.dtype.kind == "f":
        fill_padding(volume.array[0])
    return volume


def _iterate_layers(path: Path, header: NiftiHeader, wanted: int | None = None) -> Iterator[tuple[int, int, Array]]:
    """Yield the voxels as stored, in chunks of layers: number of the volume, first layer, (layers, j, i) values.

    A gzip file is read to its end, which verifies its checksum. Of another file, only the wanted volume is read.

    Raises:
        ReadError: the voxel data are too short, too long or damaged.
    """
    columns, rows, n_layers = header.shape
    layer_bytes = columns * rows * header.dtype.itemsize
    step = max(1, CHUNK_BYTES // layer_bytes)
    try:
        with open_unzipped(path, header.gzipped) as file:
            n_bytes = len(file.read(header.offset))
            numbers = range(header.volumes)
            if wanted is not None and not header.gzipped:  # the length of the file has been compared with the header
                numbers = range(wanted, wanted + 1)
                volume_bytes = header.data_bytes // header.volumes
                file.seek(wanted * volume_bytes, os.SEEK_CUR)
                n_bytes += header.data_bytes - volume_bytes
            for number in numbers:
                for start in range(0, n_layers, step):
                    expected_bytes = min(step, n_layers - start) * layer_bytes
                    data = file.read(expected_bytes)
                    n_bytes += len(data)
                    if len(data) == expected_bytes:
                        yield number, start, np.frombuffer(data, header.dtype).reshape(-1, rows, columns)
            if len(numbers) == header.volumes:
                n_bytes += len(file.read(1))
    except MemoryError:
        raise
    except Exception as error:  # gzip and zlib raise many exception types for damaged data
        raise ReadError("truncated", f"the voxels end early or are damaged ({type(error).__name__})") from error
    check_length(n_bytes, header.offset + header.data_bytes)


def _scale_values(stored_values: Array, header: NiftiHeader) -> Array:
    """Scale stored values to real values as float32."""
    if header.scaling == (1.0, 0.0):
        return as_float(stored_values)
    slope, intercept = map(np.float64, header.scaling)
    values: Array = np.empty(stored_values.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        # layer by layer: a float64 copy of the whole chunk would take three times the memory
        for layer, numbers in zip(values, stored_values, strict=True):
            layer[...] = numbers * slope + intercept
    return values
