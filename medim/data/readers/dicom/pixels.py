"""Decode DICOM pixels to real values, with bright structures as high values."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import JPEGExtended12Bit, RLELossless

from medim.data.readers.base import DECODER, ReadError
from medim.data.readers.dicom.codestreams import DECODER_PLUGINS, check_codec, check_frame, decode_extended_jpeg
from medim.data.readers.dicom.header_scan import scan_header
from medim.data.readers.dicom.mosaic import MOSAIC_KEYWORDS, MOSAIC_TYPES, read_mosaic
from medim.data.readers.dicom.values import silence_pydicom
from medim.types import Array


def decode_frames(path: Path) -> Array:
    """Decode the frames of a file: rescaled, MONOCHROME1 inverted, without overlays.

    The display window (VOI LUT) is not applied, because it is a viewing preference and not image content.

    Returns:
        (frames, rows, columns) float32, of a mosaic its slices; NaN for padding pixels declared in the header.

    Raises:
        ReadError: the pixels cannot be decoded.
    """
    decoder = DECODER.get()
    return decode_and_rescale(path) if decoder is None else decoder.decode_frames(path)


def decode_and_rescale(path: Path) -> Array:
    """Decode the frames of a file in this process, see `decode_frames`."""
    with silence_pydicom():
        dataset = _read_dataset(path)
        stored_values = _decode_stored_values(dataset)
        frames = np.empty(stored_values.shape, np.float32)
        try:
            low, high = _compute_value_range(dataset)
            for index, frame in enumerate(stored_values):
                values = _rescale_frame(dataset, index, frame)
                if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
                    ends = _rescale_frame(dataset, index, np.array([low, high], dtype=stored_values.dtype))
                    values = ends.sum(dtype=np.float64) - values
                frames[index] = values
            if (padding := _find_padding(dataset, stored_values)) is not None:
                frames[padding] = np.nan
        except MemoryError:
            raise
        except Exception as error:  # a broken lookup table, slope or padding value
            raise ReadError("undecodable", f"the rescaling cannot be applied ({type(error).__name__})") from error
    kinds = dataset.get("ImageType") or []
    if MOSAIC_TYPES & {str(value).upper() for value in ([kinds] if isinstance(kinds, str) else kinds)}:
        mosaic = read_mosaic(scan_header(path, MOSAIC_KEYWORDS).header)
        return frames if mosaic is None else mosaic.split_frame(frames[0])
    return frames


def same_pixels(one: Path, other: Path) -> bool:
    """Whether two files contain the same image, independent of their transfer syntax."""
    return filecmp.cmp(one, other, shallow=False) or hash_pixels(one) == hash_pixels(other)


def hash_pixels(path: Path) -> bytes:
    """Hash the real values of a file, independent of its transfer syntax; the whole file if they cannot be decoded."""
    try:
        frames = decode_frames(path)
    except ReadError:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    frames += 0.0  # -0.0 becomes 0.0
    frames[np.isnan(frames)] = np.nan  # one bit pattern
    digest = hashlib.blake2b(repr(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.digest()


def _read_dataset(path: Path) -> pydicom.FileDataset:
    try:
        return pydicom.dcmread(path, force=True)
    except MemoryError:
        raise
    except Exception as error:  # pydicom raises many exception types for damaged files
        raise ReadError("unreadable", f"incomplete or invalid DICOM file ({type(error).__name__})") from error


def _decode_stored_values(dataset: pydicom.FileDataset) -> Array:
    """Decode the (frames, rows, columns) stored values, without overlay bits in the same cells."""
    try:
        if not getattr(dataset.file_meta, "TransferSyntaxUID", None):
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        syntax = dataset.file_meta.TransferSyntaxUID
        bits, bits_stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
        unused_high_bits = bits - 1 - int(dataset.get("HighBit", bits_stored - 1))
        has_bit_cells = not syntax.is_encapsulated or syntax == RLELossless
        check_codec(syntax)
        if has_bit_cells:  # pydicom would clear bits as if the value occupied the lowest bits of its cell
            dataset.BitsStored, dataset.HighBit = bits, bits - 1
        else:
            for frame in _generate_frames(dataset):
                check_frame(frame, int(dataset.Rows), int(dataset.Columns), bits)
        values: Array
        if syntax == JPEGExtended12Bit and bits == 16:
            size, signed = (int(dataset.Rows), int(dataset.Columns)), bool(dataset.get("PixelRepresentation"))
            values = np.stack(
                [decode_extended_jpeg(frame, *size, bits_stored, signed=signed) for frame in _generate_frames(dataset)]
            )
        else:
            dataset.pixel_array_options(decoding_plugin=DECODER_PLUGINS.get(syntax, ""))
            values = dataset.pixel_array
        dataset.BitsStored = bits_stored
        values = values.reshape(int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns))
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # decoders raise many exception types
        raise ReadError("undecodable", f"the pixels cannot be decoded ({type(error).__name__})") from error
    if has_bit_cells and bits_stored < bits:
        # the shifts preserve the sign of signed values
        values = np.right_shift(np.left_shift(values, unused_high_bits), bits - bits_stored)
    return values


def _generate_frames(dataset: pydicom.FileDataset) -> Iterator[bytes]:
    return generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1))


def _compute_value_range(dataset: pydicom.FileDataset) -> tuple[int, int]:
    """Compute the lowest and highest value that can be stored."""
    bits = int(dataset.get("BitsStored") or 16)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dataset.get("PixelRepresentation") else (0, (1 << bits) - 1)


def _find_padding(dataset: pydicom.FileDataset, stored_values: Array) -> Array | None:
    """Locate the padding in stored values; None if the header declares none."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    limits = [int(end) for end in ends if end is not None and end != ""]
    if not limits or ends[0] is None:
        return None
    values = np.array(limits, np.int64).astype(stored_values.dtype)  # the sign may be lost in the header
    return np.asarray((stored_values >= values.min()) & (stored_values <= values.max()))


def _rescale_frame(dataset: pydicom.FileDataset, index: int, stored_values: Array) -> Array:
    """Rescale stored values by the slope and intercept of the frame or the file, or by the modality lookup table."""
    source: Any = dataset
    for group in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        items = dataset.get(group) or []
        item = items[index if group.startswith("Per") and index < len(items) else 0] if items else None
        if item is not None and item.get("PixelValueTransformationSequence"):
            source = item.PixelValueTransformationSequence[0]
    slope, intercept = (source.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    if "ModalityLUTSequence" not in source and (slope is None) != (intercept is None):  # pydicom would apply neither
        return stored_values * float(1 if slope is None else slope) + float(0 if intercept is None else intercept)
    return np.asarray(apply_modality_lut(stored_values, source), dtype=np.float64)
