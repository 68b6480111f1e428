"""Inspect a DICOM file by its header: object type, subject and frame geometry. Pixels are not read."""

from __future__ import annotations

import math
from collections.abc import Set
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from medim.data.readers.base import ReadError, check_compression, check_not_empty, check_size
from medim.data.readers.dicom import identifiers as identities
from medim.data.readers.dicom.codestreams import check_codec
from medim.data.readers.dicom.frames import check_pixel_spacing, read_frame_planes, read_frame_types
from medim.data.readers.dicom.header_scan import UNDEFINED, HeaderScan, has_all_fragments, scan_header
from medim.data.readers.dicom.mosaic import MOSAIC_KEYWORDS, read_mosaic
from medim.data.readers.dicom.values import DicomHeader, silence_pydicom
from medim.data.readers.inspection import DicomFile, FileInspection, RejectedFile, SeriesInfo
from medim.privacy import Scrubber, identity_tokens, load_site_key, make_pseudonym
from medim.types import Modality

MODALITIES: dict[str, Modality] = {  # of X-rays, single images of any part of the body: projections, no CT
    "MR": "mri",
    "CR": "xray",  # computed radiography
    "DX": "xray",  # digital radiography
    "RG": "xray",  # radiographic film, digitised
    "MG": "xray",  # mammography
    "IO": "xray",  # dental film or sensor in the mouth
    "PX": "xray",  # dental panorama
    "RF": "xray",  # fluoroscopy
    "XA": "xray",  # angiography
}
_IMAGE_KEYWORDS = (
    "SpecificCharacterSet", "SOPClassUID", "Modality", "ImageType", "BurnedInAnnotation", "Manufacturer",
    "ManufacturerModelName", "MagneticFieldStrength", "ScanningSequence", "EchoPulseSequence", "AcquisitionContrast",
    "PresentationIntentType", "LossyImageCompression", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelPaddingValue", "PixelSpacing",
    "ImagerPixelSpacing", "NominalScannedPixelSpacing", "OverlayRows", "ImagesInAcquisition",
)  # fmt: skip
_SERIES_KEYWORDS = tuple(sorted({*identities.NAME_KEYWORDS, *identities.SHARED_KEYWORDS, *_IMAGE_KEYWORDS}))
_SCAN_KEYWORDS = (
    frozenset((*_SERIES_KEYWORDS, *identities.FILE_KEYWORDS, identities.OTHER_IDS_SEQUENCE, "InstanceNumber"))
    | MOSAIC_KEYWORDS
)
_SCREEN_TYPES = {"SCREEN SAVE", "SCREENSAVE", "SCREEN"}
_LOSSY_SYNTAXES = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}  # JPEG; else LossyImageCompression is used
_PIXEL_GROUP = 0x7FE0  # groups of elements that may follow the pixels: 7FE0 and higher
_BLOCK_BYTES = 512  # some media and archives pad files with zeros to a multiple of this length
_QUALITY_RULES = (  # quality code, attribute, value that triggers it
    ("derived", "ImageType", "DERIVED"),
    ("lossy", "LossyImageCompression", "01"),
    ("inverted", "PhotometricInterpretation", "MONOCHROME1"),
    ("for-processing", "PresentationIntentType", "FOR PROCESSING"),
)


def looks_like_dicom(path: Path) -> bool:
    """Whether a file looks like DICOM, by suffix or by its first bytes, with or without the preamble."""
    if path.suffix.lower() in {".dcm", ".dicom", ".ima"}:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or start[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def inspect_dicom_header(path: Path) -> FileInspection:
    """Read and validate a header. The result contains the identity tokens even if the file is rejected."""
    file_identities: frozenset[int] = frozenset()
    series = ""
    try:
        check_not_empty(path)
        scan_result = scan_header(path, _SCAN_KEYWORDS)
        raw_values = tuple(map(scan_result.header.raw.get, _SERIES_KEYWORDS))
        own_tokens = identity_tokens(identities.collect_file_identities(scan_result.header))
        file_identities = own_tokens | _read_series_identities(
            load_site_key(), raw_values, scan_result.header.byte_order
        )
        series = _pseudonymise_uid(scan_result.header, "SeriesInstanceUID")
        series_info = _read_series_info(
            load_site_key(), raw_values, scan_result.header.byte_order, scan_result.syntax in _LOSSY_SYNTAXES
        )
        series_info = _add_frame_types(series_info, scan_result.header)
        count = max(scan_result.header.integer("NumberOfFrames", 1), 1)
        mosaic = read_mosaic(scan_result.header)
        damage = _find_pixel_damage(path, scan_result, count)
        if damage is None:
            check_codec(scan_result.syntax)
            if _count_excess_bytes(scan_result, count):
                series_info = replace(series_info, quality=tuple(sorted({*series_info.quality, "bytes-after-pixels"})))
        if mosaic is not None:
            planes, count = mosaic.planes, len(mosaic.planes)
            series_info = replace(series_info, size=planes[0].size)
        else:
            planes = read_frame_planes(scan_result.header, count) if series_info.kind == "mri" else ()
        instance = DicomFile(
            sop=_pseudonymise_uid(scan_result.header, "SOPInstanceUID", digits=24),
            number=scan_result.header.integer("InstanceNumber", 0),
            count=count,
            damaged=damage is not None,
            frames=planes,
            origin=series_info,
            own=tuple(own_tokens),
        )
    except ReadError as error:
        return FileInspection(rejected=(_reject_file(error, file_identities, series),))
    return FileInspection(rejected=(_reject_file(damage, file_identities),) if damage else (), instance=instance)


def _reject_file(error: ReadError, file_identities: frozenset[int], series: str = "") -> RejectedFile:
    return RejectedFile(reason=error.reason, detail=error.detail, identities=file_identities, series=series)


@lru_cache(maxsize=64)
def _read_series_identities(key: bytes, raw_values: tuple[bytes | None, ...], byte_order: str) -> frozenset[int]:
    """Compute the tokens of the identities that the files of a series share."""
    header = _build_series_header(raw_values, byte_order)
    return identity_tokens(identities.collect_series_identities(header), identities.collect_names(header))


@lru_cache(maxsize=64)
@silence_pydicom()
def _read_series_info(key: bytes, raw_values: tuple[bytes | None, ...], byte_order: str, is_lossy: bool) -> SeriesInfo:
    """Read the metadata that the files of a series share; cached per series.

    Raises:
        ReadError: the files are not grey MR or X-ray images.
    """
    header = _build_series_header(raw_values, byte_order)
    _check_image_header(header)
    patient, issuer = header.text("PatientID"), header.text("IssuerOfPatientID")
    series_identities = _read_series_identities(key, raw_values, byte_order)
    kind = MODALITIES[header.text("Modality")]
    scanner = " ".join(filter(None, map(header.text, ("Manufacturer", "ManufacturerModelName"))))
    field = next((tesla for tesla in header.numbers("MagneticFieldStrength") if 0 < tesla < 100), None)
    kinds = (header.texts(name) for name in ("ScanningSequence", "AcquisitionContrast", "EchoPulseSequence"))
    sequence = "-".join(next(filter(None, kinds), []))
    scrub = Scrubber(series_identities)
    quality, spacing = _find_quality_codes(header, is_lossy), (1.0, 1.0)
    if kind == "xray":
        spacing, spacing_quality = _read_xray_spacing(header)
        quality += spacing_quality
    return SeriesInfo(
        kind=kind,
        series=_pseudonymise_uid(header, "SeriesInstanceUID"),
        study=_pseudonymise_uid(header, "StudyInstanceUID"),
        subject=make_pseudonym(f"{issuer}\x1f{patient}" if issuer else patient) if patient else None,
        aliases=(make_pseudonym(patient),) if patient and issuer else (),
        size=(header.integer("Rows"), header.integer("Columns")),
        spacing=spacing,
        sequence=scrub.scrub_text(sequence or None) if kind == "mri" else header.text("Modality"),
        scanner=scrub.scrub_text(scanner or None),
        field_strength=field,
        n_declared=header.integer("ImagesInAcquisition", 0),
        reference=_pseudonymise_uid(header, "FrameOfReferenceUID") if kind == "mri" else "",
        quality=quality,
        identities=series_identities,
    )


def _add_frame_types(series_info: SeriesInfo, header: DicomHeader) -> SeriesInfo:
    """Apply the rules for ImageType to the types of the frames, because that of the object may be MIXED.

    Raises:
        ReadError: all frames are of a type that is rejected.
    """
    types = [{value.upper() for value in values} for values in read_frame_types(header)]
    if not types:
        return series_info
    _check_image_type(set.intersection(*types))
    codes = {code for code, keyword, value in _QUALITY_RULES if keyword == "ImageType" and value in set.union(*types)}
    return replace(series_info, quality=tuple(sorted({*series_info.quality, *codes})))


def _build_series_header(raw_values: tuple[bytes | None, ...], byte_order: str) -> DicomHeader:
    return DicomHeader(
        {keyword: raw for keyword, raw in zip(_SERIES_KEYWORDS, raw_values, strict=True) if raw is not None}, byte_order
    )


def _pseudonymise_uid(header: DicomHeader, keyword: str, *, digits: int = 12) -> str:
    """Compute the pseudonym of a UID; empty if the header has no such UID."""
    value = header.text(keyword)
    return make_pseudonym(value, digits=digits) if value else ""


def _check_image_header(header: DicomHeader) -> None:
    """Reject objects that are not grey MR or X-ray images. Free-text descriptions are ignored, as they are unreliable.

    Raises:
        ReadError: the object is rejected.
    """
    sop_class = UID(header.text("SOPClassUID"))
    class_name = sop_class.name if sop_class.name != sop_class and not sop_class.is_private else ""
    if (sop_class and "Image Storage" not in class_name) or not (header.integer("Rows") and header.integer("Columns")):
        raise ReadError("not-an-image", f"a DICOM object that is not an image ({class_name or 'of no public class'})")
    modality = header.text("Modality")
    if modality not in MODALITIES:
        modality_text = modality if len(modality) == 2 else "unknown"
        raise ReadError("wrong-modality", f"DICOM modality {modality_text}; expected one of {', '.join(MODALITIES)}")
    photometric = header.text("PhotometricInterpretation")
    if header.integer("SamplesPerPixel", 1) != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise ReadError("colour", "a colour image; expected MONOCHROME1 or MONOCHROME2")
    if header.text("BurnedInAnnotation").upper() == "YES":
        raise ReadError("burned-in", "the header declares annotations burned into the pixels")
    _check_image_type({value.upper() for value in header.texts("ImageType")})
    allocated, stored = header.integer("BitsAllocated", 16), header.integer("BitsStored", 0)
    highest = header.integer("HighBit", stored - 1)
    if allocated not in {8, 16, 32} or not stored - 1 <= highest < allocated:
        raise ReadError("bit-depth", f"{stored} of {allocated} bits up to bit {highest}; expected 8, 16 or 32 bits")


def _check_image_type(kinds: Set[str]) -> None:
    """Reject images by the values of ImageType or FrameType.

    Raises:
        ReadError: a value is that of a localizer or a screen capture.
    """
    if "LOCALIZER" in kinds:
        raise ReadError("localizer", "a localizer, not a diagnostic series")
    if kinds & _SCREEN_TYPES:
        raise ReadError("screen-save", "a screen capture")


def _find_quality_codes(header: DicomHeader, is_lossy: bool) -> tuple[str, ...]:
    """List the codes of accepted irregularities."""
    codes = {code for code, keyword, value in _QUALITY_RULES if value in map(str.upper, header.texts(keyword))}
    if is_lossy:
        codes.add("lossy")
    if "Secondary Capture" in UID(header.text("SOPClassUID")).name:
        codes.add("secondary-capture")
    if header.raw.get("OverlayRows"):
        codes.add("overlay-left-out")
    if header.raw.get("PixelPaddingValue"):
        codes.add("padded")
    return tuple(sorted(codes))


def _read_xray_spacing(header: DicomHeader) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Read row and column spacing in mm, with quality codes.

    An X-ray can be used without a spacing, so an invalid one, such as 0 or a text, counts as missing.
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        with suppress(ReadError):
            if values := header.numbers(keyword):
                return check_pixel_spacing(values), (() if keyword == "PixelSpacing" else ("detector-spacing",))
    return (1.0, 1.0), ("no-spacing",)


def _find_pixel_damage(path: Path, scan_result: HeaderScan, count: int) -> ReadError | None:
    """Compare the length of the pixels with the header.

    Returns:
        The error of a file whose pixels are missing, truncated or too long; None if they are complete.

    Raises:
        ReadError: the header specifies an impossible or too large image, or one that is compressed too much.
    """
    header = scan_result.header
    size = (header.integer("Rows"), header.integer("Columns"), count)
    expected_bytes = check_size(size, header.integer("BitsAllocated", 16) // 8)
    if scan_result.length == UNDEFINED or scan_result.syntax == DeflatedExplicitVRLittleEndian:
        check_compression(math.prod(size), expected_bytes, path.stat().st_size)
    if scan_result.start is None or scan_result.length == 0:
        return ReadError("no-pixels", "the file contains no pixels")
    if scan_result.length == UNDEFINED:
        with path.open("rb") as file:
            if scan_result.syntax != DeflatedExplicitVRLittleEndian and not has_all_fragments(
                file, scan_result.start, scan_result.size
            ):
                return ReadError("truncated", "the compressed pixels end early")
        return None
    available_bytes = min(scan_result.length, scan_result.size - scan_result.start)
    if available_bytes < expected_bytes:
        return ReadError("truncated", f"{available_bytes} bytes of pixels; the header specifies {expected_bytes}")
    if scan_result.length > expected_bytes + expected_bytes % 2 and not _is_padding(path, scan_result, size):
        return ReadError(
            "length-mismatch", f"{scan_result.length} bytes of pixels; the header specifies {expected_bytes}"
        )
    if not _has_valid_tail(path, scan_result):
        return ReadError("length-mismatch", "bytes that are no DICOM element follow the pixels")
    return None


def _count_excess_bytes(scan_result: HeaderScan, count: int) -> int:
    """Count the bytes of the pixel data after the last pixel, except one byte that makes its length even."""
    header = scan_result.header
    size = (header.integer("Rows"), header.integer("Columns"), count)
    expected_bytes = check_size(size, header.integer("BitsAllocated", 16) // 8)
    if scan_result.length == UNDEFINED:
        return 0
    return max(0, scan_result.length - expected_bytes - expected_bytes % 2)


def _is_padding(path: Path, scan_result: HeaderScan, size: tuple[int, int, int]) -> bool:
    """Whether the excess bytes of the pixel data are padding and not the sign of another shape.

    With wrong rows or columns, the excess would be a multiple of a column or a row. Padding is shorter than both, or
    consists of up to `_BLOCK_BYTES` zeros.
    """
    rows, columns, count = size
    excess = _count_excess_bytes(scan_result, count)
    line_bytes = [n * scan_result.header.integer("BitsAllocated", 16) // 8 for n in (rows, columns)]
    if excess < min(line_bytes):
        return True
    if excess > _BLOCK_BYTES or any(excess % length == 0 for length in line_bytes):
        return False
    if scan_result.syntax == DeflatedExplicitVRLittleEndian:
        return False
    with path.open("rb") as file:
        file.seek((scan_result.start or 0) + scan_result.length - excess)
        return not any(file.read(excess))


def _has_valid_tail(path: Path, scan_result: HeaderScan) -> bool:
    """Whether the file ends after the pixels, or an element of a higher group or padding to a block follows.

    Bytes inserted into the pixels shift all later pixels, and the last ones follow the pixel data as a tail.
    """
    end = (scan_result.start or 0) + scan_result.length
    if end >= scan_result.size or scan_result.syntax == DeflatedExplicitVRLittleEndian:
        return True
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read(_BLOCK_BYTES)
    group = int.from_bytes(tail[:2], "big" if scan_result.syntax == ExplicitVRBigEndian else "little")
    if any(tail):
        return len(tail) >= 8 and group >= _PIXEL_GROUP
    return scan_result.size % _BLOCK_BYTES == 0 and scan_result.size - end < _BLOCK_BYTES
