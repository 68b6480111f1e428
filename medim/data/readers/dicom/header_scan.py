"""The header of a DICOM file as raw values: a walk over its bytes that builds no data set and decodes what is asked.

pydicom spends five times as long on a header, and a header pass over an archive is nothing but headers. The layout is
that of DICOM PS3.5 2024, sections 7 and 10; pixels stay pydicom's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.values import Header, vr_of

UNDEFINED = 0xFFFFFFFF
_FIRST_READ = 1 << 16  # bytes; enough for the header of most slices
_LONGEST = 1 << 28  # bytes of header
_INFLATED = 1 << 24  # the same where it is deflated: a small file can hold any number of zeros
_DEEPEST = 16  # sequences inside one another
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs whose length takes 4 bytes
_FRAGMENTED = frozenset((b"OB", b"OW"))
_ITEM, _ITEM_END, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_PIXELS = {(0x7FE0, element) for element in (0x0008, 0x0009, 0x0010)}  # float, double, whole numbers


class _ShortError(Exception):
    """More of the file has to be read."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a walk over a file's header met.

    Attributes:
        syntax: transfer syntax UID; empty where the file does not say.
        start: where the value of the pixel data starts; None where there is none.
        length: of that value; `UNDEFINED` for compressed fragments.
        size: of the file; where it is deflated, as if it were whole.
    """

    header: Header
    syntax: str
    start: int | None
    length: int
    size: int


def scan(path: Path, wanted: frozenset[str]) -> Scan:
    """Walk over the header of a file.

    Args:
        path: the file.
        wanted: keywords of what is kept, sequences included.

    Raises:
        ReadError: the header is no DICOM, or ends early.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        length = _FIRST_READ
        while True:
            file.seek(0)
            try:
                return _scan(file.read(length), size, wanted)
            except (_ShortError, struct.error) as error:
                if length >= min(size, _LONGEST):
                    raise ReadError("unreadable", "not a whole DICOM header: it ends inside an element") from error
                length *= 16
            except zlib.error as error:
                raise ReadError("unreadable", "the deflated part of the file is damaged") from error


def whole_fragments(file: BinaryIO, start: int, size: int) -> bool:
    """Whether compressed pixels run up to their delimiter.

    Args:
        file: the file.
        start: where the first fragment starts.
        size: of the file in bytes.
    """
    place = start
    while place + 8 <= size:
        file.seek(place)
        group, element, length = struct.unpack("<HHI", file.read(8))
        if (group, element) == _END:
            return True
        if (group, element) != _ITEM:
            return False
        place += 8 + length
    return False


def _scan(data: bytes, size: int, wanted: frozenset[str]) -> Scan:
    place = 132 if data[128:132] == b"DICM" else 0
    whole = len(data) >= size
    meta, place, _ = _elements(data, place, _Form("<", True), {(2, 0x10): "TransferSyntaxUID"}, group=2)
    syntax = meta["TransferSyntaxUID"].decode("ascii", "replace").strip(" \0") if "TransferSyntaxUID" in meta else ""
    deflated = syntax == DeflatedExplicitVRLittleEndian
    if deflated:
        data, place = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[place:], _INFLATED), 0
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    explicit = data[place + 4 : place + 6].isalpha() and data[place + 4 : place + 6].isupper()
    found, place, length = _elements(data, place, _Form(order, explicit), _tags(wanted))
    header = Header(found, order)
    if length is not None:
        return Scan(header, syntax, place, length, place + length if deflated else size)
    if not whole:
        raise _ShortError
    return Scan(header, syntax, None, 0, size)


@dataclass(frozen=True, slots=True)
class _Form:
    """Byte order, and whether elements name their VR."""

    order: str
    explicit: bool


def _elements(
    data: bytes,
    place: int,
    form: _Form,
    tags: Mapping[tuple[int, int], str],
    *,
    end: int = -1,
    depth: int = 0,
    group: int = 0,
) -> tuple[dict[str, Any], int, int | None]:
    """Elements from a place on, up to an end, a delimiter, another group, or the pixels.

    Returns:
        those wanted, the place behind them, and the length of the pixels that start there.
    """
    found: dict[str, Any] = {}
    short = struct.Struct(f"{form.order}HH2sH").unpack_from
    implicit = struct.Struct(f"{form.order}HHI").unpack_from
    long = struct.Struct(f"{form.order}I").unpack_from
    explicit, last = form.explicit, len(data) if end < 0 else end
    while place < last:
        if explicit:
            one, two, vr, length = short(data, place)
            start = place + 8
            if vr in _LONG:
                (length,) = long(data, start)
                start += 4
        else:
            one, two, length = implicit(data, place)
            start, vr = place + 8, b""
        tag = one, two
        if one == 0xFFFE and tag in (_ITEM_END, _END):
            return found, place + 8, None
        if group and one != group:
            break
        if one == 0x7FE0 and not depth and tag in _PIXELS:
            return found, start, length
        keyword = tags.get(tag)
        if length == UNDEFINED or (keyword is not None and vr_of(keyword) == "SQ"):
            inner = _Form("<", False) if vr == b"UN" else form
            items, place = _items(data, start, length, inner, tags, depth + 1, vr in _FRAGMENTED)
            if keyword is not None:
                found[keyword] = items
            continue
        place = start + length
        if place > last:
            raise _ShortError
        if keyword is not None:
            found[keyword] = data[start:place]
    return found, place, None


def _items(
    data: bytes, place: int, length: int, form: _Form, tags: Mapping[tuple[int, int], str], depth: int, fragments: bool
) -> tuple[list[Header], int]:
    """The items of a sequence, and the place behind it."""
    if depth > _DEEPEST:
        raise ReadError("unreadable", f"sequences lie more than {_DEEPEST} deep in one another")
    items: list[Header] = []
    end = len(data) if length == UNDEFINED else place + length
    if end > len(data):
        raise _ShortError
    unpack = struct.Struct(f"{form.order}HHI").unpack_from
    while place < end:
        one, two, size = unpack(data, place)
        place += 8
        if (one, two) == _END:
            return items, place
        if (one, two) != _ITEM:
            raise ReadError("unreadable", "a sequence of the header holds something else than items")
        if fragments:
            place += size
            continue
        found, place, _ = _elements(data, place, form, tags, end=-1 if size == UNDEFINED else place + size, depth=depth)
        items.append(Header(found, form.order))
    if length == UNDEFINED or place != end:
        raise _ShortError
    return items, place


@lru_cache
def _tags(wanted: frozenset[str]) -> dict[tuple[int, int], str]:
    tags = {tag: keyword for keyword in wanted if (tag := tag_for_keyword(keyword)) is not None}
    if "OverlayRows" in wanted:  # of any overlay
        tags |= dict.fromkeys(range(0x60000010, 0x60200010, 0x20000), "OverlayRows")
    return {(tag >> 16, tag & 0xFFFF): keyword for tag, keyword in tags.items()}
