"""Codecs of compressed pixels: which are installed, checks of a frame before decoding, and JPEG Extended of 12 bits.

GDCM aborts the process if the size of a frame contradicts the header. pydicom passes no JPEG Extended of 12 bits to it,
although it decodes them.
"""

from __future__ import annotations

import importlib
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    AllTransferSyntaxes,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.values import silence_pydicom
from medim.types import Array

CODEC_REMEDY = "pip install python-gdcm pylibjpeg-openjpeg pyjpegls"
DECODER_PLUGINS: dict[str, str] = {  # GDCM aborts the process on some damaged frames, so it decodes only plain JPEG
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
}

_NON_FRAME_MARKERS = {0xC4, 0xC8, 0xCC}  # markers in 0xC0 to 0xCF that do not start a frame


_PLAIN_SYNTAXES = frozenset(map(str, (uid for uid in AllTransferSyntaxes if not uid.is_encapsulated)))
_EXTENDED_JPEG_VALUE = 3000  # of all pixels
_EXTENDED_JPEG = bytes.fromhex(
    "ffd8ffdb0043000201010101010201010102020202020403020202020504040304060506060605060606070908060709070606080b08090a0a"
    "0a0a0a06080b0c0b0a0c090a0a0affc1000b100008000801011100ffc4001400010000000000000000000000000000000effc4001410010000"
    "0000000000000000000000000000ffda0008010100003f005dc0ffd9"
)


@lru_cache(maxsize=64)
def check_codec(syntax: str) -> None:
    """Check that the pixels of a transfer syntax can be decoded here.

    Raises:
        ReadError: there is no decoder, or it is not installed; the message contains the remedy.
    """
    if not syntax or syntax in _PLAIN_SYNTAXES:
        return
    with silence_pydicom():  # it quotes an invalid UID
        uid = UID(syntax)
        name = uid.name if uid.name != uid else "an unknown transfer syntax"
        try:
            decoder = get_decoder(uid)
        except NotImplementedError:
            detail = f"pixels in {name}, for which there is no decoder. Convert them, as with gdcmconv --raw"
            raise ReadError("reader-missing", detail) from None
    plugin = "gdcm" if uid == JPEGExtended12Bit else DECODER_PLUGINS.get(uid)
    is_installed = plugin in decoder.available_plugins if plugin else decoder.is_available
    if not is_installed:
        raise ReadError("reader-missing", f"pixels in {name}, whose decoder is not installed. Run: {CODEC_REMEDY}")


def decode_extended_jpeg(data: bytes, rows: int, columns: int, bits_stored: int, *, signed: bool) -> Array:
    """Decode a frame of JPEG Extended with more than 8 bits, after `check_frame`.

    Returns:
        (rows, columns) uint16 or int16 stored values.

    Raises:
        ReadError: the frame is damaged.
    """
    gdcm: Any = importlib.import_module("gdcm")  # has no type annotations
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(data)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits_stored, bits_stored - 1, int(signed)))
    values = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM returns bytes as text
    if len(values) != 2 * rows * columns:
        raise ReadError("undecodable", "the compressed pixels are damaged")
    return np.frombuffer(values, "<i2" if signed else "<u2").reshape(rows, columns)


def check_extended_jpeg() -> None:
    """Decode a frame of 8 x 8 pixels of 12 bits in JPEG Extended.

    Raises:
        ReadError: GDCM is missing, or decodes other values.
    """
    check_codec(JPEGExtended12Bit)
    values = decode_extended_jpeg(_EXTENDED_JPEG, 8, 8, 12, signed=False)
    if not (values == _EXTENDED_JPEG_VALUE).all():
        raise ReadError("undecodable", f"JPEG Extended of 12 bits is decoded wrongly. Run: {CODEC_REMEDY}")


def check_frame(data: bytes, rows: int, columns: int, bits_allocated: int) -> None:
    """Reject a JPEG, JPEG-LS or JPEG 2000 frame whose size or bit depth differs from the DICOM header.

    Args:
        data: compressed frame.
        rows: rows in the DICOM header.
        columns: columns in the DICOM header.
        bits_allocated: bits per pixel in the DICOM header.

    Raises:
        ReadError: they differ, or the start of the frame is damaged.
    """
    try:
        precision, *size, components = (
            _parse_jpeg2000_header(data) if data[:2] == b"\xff\x4f" else _parse_jpeg_header(data)
        )
    except (struct.error, IndexError) as error:
        raise ReadError("undecodable", "the start of the compressed pixels is damaged") from error
    if size != [rows, columns] or components != 1 or (precision + 7) // 8 * 8 != bits_allocated:
        actual_format = f"{size[0]}x{size[1]} pixels of {precision} bits and {components} colours"
        raise ReadError(
            "undecodable", f"frame of {actual_format}; the header specifies {rows}x{columns} of {bits_allocated} bits"
        )


def _parse_jpeg2000_header(data: bytes) -> tuple[int, int, int, int]:
    """Parse precision, rows, columns and components from the SIZ marker (ISO/IEC 15444-1, A.5.1)."""
    right, low, left, top = struct.unpack_from(">4I", data, 8)
    components, depth = struct.unpack_from(">HB", data, 40)
    return (depth & 0x7F) + 1, low - top, right - left, components


def _parse_jpeg_header(data: bytes) -> tuple[int, int, int, int]:
    """Parse precision, rows, columns and components from the frame header (ISO/IEC 10918-1, B.2.2; also JPEG-LS)."""
    offset = 2
    while True:
        while data[offset + 1] == 0xFF:  # fill bytes
            offset += 1
        marker = data[offset + 1]
        if data[offset] != 0xFF or data[:2] != b"\xff\xd8":
            raise IndexError
        if (0xC0 <= marker <= 0xCF and marker not in _NON_FRAME_MARKERS) or marker == 0xF7:
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, offset + 4)
            return precision, rows, columns, components
        offset += 2 + struct.unpack_from(">H", data, offset + 2)[0]
