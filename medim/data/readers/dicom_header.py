"""One DICOM file by its header: what it is, whose it is, and where its frames lie. No pixels are touched."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from medim.data.identity import Scrubber, pseudonym, tokens
from medim.data.readers.base import ReadError, check_start
from medim.data.readers.sights import Frame, Instance, Refused, Sight
from medim.types import Modality

MODALITIES: dict[str, Modality] = {"MR": "mri", "CR": "xray", "DX": "xray", "RG": "xray"}
_NAMES = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson",
    "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "NameOfPhysiciansReadingStudy",
    "RequestingPhysician", "PhysiciansOfRecord", "ConsultingPhysicianName",
)  # fmt: skip
_IDENTITIES = (
    "PatientID", "IssuerOfPatientID", "OtherPatientIDs", "PatientBirthDate", "PatientAddress",
    "PatientTelephoneNumbers", "MedicalRecordLocator", "MilitaryRank", "PatientComments", "AccessionNumber", "StudyID",
    "AdmissionID",
    "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber",
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate", "AcquisitionDateTime",
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "RequestedProcedureID",
    "PerformedProcedureStepID",
)  # fmt: skip
_FACTS = (
    "SOPClassUID", "Modality", "ImageType", "BurnedInAnnotation", "Manufacturer", "ManufacturerModelName",
    "MagneticFieldStrength", "ScanningSequence", "EchoPulseSequence", "AcquisitionContrast", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "PixelSpacing",
    "ImagerPixelSpacing", "NominalScannedPixelSpacing", "ImageOrientationPatient", "ImagePositionPatient",
    "SpacingBetweenSlices", "SliceThickness", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
_TAGS: list[Any] = [*_NAMES, *_IDENTITIES, *_FACTS]
_SCREEN = {"SCREEN SAVE", "SCREENSAVE", "SCREEN"}


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of pydicom's: they quote header values, and so patients."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


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
    identities: frozenset[int] = frozenset()
    try:
        check_start(path)
        with quiet():
            dataset, pixel_start = _parse(path)
            identities = tokens(_identities(dataset))
            _judge(dataset)
            _check_pixels(path, dataset, pixel_start)
            return Sight(instance=_instance(dataset, identities))
    except ReadError as error:
        reason, detail = error.reason, error.detail
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, NotImplementedError) as error:
        reason, detail = "unreadable", f"the header holds a value that cannot be read ({type(error).__name__})"
    return Sight(refused=(Refused(reason=reason, detail=detail, identities=identities),))


def _parse(path: Path) -> tuple[pydicom.FileDataset, int]:
    """The header and the place where the pixels start."""
    try:
        with path.open("rb") as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
            return dataset, file.tell()
    except Exception as error:  # pydicom raises whatever its parsing met
        raise ReadError("unreadable", f"not a whole DICOM header ({type(error).__name__})") from error


def _judge(dataset: pydicom.Dataset) -> None:
    """Refuse what is no grey MR or X-ray image.

    Raises:
        ReadError: in that case.
    """
    sop_class = UID(str(dataset.get("SOPClassUID") or ""))
    name = sop_class.name if sop_class and not sop_class.is_private else "of no public class"
    if (sop_class and "Image Storage" not in name) or not dataset.get("Rows") or not dataset.get("Columns"):
        raise ReadError("not-an-image", f"a DICOM object that is not an image ({name})")
    modality = str(dataset.get("Modality") or "")
    if modality not in MODALITIES:
        raise ReadError(
            "wrong-modality",
            f"DICOM modality {modality if len(modality) == 2 else 'unknown'}; expected one of {', '.join(MODALITIES)}",
        )
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or "MONOCHROME" not in str(
        dataset.get("PhotometricInterpretation")
    ):
        raise ReadError("colour", "a colour image; expected MONOCHROME1 or MONOCHROME2")
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES":
        raise ReadError("burned-in", "the header says that annotation is burned into the pixels")
    kinds = {str(value).upper() for value in _many(dataset.get("ImageType"))}
    if "LOCALIZER" in kinds:
        raise ReadError("localizer", "a localizer, not a series to look at")
    if "MOSAIC" in kinds:
        raise ReadError("mosaic", "a mosaic of slices in one picture")
    if kinds & _SCREEN:
        raise ReadError("screen-save", "a picture of a screen")


def _check_pixels(path: Path, dataset: pydicom.FileDataset, start: int) -> None:
    """Refuse a file whose pixels are missing, cut short or too many.

    Raises:
        ReadError: in that case.
    """
    syntax = UID(str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or "1.2.840.10008.1.2"))
    if syntax == DeflatedExplicitVRLittleEndian:
        return
    left = path.stat().st_size - start
    if left < 8:
        raise ReadError("no-pixels", "the file ends before its pixels")
    frames = int(dataset.get("NumberOfFrames") or 1)
    expected = int(dataset.Rows) * int(dataset.Columns) * frames * int(dataset.get("BitsAllocated") or 16) // 8
    if syntax.is_compressed:
        return
    if left < expected:
        raise ReadError("truncated", f"{left} bytes of pixels; the header announces {expected}")
    with path.open("rb") as file:
        file.seek(start)
        tag = file.read(12)
    order: Literal["big", "little"] = "little" if syntax.is_little_endian else "big"
    length = int.from_bytes(tag[8:] if tag[4:6] in (b"OB", b"OW") else tag[4:8], order)
    if length > expected + expected % 2:
        raise ReadError("length-mismatch", f"{length} bytes of pixels; the header announces {expected}")


def _instance(dataset: pydicom.Dataset, identities: frozenset[int]) -> Instance:
    """What the index needs of a header."""
    patient, issuer = str(dataset.get("PatientID") or "").strip(), str(dataset.get("IssuerOfPatientID") or "").strip()
    kind = MODALITIES[str(dataset.Modality)]
    count = int(dataset.get("NumberOfFrames") or 1)
    spacing = next(
        (
            dataset.get(name)
            for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
            if dataset.get(name)
        ),
        (1.0, 1.0),
    )
    scanner = " ".join(
        str(dataset.get(name) or "").strip() for name in ("Manufacturer", "ManufacturerModelName")
    ).strip()
    field = dataset.get("MagneticFieldStrength")
    sequence = next(
        (
            "-".join(map(str, _many(dataset.get(n))))
            for n in ("ScanningSequence", "AcquisitionContrast", "EchoPulseSequence")
            if dataset.get(n)
        ),
        None,
    )
    scrub = Scrubber(identities)
    return Instance(
        kind=kind,
        sop=_hidden(dataset, "SOPInstanceUID"),
        series=_hidden(dataset, "SeriesInstanceUID"),
        study=_hidden(dataset, "StudyInstanceUID"),
        subject=pseudonym(f"{issuer}\x1f{patient}" if issuer else patient) if patient else None,
        aliases=(pseudonym(patient),) if patient and issuer else (),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        count=count,
        frames=_frames(dataset, count) if kind == "mri" else (),
        spacing=_pair(spacing),
        sequence=scrub.text(sequence) if kind == "mri" else None,
        scanner=scrub.text(scanner or None),
        field_strength=float(field) if field is not None and np.isfinite(float(field)) else None,
        identities=identities,
    )


def _hidden(dataset: pydicom.Dataset, keyword: str) -> str:
    """The pseudonym of a UID; empty where there is none."""
    value = str(dataset.get(keyword) or "").strip()
    return pseudonym(value) if value else ""


def _pair(values: Sequence[Any]) -> tuple[float, float]:
    """Two positive lengths.

    Raises:
        ReadError: otherwise.
    """
    pair = tuple(float(value) for value in values)
    if len(pair) != 2 or not all(np.isfinite(pair)) or min(pair) <= 0:
        raise ReadError("bad-geometry", f"pixel spacing {pair}; expected two lengths above 0 mm")
    return pair


def _frames(dataset: pydicom.Dataset, count: int) -> tuple[Frame, ...]:
    """Where the frames lie.

    A multi-frame object without functional groups (a stripped one) gets frames in stored order, `SpacingBetweenSlices`
    apart, at no place in the patient that is known; a single frame without a place gets none.
    """
    shared = _many(dataset.get("SharedFunctionalGroupsSequence"))
    groups = _many(dataset.get("PerFrameFunctionalGroupsSequence"))
    if groups and len(groups) != count:
        raise ReadError("bad-geometry", f"{len(groups)} functional groups for {count} frames")
    if not groups and not shared and count > 1 and dataset.get("ImagePositionPatient") is None:
        step = float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 1.0)
        spacing = _pair(dataset.get("PixelSpacing") or (1.0, 1.0))
        return tuple(Frame((0.0, 0.0, step * k), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), spacing, step) for k in range(count))
    frames = []
    for group in groups or [dataset] * count:
        levels = [group, *shared]
        measures = ("PixelMeasuresSequence",)
        position = _value(levels, ("PlanePositionSequence",), "ImagePositionPatient")
        orientation = _value(levels, ("PlaneOrientationSequence",), "ImageOrientationPatient")
        spacing = _value(levels, measures, "PixelSpacing")
        if position is None or orientation is None or spacing is None:
            return ()
        thickness = (
            _value(levels, measures, "SpacingBetweenSlices") or _value(levels, measures, "SliceThickness") or 1.0
        )
        place, direction = tuple(map(float, position)), tuple(map(float, orientation))
        if len(place) != 3 or len(direction) != 6 or not np.isfinite([*place, *direction]).all():
            raise ReadError("bad-geometry", "position or orientation is not made of 3 and 6 finite numbers")
        frames.append(Frame(place, direction, _pair(spacing), abs(float(thickness)) or 1.0))
    return tuple(frames)


def _value(levels: Sequence[pydicom.Dataset], inside: tuple[str, ...], keyword: str) -> Any:
    """An attribute of the first level that has it, directly or in one of the named sequences."""
    for level in levels:
        for holder in [level, *(item for name in inside for item in _many(level.get(name)))]:
            value = holder.get(keyword)
            if value is not None and value != "":
                return value
    return None


def _many(value: Any) -> list[Any]:
    """No value, one, or several, as a list."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, pydicom.multival.MultiValue | pydicom.sequence.Sequence | list) else [value]


def _identities(dataset: pydicom.Dataset) -> frozenset[str]:
    """Every value that tells who, when or where; names also by their parts and the other way round."""
    found = {str(value) for name in _IDENTITIES for value in _many(dataset.get(name))}
    found = {value for value in found if len(value) >= 3}  # a StudyID of "1" is nobody's
    found |= {str(dataset.get(name) or "") for name in ("PatientID", "AccessionNumber")}
    for value in (value for name in _NAMES for value in _many(dataset.get(name))):
        for name in str(value).split("="):
            parts = [part for part in name.replace("^", " ").split() if part]
            found |= {name, *parts, "".join(reversed(parts)), *(a + b for a in parts for b in parts if a != b)}
    return frozenset(value.strip() for value in found) - {""}
