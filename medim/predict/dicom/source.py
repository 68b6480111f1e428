"""Headers of the source image, with the attributes that DICOM output copies from them."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pydicom.valuerep import validate_value

from medim.data.readers import ReadError
from medim.data.readers.dicom.frames import FUNCTIONAL_GROUPS
from medim.data.readers.dicom.reader import SlicePlan
from medim.data.readers.dicom.values import silence_pydicom
from medim.types import Array

log = logging.getLogger(__name__)

UTF_8 = "ISO_IR 192"
MAX_INFLATED_BYTES = 1 << 30  # maximum size of a deflated file after inflating
_META_OFFSET = 144  # size of preamble, prefix and the element with the length of the meta information
TYPE_2 = (  # Type 2 attributes: required, may be empty
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
    "StudyID", "ReferringPhysicianName",
)  # fmt: skip
COPIED_KEYWORDS = frozenset((  # the only patient and study attributes in a DICOM output
    *TYPE_2, "IssuerOfPatientID", "PatientAge", "StudyInstanceUID", "StudyDescription", "PatientIdentityRemoved",
    "DeidentificationMethod", "DeidentificationMethodCodeSequence",
))  # fmt: skip
_COPIED_GROUPS = {0x0010, 0x0012, 0x0032, 0x0038, 0x0040}  # patient, trial, request, visit, procedure
_COPIED_FROM_STUDY = (  # attributes of the group 0008 that highdicom copies with the study, or as equipment
    "OperatorsName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord",
    "PhysiciansOfRecordIdentificationSequence", "PhysiciansReadingStudyIdentificationSequence",
    "ConsultingPhysicianName", "ConsultingPhysicianIdentificationSequence", "RequestingService",
    "ReferringPhysicianIdentificationSequence", "ReferencedStudySequence", "ReferencedPatientSequence",
    "ProcedureCodeSequence", "ReasonForPerformedProcedureCodeSequence", "AdmittingDiagnosesDescription",
    "AdmittingDiagnosesCodeSequence", "IssuerOfAccessionNumberSequence", "InstitutionName", "InstitutionAddress",
    "InstitutionalDepartmentName", "InstitutionCodeSequence", "StationName",
)  # fmt: skip
_CHECKABLE_VRS = {
    "AE",
    "AS",
    "CS",
    "DA",
    "DT",
    "LO",
    "LT",
    "PN",
    "SH",
    "ST",
    "TM",
}  # value representations of the patient and study attributes
_POSITION_TAGS = {tag_for_keyword(name) for name in ("ImagePositionPatient", *FUNCTIONAL_GROUPS)}
_REQUIRED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@dataclass(frozen=True)
class DicomSource:
    """Source image of a DICOM output.

    Attributes:
        datasets: headers of the files in the order of the slices; the first has all Type 2 attributes, in Unicode.
        plan: positions of the slices.
    """

    datasets: tuple[Dataset, ...]
    plan: SlicePlan

    @property
    def first_dataset(self) -> Dataset:
        """Header from which patient and study attributes are copied."""
        return self.datasets[0]

    @property
    def is_multi_frame(self) -> bool:
        """Whether the positions of the slices are in functional groups."""
        return self.plan.affine is not None and any(name in self.first_dataset for name in FUNCTIONAL_GROUPS)

    def frames(self, native: Array) -> Array:
        """Order a label map as the slices of the source.

        Args:
            native: (columns, rows, slices) on the native grid, or (rows, columns).

        Returns:
            (slices, rows, columns).
        """
        return np.ascontiguousarray(native[None] if native.ndim == 2 else native.transpose(2, 1, 0))

    def list_slices(self) -> list[tuple[Dataset, int]]:
        """List the header and the frame number (from 0) of each slice."""
        headers = dict(zip(self.plan.files, self.datasets, strict=True))
        return [(headers[path], number) for path, number in self.plan.slices]

    def find_functional_group(self, header: Dataset, number: int) -> Dataset:
        """Return the functional groups of a frame, those that all frames share included."""
        group = Dataset()
        for name in FUNCTIONAL_GROUPS:
            items = header.get(name) or []
            if items:
                group.update(items[number if name.startswith("PerFrame") else 0])
        return group


def read_dicom_source(plan: SlicePlan) -> DicomSource:
    """Read the headers of an image.

    Raises:
        ReadError: a header cannot be read, is too large, or lacks attributes that DICOM output must refer to.
    """
    with suppress_warnings():
        try:
            for path in plan.files:
                _check_inflated_size(path)
            datasets = tuple(pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in plan.files)
            for dataset in datasets:
                _delete_other_attributes(dataset)
            _with_type2_attributes(datasets[0])
        except ReadError:
            raise
        except Exception as error:  # pydicom does not document its parsing exceptions
            raise ReadError("unreadable", f"the DICOM header is invalid ({type(error).__name__})") from error
        for dataset in datasets:
            _check_references(dataset, in_space=plan.affine is not None)
    source = DicomSource(datasets, plan)
    if not source.is_multi_frame and len(plan.slices) > len(datasets):
        raise ReadError(
            "no-reference", "the slices are in one image (a mosaic), so that an output cannot refer to each of them"
        )
    return source


def _check_inflated_size(path: Path) -> None:
    """Limit the inflated size of a deflated file, because pydicom inflates the whole file to read its header.

    Raises:
        ReadError: the inflated file is too large.
    """
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflate, budget = zlib.decompressobj(-zlib.MAX_WBITS), MAX_INFLATED_BYTES
    with path.open("rb") as file:
        file.seek(_META_OFFSET + meta.FileMetaInformationGroupLength)
        while budget > 0 and (chunk := file.read(1 << 16)):
            budget -= len(inflate.decompress(chunk, budget))
    if budget <= 0:
        raise ReadError("too-large", f"the deflated file is larger than {MAX_INFLATED_BYTES >> 30} GiB when inflated")


def _check_references(dataset: Dataset, *, in_space: bool) -> None:
    """Check that a header contains all attributes that DICOM output refers to.

    Raises:
        ReadError: an attribute is missing.
    """
    missing_keywords = [
        keyword
        for keyword in (*_REQUIRED_UIDS, *(["FrameOfReferenceUID"] if in_space else []))
        if not dataset.get(keyword)
    ]
    if in_space and not dataset.keys() & _POSITION_TAGS:
        missing_keywords.append("slice position")
    if missing_keywords:
        raise ReadError(
            "no-reference", f"the header lacks {', '.join(missing_keywords)}, which a DICOM output must refer to"
        )


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress warnings of pydicom and highdicom, because they contain header values that can identify patients."""
    logger = logging.getLogger("highdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with silence_pydicom():
            yield
    finally:
        logger.setLevel(level)


def _delete_other_attributes(dataset: Dataset) -> None:
    """Delete patient and study attributes that a DICOM output does not copy, so that highdicom cannot copy them."""
    for tag in list(dataset.keys()):
        keyword = keyword_for_tag(tag)
        if (tag.group in _COPIED_GROUPS or keyword in _COPIED_FROM_STUDY) and keyword not in COPIED_KEYWORDS:
            del dataset[tag]


def _with_type2_attributes(dataset: Dataset) -> None:
    """Add missing Type 2 attributes as empty, delete values that violate their VR, and convert text to UTF-8."""
    dataset.decode()
    dataset.walk(_convert_to_unicode)
    dataset.SpecificCharacterSet = UTF_8
    for element in list(dataset):
        if element.keyword and element.VR in _CHECKABLE_VRS and not _is_valid_element(element):
            log.warning("%s of the source violates the DICOM standard and is omitted from the output", element.keyword)
            del dataset[element.tag]
    for keyword in TYPE_2:
        if dataset.get(keyword) is None:
            setattr(dataset, keyword, "")


def _convert_to_unicode(dataset: Dataset, element: pydicom.DataElement) -> None:
    """Convert a person name to text, without its original bytes in another character set."""
    if element.VR == "PN" and element.value:
        is_multivalue = isinstance(element.value, pydicom.multival.MultiValue)
        element.value = [str(name) for name in element.value] if is_multivalue else str(element.value)


def _is_valid_element(element: pydicom.DataElement) -> bool:
    """Whether a value conforms to its VR; for the sex, to the values that DICOM defines."""
    if element.keyword == "PatientSex":
        return element.value in {None, "", "M", "F", "O"}
    is_multivalue = isinstance(element.value, pydicom.multival.MultiValue)
    try:
        for value in element.value if is_multivalue else [element.value]:
            validate_value(element.VR, str(value or ""), pydicom.config.RAISE)
    except ValueError:
        return False
    return True
