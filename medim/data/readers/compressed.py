"""Verification of compressed voxels: checksum and length, in constant memory.

ITK ignores the checksums of compressed MetaImage and NRRD files, so one flipped bit changes the image without an error.
The stream is therefore decompressed once before ITK reads the file.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medim.data.readers.base import ReadError, check_length

_CHUNK_BYTES = 1 << 20
CODECS: dict[str, Callable[[], Any]] = {
    "zlib": zlib.decompressobj,
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "bzip2": bz2.BZ2Decompressor,
}


def check_compressed_voxels(path: Path, offset: int, codec: str, expected_bytes: int) -> None:
    """Decompress the voxels of a file without keeping them, and verify checksum and length.

    Args:
        path: file with the voxels.
        offset: first byte of the compressed stream, which extends to the end of the file.
        codec: `zlib`, `gzip` or `bzip2`.
        expected_bytes: length of the voxels according to the header.

    Raises:
        ReadError: the stream is damaged, truncated, or of another length than expected, or bytes follow it.
    """
    length = 0
    with path.open("rb") as file:
        file.seek(offset)
        for chunk in _iterate_chunks(file, CODECS[codec]()):
            length += len(chunk)
            if length > expected_bytes:
                break
    check_length(length, expected_bytes)


def _iterate_chunks(file: BinaryIO, decompressor: Any) -> Iterator[bytes]:
    """Decompress a stream in chunks of limited size.

    Raises:
        ReadError: the stream is damaged or ends early, or bytes follow it.
    """
    is_at_end = False
    pending = b""
    while not decompressor.eof:
        if not pending and getattr(decompressor, "needs_input", True):
            pending = file.read(_CHUNK_BYTES)
            is_at_end = not pending
        try:
            chunk = decompressor.decompress(pending, _CHUNK_BYTES)
        except (zlib.error, OSError) as error:
            raise ReadError("unreadable", "the compressed voxels are damaged: the checksum differs") from error
        if is_at_end and not chunk and not decompressor.eof:
            raise ReadError("truncated", "the compressed voxels end early")
        pending = getattr(decompressor, "unconsumed_tail", b"")  # `bz2` keeps unread input itself
        yield chunk
    if decompressor.unused_data or file.read(1):
        raise ReadError("length-mismatch", "bytes follow the compressed voxels")
