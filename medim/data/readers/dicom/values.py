"""Convert raw DICOM values to texts and numbers, with pydicom's warnings disabled because they quote values."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import pydicom
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword

from medim.data.readers.base import ReadError

_PRIVATE_ATTRIBUTES = {  # tag and VR, with the vendor's first block of the group
    "SiemensCsaCreator": (0x00290010, "LO"),
    "SiemensCsaImageHeader": (0x00291010, "OB"),
    "UihCreator": (0x00650010, "LO"),
    "UihSlices": (0x00651050, "DS"),
    "UihFrames": (0x00651051, "SQ"),
}
_STRUCT_LETTERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """Elements by keyword, as the bytes in the file; the items of a sequence are headers."""

    raw: Mapping[str, Any]
    byte_order: str = "<"

    def texts(self, keyword: str) -> list[str]:
        """Decode the values of a text element, without surrounding spaces; an empty list if there are none."""
        raw = self.raw.get(keyword)
        if not raw:
            return []
        if raw.isascii() and b"\x1b" not in raw:  # text after an ISO 2022 escape can consist of ASCII bytes only
            text = raw.decode("ascii")
        else:
            with silence_pydicom():
                text = decode_bytes(raw, _parse_encodings(self.raw.get("SpecificCharacterSet")), set())
        values = [value.strip(" \0") for value in text.split("\\")]
        return values if any(values) else []

    def text(self, keyword: str) -> str:
        """Return the first of `texts`, or an empty string."""
        return next(iter(self.texts(keyword)), "")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """Decode the values of a numeric element.

        Raises:
            ReadError: a value is not a number.
        """
        raw = self.raw.get(keyword)
        if not raw:
            return ()
        letter = _STRUCT_LETTERS.get(get_vr(keyword))
        try:
            if letter:
                return tuple(
                    map(float, struct.unpack(f"{self.byte_order}{len(raw) // struct.calcsize(letter)}{letter}", raw))
                )
            values = raw.decode("ascii").strip(" \0")
            return tuple(map(float, values.split("\\"))) if values else ()
        except (ValueError, struct.error) as error:
            raise ReadError("unreadable", f"{keyword} contains a value that is not a number") from error

    def integer(self, keyword: str, default: int = 0) -> int:
        """Return the first of `numbers` as an integer.

        Raises:
            ReadError: the value is not an integer.
        """
        for value in self.numbers(keyword):
            if not value.is_integer():
                raise ReadError("unreadable", f"{keyword} contains a value that is not an integer")
            return int(value)
        return default

    def items(self, keyword: str) -> list[DicomHeader]:
        """Return the items of a sequence."""
        items = self.raw.get(keyword)
        return items if isinstance(items, list) else []


@contextmanager
def silence_pydicom() -> Iterator[None]:
    """Disable the warnings of pydicom inside the block: they quote header values, which may identify patients."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*RLE segment contains non-conformant")  # wrong segment size
            yield
    finally:
        logger.setLevel(level)


@cache
def get_vr(keyword: str) -> str:
    """Look up the value representation (VR) of an attribute in the standard, or of a private one."""
    if keyword in _PRIVATE_ATTRIBUTES:
        return _PRIVATE_ATTRIBUTES[keyword][1]
    tag = tag_for_keyword(keyword)
    return dictionary_VR(tag) if tag is not None else "UN"


@cache
def find_tag(keyword: str) -> int | None:
    """Look up the tag of an attribute in the standard, or of a private one; None if it is unknown."""
    return _PRIVATE_ATTRIBUTES[keyword][0] if keyword in _PRIVATE_ATTRIBUTES else tag_for_keyword(keyword)


@lru_cache(maxsize=64)
def _parse_encodings(raw: bytes | None) -> list[str]:
    names = (raw or b"").decode("ascii", "replace").strip(" \0").split("\\")
    return list(convert_encodings([name.strip() for name in names]))
