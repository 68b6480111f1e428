"""Scan a DICOM header into raw values: parses bytes without building a data set, and decodes values on request.

Inspecting an archive consists mostly of reading headers. Measured on 135 files, this module takes 0.34 ms per file,
`gdcm.Scanner` 0.80 ms and pydicom 2.2 ms: 6, 13 and 37 minutes for the first index of a million files. The layout
follows DICOM PS3.5 2024, sections 7 and 10. Pixels are decoded by pydicom.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.values import DicomHeader, find_tag, get_vr

UNDEFINED = 0xFFFFFFFF
_FIRST_READ = 1 << 16  # bytes; enough for the header of most slices
_MAX_DICOM_HEADER_BYTES = 1 << 28  # longest header in bytes
_MAX_INFLATED_BYTES = 1 << 24  # the same for a deflated header, because a small file can inflate to any size
_MAX_SEQUENCE_DEPTH = 16  # deepest nesting of sequences
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs with a 4-byte length
_FRAGMENT_VRS = frozenset((b"OB", b"OW"))
_ITEM_TAG, _ITEM_END_TAG, _SEQUENCE_END_TAG = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_PIXEL_TAGS = {(0x7FE0, element) for element in (0x0008, 0x0009, 0x0010)}  # float, double, integer


class _IncompleteHeaderError(Exception):
    """The bytes read so far end before the header does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderScan:
    """Result of scanning the header of a file.

    Attributes:
        header: the requested elements.
        syntax: transfer syntax UID; empty if the file does not specify it.
        start: offset of the pixel data value; None if there is none.
        length: length of that value in bytes; `UNDEFINED` for compressed fragments.
        size: size of the file in bytes; of a deflated file, the inflated size up to the end of the pixel data.
    """

    header: DicomHeader
    syntax: str
    start: int | None
    length: int
    size: int


def scan_header(path: Path, keywords: frozenset[str]) -> HeaderScan:
    """Scan the header of a file.

    Args:
        path: DICOM file.
        keywords: keywords of the elements to keep, sequences included.

    Raises:
        ReadError: the header is not DICOM, or ends early.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        length = _FIRST_READ
        while True:
            file.seek(0)
            try:
                return _parse_header(file.read(length), size, keywords)
            except (_IncompleteHeaderError, struct.error) as error:
                if length >= min(size, _MAX_DICOM_HEADER_BYTES):
                    raise ReadError("unreadable", "incomplete DICOM header: it ends inside an element") from error
                length *= 16
            except zlib.error as error:
                raise ReadError("unreadable", "the deflated part of the file is damaged") from error


def has_all_fragments(file: BinaryIO, start: int, size: int) -> bool:
    """Whether compressed pixels are complete up to their delimiter.

    Args:
        file: open DICOM file.
        start: offset of the first fragment.
        size: size of the file in bytes.
    """
    offset = start
    while offset + 8 <= size:
        file.seek(offset)
        group, element, length = struct.unpack("<HHI", file.read(8))
        if (group, element) == _SEQUENCE_END_TAG:
            return True
        if (group, element) != _ITEM_TAG:
            return False
        offset += 8 + length
    return False


def _parse_header(data: bytes, size: int, keywords: frozenset[str]) -> HeaderScan:
    offset = 132 if data[128:132] == b"DICM" else 0
    is_complete = len(data) >= size
    meta, offset, _ = _parse_elements(
        data, offset, _TransferEncoding("<", True), {(2, 0x10): "TransferSyntaxUID"}, group=2
    )
    syntax = meta["TransferSyntaxUID"].decode("ascii", "replace").strip(" \0") if "TransferSyntaxUID" in meta else ""
    is_deflated = syntax == DeflatedExplicitVRLittleEndian
    if is_deflated:
        data, offset = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[offset:], _MAX_INFLATED_BYTES), 0
    byte_order = ">" if syntax == ExplicitVRBigEndian else "<"
    explicit = data[offset + 4 : offset + 6].isalpha() and data[offset + 4 : offset + 6].isupper()
    elements, offset, length = _parse_elements(
        data, offset, _TransferEncoding(byte_order, explicit), _map_tags(keywords)
    )
    header = DicomHeader(elements, byte_order)
    if length is not None:
        return HeaderScan(
            header=header, syntax=syntax, start=offset, length=length, size=offset + length if is_deflated else size
        )
    if not is_complete:
        raise _IncompleteHeaderError
    return HeaderScan(header=header, syntax=syntax, start=None, length=0, size=size)


@dataclass(frozen=True, slots=True)
class _TransferEncoding:
    """Byte order, and whether elements contain their VR."""

    byte_order: str
    explicit: bool


def _parse_elements(
    data: bytes,
    offset: int,
    encoding: _TransferEncoding,
    tags: Mapping[tuple[int, int], str],
    *,
    end: int = -1,
    depth: int = 0,
    group: int = 0,
) -> tuple[dict[str, Any], int, int | None]:
    """Parse elements from an offset up to an end, a delimiter, another group, or the pixels.

    Returns:
        The requested elements, the offset after them, and the length of the pixel data that start there, if any.
    """
    elements: dict[str, Any] = {}
    short = struct.Struct(f"{encoding.byte_order}HH2sH").unpack_from
    implicit = struct.Struct(f"{encoding.byte_order}HHI").unpack_from
    long = struct.Struct(f"{encoding.byte_order}I").unpack_from
    explicit, last = encoding.explicit, len(data) if end < 0 else end
    while offset < last:
        if explicit:
            tag_group, tag_element, vr, length = short(data, offset)
            start = offset + 8
            if vr in _LONG_VRS:
                (length,) = long(data, start)
                start += 4
        else:
            tag_group, tag_element, length = implicit(data, offset)
            start, vr = offset + 8, b""
        tag = tag_group, tag_element
        if tag_group == 0xFFFE and tag in (_ITEM_END_TAG, _SEQUENCE_END_TAG):
            return elements, offset + 8, None
        if group and tag_group != group:
            break
        if tag_group == 0x7FE0 and not depth and tag in _PIXEL_TAGS:
            return elements, start, length
        keyword = tags.get(tag)
        if length == UNDEFINED or (keyword is not None and get_vr(keyword) == "SQ"):
            inner = _TransferEncoding("<", False) if vr == b"UN" else encoding
            items, offset = _parse_items(data, start, length, inner, tags, depth + 1, vr in _FRAGMENT_VRS)
            if keyword is not None:
                elements[keyword] = items
            continue
        offset = start + length
        if offset > last:
            raise _IncompleteHeaderError
        if keyword is not None:
            elements[keyword] = data[start:offset]
    return elements, offset, None


def _parse_items(
    data: bytes,
    offset: int,
    length: int,
    encoding: _TransferEncoding,
    tags: Mapping[tuple[int, int], str],
    depth: int,
    fragments: bool,
) -> tuple[list[DicomHeader], int]:
    """Parse the items of a sequence, and return them with the offset after the sequence."""
    if depth > _MAX_SEQUENCE_DEPTH:
        raise ReadError("unreadable", f"sequences are nested more than {_MAX_SEQUENCE_DEPTH} levels deep")
    items: list[DicomHeader] = []
    end = len(data) if length == UNDEFINED else offset + length
    if end > len(data):
        raise _IncompleteHeaderError
    unpack = struct.Struct(f"{encoding.byte_order}HHI").unpack_from
    while offset < end:
        tag_group, tag_element, size = unpack(data, offset)
        offset += 8
        if (tag_group, tag_element) == _SEQUENCE_END_TAG:
            return items, offset
        if (tag_group, tag_element) != _ITEM_TAG:
            raise ReadError("unreadable", "a sequence of the header contains something other than items")
        if fragments:
            offset += size
            continue
        elements, offset, _ = _parse_elements(
            data, offset, encoding, tags, end=-1 if size == UNDEFINED else offset + size, depth=depth
        )
        items.append(DicomHeader(elements, encoding.byte_order))
    if length == UNDEFINED or offset != end:
        raise _IncompleteHeaderError
    return items, offset


@lru_cache
def _map_tags(keywords: frozenset[str]) -> dict[tuple[int, int], str]:
    tags = {tag: keyword for keyword in keywords if (tag := find_tag(keyword)) is not None}
    if "OverlayRows" in keywords:  # of any overlay group
        tags |= dict.fromkeys(range(0x60000010, 0x60200010, 0x20000), "OverlayRows")
    return {(tag >> 16, tag & 0xFFFF): keyword for tag, keyword in tags.items()}
