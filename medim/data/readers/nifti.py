"""NIfTI-1 and NIfTI-2 (`.nii`, `.nii.gz`), read with nibabel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medim.data.readers.base import ReadError, as_float, check_length, ras_volume, seen
from medim.data.readers.inspection import Found, Refused, Sight
from medim.data.readers.nifti_header import Header, read_header, unpacked
from medim.privacy import pseudonym, tokens
from medim.types import Array, Volume

_HEADER_SIZES = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # 348, 540
_LABEL = 1002
_STATISTICS = range(2, 25)


class NiftiReader:
    """A volume, or up to 16 that are images of their own, called by their place ("3").

    Trailing axes of length 1 are dropped.
    """

    name = "NIfTI"

    def accepts(self, path: Path) -> bool:
        """By suffix, `.nii` or `.nii.gz`; a pair of `.hdr` and `.img` to say what to do with it."""
        return path.name.lower().endswith((".nii", ".nii.gz")) or _is_pair(path)

    def look(self, path: Path) -> Sight:
        """Read the whole file once: damage shows only where the voxels are unpacked."""
        header = _header(path)
        identities = tokens(header.texts)
        try:
            _check_intent(header)
            voxels = _voxels(path, header)
        except ReadError as error:
            return Sight(refused=(Refused(reason=error.reason, detail=error.detail, identities=identities),))
        said = _named(path) | {"identities": identities, "quality": header.quality}
        found: list[Found] = []
        refused: list[Refused] = []
        for place, volume in enumerate(_volumes(voxels, header)):
            try:
                found += seen(volume, item=str(place) if header.volumes > 1 else None, **said).found
            except ReadError as error:
                detail = f"volume {place}: {error.detail}" if header.volumes > 1 else error.detail
                refused.append(Refused(reason=error.reason, detail=detail, identities=identities))
        return Sight(found=tuple(found), refused=tuple(refused))

    def read(self, path: Path, item: str | None = None) -> Volume:
        """Read the volume.

        Raises:
            ReadError: empty, truncated, colour, no geometry, or several volumes and none named.
        """
        header = _header(path)
        last = header.volumes - 1
        if last and item is None:
            raise ReadError("several-volumes", f"the file holds {last + 1} volumes; name one, as in {path.name}#0")
        if item is not None and not (last and item.isdecimal() and int(item) <= last):
            names = f"0 to {last}" if last else "one, which has no name"
            raise ReadError("no-such-item", f"no volume '{item}' in the file; it has {names}")
        return _volume(_voxels(path, header), header, int(item or 0))


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


def _header(path: Path) -> Header:
    """The header.

    Raises:
        ReadError: also for half of a pair: Analyze does not know left from right, and a pair tears apart.
    """
    if _is_pair(path):
        raise ReadError("pair-of-files", "half of a .hdr/.img pair; convert it to one file: nib-convert a.img a.nii.gz")
    return read_header(path)


def _named(path: Path) -> dict[str, Any]:
    """What names of a BIDS tree say: the file's own, else the folder's that is nearest to it."""
    parts = path.parts[::-1]
    subject = next((found for part in parts if (found := re.search(r"(?:^|_)sub-([A-Za-z0-9]+)", part))), None)
    session = next((found for part in parts if (found := re.search(r"(?:^|_)ses-([A-Za-z0-9]+)", part))), None)
    suffix = re.fullmatch(r"sub-.*_([A-Za-z0-9]+)\.nii(?:\.gz)?", path.name, re.IGNORECASE)
    return {
        "subject": pseudonym(subject[1]) if subject else None,
        "aliases": (pseudonym(f"sub-{subject[1]}"),) if subject else (),
        "session": pseudonym(session[1]) if subject and session else None,
        "sequence": suffix[1] if suffix else None,
    }


def _check_intent(header: Header) -> None:
    """Refuse what the header itself calls no image; `read` takes it, for a mask is read the same way.

    Raises:
        ReadError: in that case.
    """
    if header.intent == _LABEL or header.intent in _STATISTICS:
        kind = "labels" if header.intent == _LABEL else "statistics"
        raise ReadError("not-an-image", f"the header says that the voxels are {kind} (intent code {header.intent})")


def _voxels(path: Path, header: Header) -> Array:
    """(volumes, k, j, i) voxels as stored. A gzip file is read to its end, where its checksum stands.

    Raises:
        ReadError: they end early, are damaged, or more follow.
    """
    try:
        with unpacked(path, header.packed) as file:
            start = len(file.read(header.offset))
            data = file.read(header.bytes)
            more = len(file.read(1))
    except Exception as error:  # gzip and zlib have many words for damage
        raise ReadError("truncated", f"the voxels end early or are damaged ({type(error).__name__})") from error
    check_length(start + len(data) + more, header.offset + header.bytes)
    return np.frombuffer(data, header.dtype).reshape(header.volumes, *reversed(header.shape))


def _volumes(voxels: Array, header: Header) -> Iterator[Volume]:
    """Each volume, one after another: only one is held as numbers."""
    for place in range(header.volumes):
        yield _volume(voxels, header, place)


def _volume(voxels: Array, header: Header, place: int) -> Volume:
    """One volume of a file, scaled."""
    stored = voxels[place]
    if header.scaling == (1.0, 0.0):
        return ras_volume(as_float(stored.T), header.affine)
    slope, intercept = map(np.float64, header.scaling)
    array = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for layer, numbers in zip(array, stored, strict=True):  # by layer: float64 of all takes three times the room
            layer[...] = numbers * slope + intercept
    return ras_volume(array.T, header.affine)
