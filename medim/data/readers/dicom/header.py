"""One DICOM file by its header: what it is, whose it is, and where its frames lie. No pixels are touched."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from medim.data.readers.base import ReadError, check_size, check_start
from medim.data.readers.dicom import identifiers as identities
from medim.data.readers.dicom.frames import ATTRIBUTES, frames_in, lengths
from medim.data.readers.dicom.header_scan import UNDEFINED, Scan, scan, whole_fragments
from medim.data.readers.dicom.values import Header, quiet
from medim.data.readers.inspection import Instance, Origin, Refused, Sight
from medim.privacy import Scrubber, pseudonym, site_key, tokens
from medim.types import Modality

MODALITIES: dict[str, Modality] = {"MR": "mri", "CR": "xray", "DX": "xray", "RG": "xray"}
_FACTS = (
    "SpecificCharacterSet", "SOPClassUID", "Modality", "ImageType", "BurnedInAnnotation", "Manufacturer",
    "ManufacturerModelName", "MagneticFieldStrength", "ScanningSequence", "EchoPulseSequence", "AcquisitionContrast",
    "PresentationIntentType", "LossyImageCompression", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelPaddingValue", "PixelSpacing",
    "ImagerPixelSpacing", "NominalScannedPixelSpacing", "OverlayRows",
)  # fmt: skip
_SHARED = tuple(sorted({*identities.NAMES, *identities.SHARED, *_FACTS}))
_WANTED = frozenset((*_SHARED, *identities.OWN, identities.OTHERS)) | ATTRIBUTES
_SCREEN = {"SCREEN SAVE", "SCREENSAVE", "SCREEN"}
_LOSSY = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}  # JPEG; of the others the header says it
_ODDITIES = (  # quality code, attribute, value that says it
    ("derived", "ImageType", "DERIVED"),
    ("lossy", "LossyImageCompression", "01"),
    ("inverted", "PhotometricInterpretation", "MONOCHROME1"),
    ("for-processing", "PresentationIntentType", "FOR PROCESSING"),
)


def looks_like_dicom(path: Path) -> bool:
    """Whether the first bytes are DICOM's, with or without the preamble, or the name says so."""
    if path.suffix.lower() in {".dcm", ".dicom", ".ima"}:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or start[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def read_header(path: Path) -> Sight:
    """Read and judge a header; the identities of the file are known even where it is refused."""
    known: frozenset[int] = frozenset()
    try:
        check_start(path)
        seen = scan(path, _WANTED)
        shared = tuple(map(seen.header.raw.get, _SHARED))
        own = tokens(identities.own_identities(seen.header))
        known = own | _identities(site_key(), shared, seen.header.order)
        origin = _origin(site_key(), shared, seen.header.order, seen.syntax in _LOSSY)
        count = max(seen.header.whole("NumberOfFrames", 1), 1)
        _check_pixels(path, seen, count)
        instance = Instance(
            sop=_hidden(seen.header, "SOPInstanceUID", digits=24),
            count=count,
            frames=frames_in(seen.header, count) if origin.kind == "mri" else (),
            origin=origin,
            own=tuple(own),
        )
    except ReadError as error:
        return Sight(refused=(Refused(reason=error.reason, detail=error.detail, identities=known),))
    return Sight(instance=instance)


@lru_cache(maxsize=64)
def _identities(key: bytes, shared: tuple[bytes | None, ...], order: str) -> frozenset[int]:
    """Tokens of the identities that the files of a series share."""
    return tokens(identities.shared_identities(_shared_header(shared, order)))


@lru_cache(maxsize=64)
@quiet()
def _origin(key: bytes, shared: tuple[bytes | None, ...], order: str, lossy: bool) -> Origin:
    """What the files of a series say alike, worked out once.

    Raises:
        ReadError: what they say is of no grey MR or X-ray image.
    """
    header = _shared_header(shared, order)
    _judge(header)
    patient, issuer = header.text("PatientID"), header.text("IssuerOfPatientID")
    known = _identities(key, shared, order)
    kind = MODALITIES[header.text("Modality")]
    scanner = " ".join(filter(None, map(header.text, ("Manufacturer", "ManufacturerModelName"))))
    field = next((tesla for tesla in header.numbers("MagneticFieldStrength") if 0 < tesla < 100), None)
    kinds = (header.texts(name) for name in ("ScanningSequence", "AcquisitionContrast", "EchoPulseSequence"))
    sequence = "-".join(next(filter(None, kinds), []))
    scrub = Scrubber(known)
    quality, spacing = _quality(header, lossy), (1.0, 1.0)
    if kind == "xray":
        spacing, odd = _xray_spacing(header)
        quality += odd
    return Origin(
        kind=kind,
        series=_hidden(header, "SeriesInstanceUID"),
        study=_hidden(header, "StudyInstanceUID"),
        subject=pseudonym(f"{issuer}\x1f{patient}" if issuer else patient) if patient else None,
        aliases=(pseudonym(patient),) if patient and issuer else (),
        size=(header.whole("Rows"), header.whole("Columns")),
        spacing=spacing,
        sequence=scrub.text(sequence or None) if kind == "mri" else None,
        scanner=scrub.text(scanner or None),
        field_strength=field,
        quality=quality,
        identities=known,
    )


def _shared_header(shared: tuple[bytes | None, ...], order: str) -> Header:
    return Header({keyword: raw for keyword, raw in zip(_SHARED, shared, strict=True) if raw is not None}, order)


def _hidden(header: Header, keyword: str, *, digits: int = 12) -> str:
    """The pseudonym of a UID; empty where there is none."""
    value = header.text(keyword)
    return pseudonym(value, digits=digits) if value else ""


def _judge(header: Header) -> None:
    """Refuse what is no grey MR or X-ray image; descriptions, which anybody may type, are never asked.

    Raises:
        ReadError: in that case.
    """
    sop_class = UID(header.text("SOPClassUID"))
    public = sop_class.name if sop_class.name != sop_class and not sop_class.is_private else ""
    if (sop_class and "Image Storage" not in public) or not (header.whole("Rows") and header.whole("Columns")):
        raise ReadError("not-an-image", f"a DICOM object that is not an image ({public or 'of no public class'})")
    modality = header.text("Modality")
    if modality not in MODALITIES:
        said = modality if len(modality) == 2 else "unknown"
        raise ReadError("wrong-modality", f"DICOM modality {said}; expected one of {', '.join(MODALITIES)}")
    photometric = header.text("PhotometricInterpretation")
    if header.whole("SamplesPerPixel", 1) != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise ReadError("colour", "a colour image; expected MONOCHROME1 or MONOCHROME2")
    if header.text("BurnedInAnnotation").upper() == "YES":
        raise ReadError("burned-in", "the header says that annotation is burned into the pixels")
    kinds = {value.upper() for value in header.texts("ImageType")}
    if "LOCALIZER" in kinds:
        raise ReadError("localizer", "a localizer, not a series to look at")
    if "MOSAIC" in kinds:
        raise ReadError("mosaic", "a mosaic of slices in one picture")
    if kinds & _SCREEN:
        raise ReadError("screen-save", "a picture of a screen")
    allocated, stored = header.whole("BitsAllocated", 16), header.whole("BitsStored", 0)
    highest = header.whole("HighBit", stored - 1)
    if allocated not in {8, 16, 32} or not stored - 1 <= highest < allocated:
        raise ReadError("bit-depth", f"{stored} of {allocated} bits up to bit {highest}; expected 8, 16 or 32 bits")


def _quality(header: Header, lossy: bool) -> tuple[str, ...]:
    """Codes of what is odd about the files and accepted."""
    said = {code for code, keyword, value in _ODDITIES if value in map(str.upper, header.texts(keyword))}
    if lossy:
        said.add("lossy")
    if "Secondary Capture" in UID(header.text("SOPClassUID")).name:
        said.add("secondary-capture")
    if header.raw.get("OverlayRows"):
        said.add("overlay-left-out")
    if header.raw.get("PixelPaddingValue"):
        said.add("padded")
    return tuple(sorted(said))


def _xray_spacing(header: Header) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Row and column spacing in mm, and what is odd about it."""
    if header.numbers("PixelSpacing"):
        return lengths(header.numbers("PixelSpacing")), ()
    for keyword in ("ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        if header.numbers(keyword):
            return lengths(header.numbers(keyword)), ("detector-spacing",)
    return (1.0, 1.0), ("no-spacing",)


def _check_pixels(path: Path, seen: Scan, count: int) -> None:
    """Refuse a file whose pixels are missing, cut short or too many.

    Raises:
        ReadError: in that case.
    """
    header = seen.header
    size = (header.whole("Rows"), header.whole("Columns"), count)
    announced = check_size(size, header.whole("BitsAllocated", 16) // 8)
    if seen.start is None or seen.length == 0:
        raise ReadError("no-pixels", "the file holds no pixels")
    if seen.length == UNDEFINED:
        with path.open("rb") as file:
            if seen.syntax != DeflatedExplicitVRLittleEndian and not whole_fragments(file, seen.start, seen.size):
                raise ReadError("truncated", "the compressed pixels end early")
        return
    left = min(seen.length, seen.size - seen.start)
    if left < announced:
        raise ReadError("truncated", f"{left} bytes of pixels; the header announces {announced}")
    if seen.length > announced + announced % 2:
        raise ReadError("length-mismatch", f"{seen.length} bytes of pixels; the header announces {announced}")
