"""Raw DICOM values to texts and numbers; pydicom is kept from telling them to anybody."""

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

_STRUCT_LETTERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """Elements by keyword, as the bytes in the file; items of a sequence are headers."""

    raw: Mapping[str, Any]
    byte_order: str = "<"

    def texts(self, keyword: str) -> list[str]:
        """The values of a text, without the spaces around them; none where it is empty."""
        raw = self.raw.get(keyword)
        if not raw:
            return []
        if raw.isascii() and b"\x1b" not in raw:  # the escape of ISO 2022, whose letters may all look like ASCII
            text = raw.decode("ascii")
        else:
            with silence_pydicom():
                text = decode_bytes(raw, _parse_encodings(self.raw.get("SpecificCharacterSet")), set())
        values = [value.strip(" \0") for value in text.split("\\")]
        return values if any(values) else []

    def text(self, keyword: str) -> str:
        """The first of `texts`, or nothing."""
        return next(iter(self.texts(keyword)), "")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """The values of a number.

        Raises:
            ReadError: one is none.
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
            raise ReadError("unreadable", f"{keyword} holds a value that is no number") from error

    def integer(self, keyword: str, default: int = 0) -> int:
        """The first of `numbers` as a whole one.

        Raises:
            ReadError: it is none.
        """
        for value in self.numbers(keyword):
            if not value.is_integer():
                raise ReadError("unreadable", f"{keyword} holds a value that is no whole number")
            return int(value)
        return default

    def items(self, keyword: str) -> list[DicomHeader]:
        """The items of a sequence."""
        items = self.raw.get(keyword)
        return items if isinstance(items, list) else []


@contextmanager
def silence_pydicom() -> Iterator[None]:
    """No warnings of pydicom's: they quote header values, and so patients."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*RLE segment contains non-conformant")  # of another size
            yield
    finally:
        logger.setLevel(level)


@cache
def get_vr(keyword: str) -> str:
    """The kind of value that the standard gives an attribute."""
    tag = tag_for_keyword(keyword)
    return dictionary_VR(tag) if tag is not None else "UN"


@lru_cache(maxsize=64)
def _parse_encodings(raw: bytes | None) -> list[str]:
    names = (raw or b"").decode("ascii", "replace").strip(" \0").split("\\")
    return list(convert_encodings([name.strip() for name in names]))
