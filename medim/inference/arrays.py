"""Arrays of a package's `.npz` files: no pickle, and no more memory than the file's own table of contents admits."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np

from medim.types import Array

MAX_ARRAY_BYTES = 1 << 30  # bytes of all arrays of a file; a phantom of 160 voxels a side has 8 MB
_READ_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, KeyError),
    *(tokenize.TokenError, SyntaxError, TypeError, OverflowError),
)
_MAX_HEADER_BYTES = 1 << 12  # bytes of an array's own header


def read_npz_arrays(data: bytes) -> dict[str, Array]:
    """Read an `.npz` file.

    Raises:
        ValueError: it is none, holds objects, or announces more than it has or than `MAX_ARRAY_BYTES`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > MAX_ARRAY_BYTES:
                raise ValueError(f"more than {MAX_ARRAY_BYTES >> 30} GiB of arrays")
            for entry in entries:
                with archive.open(entry) as file:
                    _check_array_header(file, entry.file_size)
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _READ_ERRORS as error:
        raise ValueError(f"not an .npz file ({error})") from error


def _check_array_header(file: Any, size: int) -> None:
    """Hold the array that a header announces against the bytes there are; numpy would make room for it first."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an array of format {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER_BYTES)
    if dtype.kind not in "biufU" or dtype.itemsize == 0:
        raise ValueError(f"{'Python objects' if dtype.hasobject else dtype} in place of numbers")
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of shape {shape} in {size} bytes")
