"""Compressed frames before a decoder sees them: a size that contradicts the header makes GDCM end the process."""

from __future__ import annotations

import struct

from medim.data.readers.base import ReadError

_NO_FRAME = {0xC4, 0xC8, 0xCC}  # among 0xC0 to 0xCF, the markers that start no frame


def check_frame(data: bytes, rows: int, columns: int, allocated: int) -> None:
    """Refuse a JPEG, JPEG-LS or JPEG 2000 frame of another size or depth than the header says.

    Args:
        data: the frame.
        rows: as the header says.
        columns: as the header says.
        allocated: bits a pixel as the header says.

    Raises:
        ReadError: in that case, or its start is damaged.
    """
    try:
        precision, *size, components = _jpeg_2000(data) if data[:2] == b"\xff\x4f" else _jpeg(data)
    except (struct.error, IndexError) as error:
        raise ReadError("undecodable", "the start of the compressed pixels is damaged") from error
    if size != [rows, columns] or components != 1 or (precision + 7) // 8 * 8 != allocated:
        coded = f"{size[0]}x{size[1]} pixels of {precision} bits and {components} colours"
        raise ReadError("undecodable", f"compressed are {coded}, the header announces {rows}x{columns} of {allocated}")


def _jpeg_2000(data: bytes) -> tuple[int, int, int, int]:
    """Precision, rows, columns and components, from the SIZ marker (ISO/IEC 15444-1, A.5.1)."""
    right, low, left, top = struct.unpack_from(">4I", data, 8)
    components, depth = struct.unpack_from(">HB", data, 40)
    return (depth & 0x7F) + 1, low - top, right - left, components


def _jpeg(data: bytes) -> tuple[int, int, int, int]:
    """Precision, rows, columns and components, from the frame header (ISO/IEC 10918-1, B.2.2; JPEG-LS alike)."""
    place = 2
    while True:
        while data[place + 1] == 0xFF:  # fill bytes
            place += 1
        marker = data[place + 1]
        if data[place] != 0xFF or data[:2] != b"\xff\xd8":
            raise IndexError
        if (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME) or marker == 0xF7:
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, place + 4)
            return precision, rows, columns, components
        place += 2 + struct.unpack_from(">H", data, place + 2)[0]
