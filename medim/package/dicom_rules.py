"""Rules for the DICOM images that a package accepts. Each rule has its own rejection code.

Readers have already rejected uneven stacks, colour images, burned-in annotations, localizers and similar images (see
`medim.data.readers.dicom.series`). Free-text descriptions are not used: in one public data set StudyDescription
contains the finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import pydicom.uid
from pydantic import Field, PositiveFloat, PositiveInt

from medim.data.readers import ReadError
from medim.data.readers.dicom.header_scan import scan_header
from medim.data.readers.dicom.reader import SlicePlan
from medim.data.readers.dicom.values import DicomHeader
from medim.package.schema import StrictModel, read_strict_json
from medim.types import Array, Modality

CodeString = Annotated[str, Field(pattern=r"^[A-Z0-9_][A-Z0-9 _]{0,15}$")]  # DICOM's CS
RegionCode = Annotated[str, Field(pattern=r"^(SCT|SRT):[A-Za-z0-9-]{1,16}$")]  # code in AnatomicRegionSequence
DicomModality = Literal["MR", "CR", "DX", "RG", "MG", "IO", "PX", "RF", "XA"]
SlicePlane = Literal["sagittal", "coronal", "axial"]  # slice normal along x, y, z
SopClass = Literal[
    "MRImageStorage",
    "EnhancedMRImageStorage",
    "LegacyConvertedEnhancedMRImageStorage",
    "ComputedRadiographyImageStorage",
    "DigitalXRayImageStorageForPresentation",
    "DigitalXRayImageStorageForProcessing",
    "DigitalMammographyXRayImageStorageForPresentation",
    "DigitalMammographyXRayImageStorageForProcessing",
    "DigitalIntraOralXRayImageStorageForPresentation",
    "DigitalIntraOralXRayImageStorageForProcessing",
    "XRayRadiofluoroscopicImageStorage",
    "XRayAngiographicImageStorage",
    "SecondaryCaptureImageStorage",
    "MultiFrameGrayscaleByteSecondaryCaptureImageStorage",
    "MultiFrameGrayscaleWordSecondaryCaptureImageStorage",
]
_TAGS = frozenset(
    ("SpecificCharacterSet", "SOPClassUID", "Modality", "BodyPartExamined", "AnatomicRegionSequence", "CodeValue",
     "CodingSchemeDesignator", "ImageType", "FrameOfReferenceUID", "StudyInstanceUID")
)  # fmt: skip


class CountRange(StrictModel):
    """Allowed range of an integer."""

    minimum: PositiveInt = 1
    maximum: PositiveInt | None = None


class LengthRange(StrictModel):
    """Allowed range of a length in mm."""

    minimum: PositiveFloat | None = None
    maximum: PositiveFloat | None = None


class DicomRules(StrictModel):
    """Rules for the DICOM images of a package; an empty list allows any value."""

    modality: tuple[DicomModality, ...] = ()
    sop_class: tuple[SopClass, ...] = ()
    body_part: tuple[CodeString | RegionCode, ...] = Field(
        default=(),
        description="allowed values of BodyPartExamined, and codes of AnatomicRegionSequence for files without it",
    )
    image_type: tuple[CodeString, ...] = Field(default=(), description="required values of ImageType")
    image_type_never: tuple[CodeString, ...] = Field(default=(), description="forbidden values of ImageType")
    orientation: tuple[SlicePlane, ...] = Field(
        default=(), description="allowed slice planes; oblique slices count as the nearest plane"
    )
    slices: CountRange = CountRange()
    pixel_spacing: LengthRange = LengthRange()
    slice_spacing: LengthRange = LengthRange()

    def check_plan(self, plan: SlicePlan) -> None:
        """Check the headers of an image against the rules.

        Raises:
            ReadError: the image violates a rule; `reason` is the code of the rule.
        """
        headers = [scan_header(path, _TAGS).header for path in plan.files]
        self._check_headers(headers)
        _check_single_value("FrameOfReferenceUID", headers)
        _check_single_value("StudyInstanceUID", headers)
        if plan.affine is not None:
            self._check_stack(plan.affine, len(plan.slices))

    def _check_headers(self, headers: Sequence[DicomHeader]) -> None:
        names = {str(getattr(pydicom.uid, name)): name for name in get_args(SopClass)}
        values = {header.text("Modality") for header in headers}
        _check_allowed("wrong-modality", "DICOM modality", values, self.modality)
        values = {names.get(header.text("SOPClassUID"), "another SOP class") for header in headers}
        _check_allowed("wrong-sop-class", "SOP class", values, self.sop_class)
        if self.body_part:
            values = set().union(*map(_read_body_parts, headers))
            if not values or not all(map(_read_body_parts, headers)):
                allowed = ", ".join(self.body_part)
                raise ReadError("no-body-part", f"the header does not specify the body part; expected {allowed}")
            _check_allowed("wrong-body-part", "body part", values, self.body_part)
        for header in headers:
            kinds = {kind.upper() for kind in header.texts("ImageType")}
            if missing_kinds := [kind for kind in self.image_type if kind not in kinds]:
                raise ReadError("wrong-image-type", f"the image type lacks {', '.join(missing_kinds)}")
            if forbidden_kinds := [kind for kind in self.image_type_never if kind in kinds]:
                raise ReadError("wrong-image-type", f"images of type {', '.join(forbidden_kinds)} are not accepted")

    def _check_stack(self, affine: Array, slices: int) -> None:
        normal = np.abs(np.cross(affine[:3, 0], affine[:3, 1]))
        plane = get_args(SlicePlane)[int(normal.argmax())]
        _check_allowed("wrong-orientation", "orientation of the slices", {plane}, self.orientation)
        _check_range("wrong-slice-count", "slices", [slices], self.slices)
        spacing = [float(length) for length in np.linalg.norm(affine[:3, :3], axis=0)]
        _check_range("wrong-spacing", "mm between pixels", spacing[:2], self.pixel_spacing)
        if slices > 1:
            _check_range("wrong-spacing", "mm between slices", spacing[2:], self.slice_spacing)


DEFAULT_RULES: dict[Modality, DicomRules] = {
    "mri": DicomRules(
        modality=("MR",),
        sop_class=(
            "MRImageStorage",
            "EnhancedMRImageStorage",
            "LegacyConvertedEnhancedMRImageStorage",
            "SecondaryCaptureImageStorage",  # written by some workstations for registered volumes
        ),
        image_type_never=(  # PS3.3 C.8.3.1.1.1: images that do not show anatomy
            "PROJECTION IMAGE",
            "PHASE MAP",
            "DIFFUSION MAP",
            "VELOCITY MAP",
            "T1 MAP",
            "T2 MAP",
            "DENSITY MAP",
        ),
        slices=CountRange(minimum=2),  # a single slice is not a volume
    ),
    "xray": DicomRules(
        modality=("CR", "DX", "RG"),  # mammograms, dental films and fluoroscopy only by rules of the package
        sop_class=(
            "ComputedRadiographyImageStorage",
            "DigitalXRayImageStorageForPresentation",  # images "For Processing" have another appearance
            "SecondaryCaptureImageStorage",  # storage class of entire X-ray archives
            "MultiFrameGrayscaleByteSecondaryCaptureImageStorage",
            "MultiFrameGrayscaleWordSecondaryCaptureImageStorage",
        ),
    ),
}


def load_dicom_rules(modality: Modality, path: Path | None = None) -> DicomRules:
    """Load the default rules of a modality; rules in a JSON file override the defaults of the same name.

    Raises:
        UserError: the file is missing, or contains an unknown rule or value.
    """
    defaults = DEFAULT_RULES[modality]
    if path is None:
        return defaults
    overrides = read_strict_json(path, DicomRules, "rules for DICOM images (docs/how-to/answer-in-dicom.md)")
    return defaults.model_copy(update={name: getattr(overrides, name) for name in overrides.model_fields_set})


def _read_body_parts(header: DicomHeader) -> set[str]:
    """Read the body part of a header: BodyPartExamined, otherwise the codes of the anatomic region."""
    if body_part := header.text("BodyPartExamined"):
        return {body_part.upper()}
    regions = header.items("AnatomicRegionSequence")
    codes = ((item.text("CodingSchemeDesignator"), item.text("CodeValue")) for item in regions)
    return {f"{scheme}:{value}" for scheme, value in codes if value}


def _check_allowed(code: str, attribute: str, values: Iterable[str], allowed: Sequence[str]) -> None:
    """Check header values against the allowed values.

    The error message does not contain the header values, because they could identify a patient.

    Raises:
        ReadError: a value is not allowed.
    """
    if allowed and not set(values) <= set(allowed):
        raise ReadError(code, f"the {attribute} is not {' or '.join(allowed)}")


def _check_range(code: str, quantity: str, values: Sequence[float], allowed: CountRange | LengthRange) -> None:
    low, high = allowed.minimum or 0.0, allowed.maximum or np.inf
    if not all(low <= value <= high for value in values):
        text = " x ".join(f"{value:.4g}" for value in values)
        raise ReadError(code, f"{text} {quantity}; expected {low:g} to {high:g}")


def _check_single_value(keyword: str, headers: Sequence[DicomHeader]) -> None:
    """Check that all slices have the same value, so that a result has a unique study and frame of reference."""
    if len({header.text(keyword) for header in headers}) > 1:
        raise ReadError("mixed-references", f"the slices differ in {keyword}; expected one")
