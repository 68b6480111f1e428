"""Check compressed frames before decoding: GDCM aborts the process if their size contradicts the header."""

from __future__ import annotations

import struct

from medim.data.readers.base import ReadError

_NON_FRAME_MARKERS = {0xC4, 0xC8, 0xCC}  # markers in 0xC0 to 0xCF that do not start a frame


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
