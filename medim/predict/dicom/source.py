"""What an answer is written on: the source's own headers, as far as the standard lets an answer repeat them."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pydicom.valuerep import validate_value

from medim.data.readers import ReadError
from medim.data.readers.dicom.reader import SlicePlan
from medim.data.readers.dicom.values import silence_pydicom
from medim.types import Array

log = logging.getLogger(__name__)

UTF_8 = "ISO_IR 192"
MAX_INFLATED_BYTES = 1 << 30  # bytes of a deflated file
_META_OFFSET = 144  # preamble, prefix and the element that says how long the meta information is
TYPE_2 = (  # must be there, and may be empty
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
    "StudyID", "ReferringPhysicianName",
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
}  # what patient and study are described in
_POSITION_TAGS = {tag_for_keyword(name) for name in ("ImagePositionPatient", "PerFrameFunctionalGroupsSequence")}
_REQUIRED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@dataclass(frozen=True)
class DicomSource:
    """The image that an answer is of.

    Attributes:
        datasets: headers of its files in the order of the slices, the first one with Type 2 attributes, in Unicode.
        plan: where the slices stand.
    """

    datasets: tuple[Dataset, ...]
    plan: SlicePlan

    @property
    def first_dataset(self) -> Dataset:
        """Whose patient and study attributes an answer repeats."""
        return self.datasets[0]

    def frames(self, native: Array) -> Array:
        """Slices in the order of the source's frames.

        Args:
            native: (columns, rows, slices) on the file's own grid, or (rows, columns).

        Returns:
            (frames, rows, columns); zeros where a frame of the source is in no slice.
        """
        if native.ndim == 2:
            return np.ascontiguousarray(native[None])
        slices = native.transpose(2, 1, 0)
        if len(self.datasets) > 1:
            return np.ascontiguousarray(slices)
        out = np.zeros((int(self.first_dataset.get("NumberOfFrames") or 1), *slices.shape[1:]), native.dtype)
        out[[number for _, number in self.plan.slices]] = slices
        return out


def read_dicom_source(plan: SlicePlan) -> DicomSource:
    """Read the headers of an image.

    Raises:
        ReadError: the source lacks what an answer must refer to.
    """
    with suppress_warnings():
        try:
            for path in plan.files:
                _check_inflated_size(path)
            datasets = tuple(pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in plan.files)
            _with_type2_attributes(datasets[0])
        except ReadError:
            raise
        except Exception as error:  # pydicom raises whatever its parsing met
            raise ReadError("unreadable", f"not a whole DICOM header ({type(error).__name__})") from error
        for dataset in datasets:
            _check_references(dataset, in_space=plan.affine is not None)
    return DicomSource(datasets, plan)


def _check_inflated_size(path: Path) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates all of it for its header.

    Raises:
        ReadError: in that case.
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
        raise ReadError("too-large", f"a deflated header and image of more than {MAX_INFLATED_BYTES >> 30} GiB")


def _check_references(dataset: Dataset, *, in_space: bool) -> None:
    """Refuse a header without what an answer refers to.

    Raises:
        ReadError: in that case.
    """
    missing_keywords = [
        keyword
        for keyword in (*_REQUIRED_UIDS, *(["FrameOfReferenceUID"] if in_space else []))
        if not dataset.get(keyword)
    ]
    if in_space and not dataset.keys() & _POSITION_TAGS:
        missing_keywords.append("place")
    if missing_keywords:
        raise ReadError("no-reference", f"no {', '.join(missing_keywords)}, to which an answer refers")


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """No warnings of pydicom's or highdicom's: they quote header values, and so patients."""
    logger = logging.getLogger("highdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with silence_pydicom():
            yield
    finally:
        logger.setLevel(level)


def _with_type2_attributes(dataset: Dataset) -> None:
    """Type 2 attributes empty where they are missing, what breaks its VR left out, text in UTF-8."""
    dataset.decode()
    dataset.walk(_convert_to_unicode)
    dataset.SpecificCharacterSet = UTF_8
    for element in list(dataset):
        if element.keyword and element.VR in _CHECKABLE_VRS and not _is_valid_element(element):
            log.warning("%s of the source breaks DICOM's rules; the answer goes without it", element.keyword)
            del dataset[element.tag]
    for keyword in TYPE_2:
        if dataset.get(keyword) is None:
            setattr(dataset, keyword, "")


def _convert_to_unicode(dataset: Dataset, element: pydicom.DataElement) -> None:
    """A name without the bytes it was read from, which are of another character set."""
    if element.VR == "PN" and element.value:
        is_multivalue = isinstance(element.value, pydicom.multival.MultiValue)
        element.value = [str(name) for name in element.value] if is_multivalue else str(element.value)


def _is_valid_element(element: pydicom.DataElement) -> bool:
    """Whether a value is what its VR, and for the sex DICOM's list, allows."""
    if element.keyword == "PatientSex":
        return element.value in {None, "", "M", "F", "O"}
    is_multivalue = isinstance(element.value, pydicom.multival.MultiValue)
    try:
        for value in element.value if is_multivalue else [element.value]:
            validate_value(element.VR, str(value or ""), pydicom.config.RAISE)
    except ValueError:
        return False
    return True
