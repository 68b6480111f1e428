"""Which DICOM images a package answers: rules of a closed vocabulary, each with its own code where it is broken.

What is no even stack, no grey image, burned in, a localizer and so on is refused by the readers before (see
`medim.data.readers.dicom.series`). Descriptions, which anybody may type, decide nothing: in one public set
StudyDescription holds the finding.
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
RegionCode = Annotated[str, Field(pattern=r"^(SCT|SRT):[A-Za-z0-9-]{1,16}$")]  # a code of AnatomicRegionSequence
DicomModality = Literal["MR", "CR", "DX", "RG"]
SlicePlane = Literal["sagittal", "coronal", "axial"]  # along x, y, z lies the normal of the slices
SopClass = Literal[
    "MRImageStorage",
    "EnhancedMRImageStorage",
    "LegacyConvertedEnhancedMRImageStorage",
    "ComputedRadiographyImageStorage",
    "DigitalXRayImageStorageForPresentation",
    "DigitalXRayImageStorageForProcessing",
    "SecondaryCaptureImageStorage",
    "MultiFrameGrayscaleByteSecondaryCaptureImageStorage",
    "MultiFrameGrayscaleWordSecondaryCaptureImageStorage",
]
_TAGS = frozenset(
    ("SpecificCharacterSet", "SOPClassUID", "Modality", "BodyPartExamined", "AnatomicRegionSequence", "CodeValue",
     "CodingSchemeDesignator", "ImageType", "FrameOfReferenceUID", "StudyInstanceUID")
)  # fmt: skip


class CountRange(StrictModel):
    """A whole number from `minimum` to `maximum`."""

    minimum: PositiveInt = 1
    maximum: PositiveInt | None = None


class LengthRange(StrictModel):
    """Millimetres from `minimum` to `maximum`."""

    minimum: PositiveFloat | None = None
    maximum: PositiveFloat | None = None


class DicomRules(StrictModel):
    """Rules for the DICOM images of a package; an empty list takes anything."""

    modality: tuple[DicomModality, ...] = ()
    sop_class: tuple[SopClass, ...] = ()
    body_part: tuple[CodeString | RegionCode, ...] = Field(
        default=(), description="values of BodyPartExamined, and codes of AnatomicRegionSequence for files without it"
    )
    image_type: tuple[CodeString, ...] = Field(default=(), description="values of ImageType that must all be there")
    image_type_never: tuple[CodeString, ...] = Field(
        default=(), description="values of ImageType that must not be there"
    )
    orientation: tuple[SlicePlane, ...] = Field(default=(), description="of the slices: the plane that is nearest")
    slices: CountRange = CountRange()
    pixel_spacing: LengthRange = LengthRange()
    slice_spacing: LengthRange = LengthRange()

    def check_plan(self, plan: SlicePlan) -> None:
        """Hold an image's headers against the rules.

        Raises:
            ReadError: a rule is broken; `reason` is the rule's own code.
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
                raise ReadError("no-body-part", f"the header does not say the body part; expected {allowed}")
            _check_allowed("wrong-body-part", "body part", values, self.body_part)
        for header in headers:
            kinds = {kind.upper() for kind in header.texts("ImageType")}
            if missing_kinds := [kind for kind in self.image_type if kind not in kinds]:
                raise ReadError("wrong-image-type", f"an image type without {', '.join(missing_kinds)}")
            if forbidden_kinds := [kind for kind in self.image_type_never if kind in kinds]:
                raise ReadError("wrong-image-type", f"an image of type {', '.join(forbidden_kinds)}; not answered")

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
            "SecondaryCaptureImageStorage",  # what some workstations write their registered volumes as
        ),
        image_type_never=(  # PS3.3 C.8.3.1.1.1: images of something else than anatomy
            "PROJECTION IMAGE",
            "PHASE MAP",
            "DIFFUSION MAP",
            "VELOCITY MAP",
            "T1 MAP",
            "T2 MAP",
            "DENSITY MAP",
        ),
        slices=CountRange(minimum=2),  # one slice is no volume
    ),
    "xray": DicomRules(
        modality=("CR", "DX", "RG"),
        sop_class=(
            "ComputedRadiographyImageStorage",
            "DigitalXRayImageStorageForPresentation",  # For Processing looks otherwise
            "SecondaryCaptureImageStorage",  # what whole archives of X-rays are stored as
            "MultiFrameGrayscaleByteSecondaryCaptureImageStorage",
            "MultiFrameGrayscaleWordSecondaryCaptureImageStorage",
        ),
    ),
}


def load_dicom_rules(modality: Modality, path: Path | None = None) -> DicomRules:
    """The rules of a modality, with those of a user's JSON file in place of the defaults of the same name.

    Raises:
        UserError: the file is missing, or holds an unknown rule or value.
    """
    defaults = DEFAULT_RULES[modality]
    if path is None:
        return defaults
    overrides = read_strict_json(path, DicomRules, "rules for DICOM images (docs/how-to/answer-in-dicom.md)")
    return defaults.model_copy(update={name: getattr(overrides, name) for name in overrides.model_fields_set})


def _read_body_parts(header: DicomHeader) -> set[str]:
    """What a header says of the body part: BodyPartExamined, else the codes of the anatomic region."""
    if body_part := header.text("BodyPartExamined"):
        return {body_part.upper()}
    regions = header.items("AnatomicRegionSequence")
    codes = ((item.text("CodingSchemeDesignator"), item.text("CodeValue")) for item in regions)
    return {f"{scheme}:{value}" for scheme, value in codes if value}


def _check_allowed(code: str, attribute: str, values: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse what is not wanted. What the header says is not repeated: it might be anything, also a name."""
    if allowed and not set(values) <= set(allowed):
        raise ReadError(code, f"another {attribute} than {' or '.join(allowed)}")


def _check_range(code: str, quantity: str, values: Sequence[float], allowed: CountRange | LengthRange) -> None:
    low, high = allowed.minimum or 0.0, allowed.maximum or np.inf
    if not all(low <= value <= high for value in values):
        text = " x ".join(f"{value:.4g}" for value in values)
        raise ReadError(code, f"{text} {quantity}; expected {low:g} to {high:g}")


def _check_single_value(keyword: str, headers: Sequence[DicomHeader]) -> None:
    """One study and one frame of reference for all slices, or a result would stand nowhere."""
    if len({header.text(keyword) for header in headers}) > 1:
        raise ReadError("mixed-references", f"the slices differ in {keyword}; expected one")
