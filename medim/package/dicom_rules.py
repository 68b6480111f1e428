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
from medim.data.readers.dicom.header_scan import scan
from medim.data.readers.dicom.reader import Plan
from medim.data.readers.dicom.values import Header
from medim.package.schema import Strict, read_strict
from medim.types import Array, Modality

CodeString = Annotated[str, Field(pattern=r"^[A-Z0-9_][A-Z0-9 _]{0,15}$")]  # DICOM's CS
Region = Annotated[str, Field(pattern=r"^(SCT|SRT):[A-Za-z0-9-]{1,16}$")]  # a code of AnatomicRegionSequence
Acquired = Literal["MR", "CR", "DX", "RG"]
Direction = Literal["sagittal", "coronal", "axial"]  # along x, y, z lies the normal of the slices
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
_WANTED = frozenset(
    ("SpecificCharacterSet", "SOPClassUID", "Modality", "BodyPartExamined", "AnatomicRegionSequence", "CodeValue",
     "CodingSchemeDesignator", "ImageType", "FrameOfReferenceUID", "StudyInstanceUID")
)  # fmt: skip


class Count(Strict):
    """A whole number from `minimum` to `maximum`."""

    minimum: PositiveInt = 1
    maximum: PositiveInt | None = None


class Length(Strict):
    """Millimetres from `minimum` to `maximum`."""

    minimum: PositiveFloat | None = None
    maximum: PositiveFloat | None = None


class DicomIn(Strict):
    """Rules for the DICOM images of a package; an empty list takes anything."""

    modality: tuple[Acquired, ...] = ()
    sop_class: tuple[SopClass, ...] = ()
    body_part: tuple[CodeString | Region, ...] = Field(
        default=(), description="values of BodyPartExamined, and codes of AnatomicRegionSequence for files without it"
    )
    image_type: tuple[CodeString, ...] = Field(default=(), description="values of ImageType that must all be there")
    image_type_never: tuple[CodeString, ...] = Field(
        default=(), description="values of ImageType that must not be there"
    )
    orientation: tuple[Direction, ...] = Field(default=(), description="of the slices: the plane that is nearest")
    slices: Count = Count()
    pixel_spacing: Length = Length()
    slice_spacing: Length = Length()

    def check(self, plan: Plan) -> None:
        """Hold an image's headers against the rules.

        Raises:
            ReadError: a rule is broken; `reason` is the rule's own code.
        """
        headers = [scan(path, _WANTED).header for path in plan.files]
        self._check_headers(headers)
        _check_one("FrameOfReferenceUID", headers)
        _check_one("StudyInstanceUID", headers)
        if plan.affine is not None:
            self._check_stack(plan.affine, len(plan.slices))

    def _check_headers(self, headers: Sequence[Header]) -> None:
        names = {str(getattr(pydicom.uid, name)): name for name in get_args(SopClass)}
        said = {header.text("Modality") for header in headers}
        _one_of("wrong-modality", "DICOM modality", said, self.modality)
        said = {names.get(header.text("SOPClassUID"), "another SOP class") for header in headers}
        _one_of("wrong-sop-class", "SOP class", said, self.sop_class)
        if self.body_part:
            said = set().union(*map(_body_parts, headers))
            if not said or not all(map(_body_parts, headers)):
                wanted = ", ".join(self.body_part)
                raise ReadError("no-body-part", f"the header does not say the body part; expected {wanted}")
            _one_of("wrong-body-part", "body part", said, self.body_part)
        for header in headers:
            kinds = {kind.upper() for kind in header.texts("ImageType")}
            if missing := [kind for kind in self.image_type if kind not in kinds]:
                raise ReadError("wrong-image-type", f"an image type without {', '.join(missing)}")
            if never := [kind for kind in self.image_type_never if kind in kinds]:
                raise ReadError("wrong-image-type", f"an image of type {', '.join(never)}; not answered")

    def _check_stack(self, affine: Array, slices: int) -> None:
        normal = np.abs(np.cross(affine[:3, 0], affine[:3, 1]))
        plane = get_args(Direction)[int(normal.argmax())]
        _one_of("wrong-orientation", "orientation of the slices", {plane}, self.orientation)
        _in_range("wrong-slice-count", "slices", [slices], self.slices)
        spacing = [float(length) for length in np.linalg.norm(affine[:3, :3], axis=0)]
        _in_range("wrong-spacing", "mm between pixels", spacing[:2], self.pixel_spacing)
        if slices > 1:
            _in_range("wrong-spacing", "mm between slices", spacing[2:], self.slice_spacing)


DEFAULTS: dict[Modality, DicomIn] = {
    "mri": DicomIn(
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
        slices=Count(minimum=2),  # one slice is no volume
    ),
    "xray": DicomIn(
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


def rules_of(modality: Modality, path: Path | None = None) -> DicomIn:
    """The rules of a modality, with those of a user's JSON file in place of the defaults of the same name.

    Raises:
        UserError: the file is missing, or holds an unknown rule or value.
    """
    defaults = DEFAULTS[modality]
    if path is None:
        return defaults
    given = read_strict(path, DicomIn, "rules for DICOM images (docs/how-to/answer-in-dicom.md)")
    return defaults.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def _body_parts(header: Header) -> set[str]:
    """What a header says of the body part: BodyPartExamined, else the codes of the anatomic region."""
    if said := header.text("BodyPartExamined"):
        return {said.upper()}
    regions = header.items("AnatomicRegionSequence")
    codes = ((item.text("CodingSchemeDesignator"), item.text("CodeValue")) for item in regions)
    return {f"{scheme}:{value}" for scheme, value in codes if value}


def _one_of(code: str, what: str, said: Iterable[str], wanted: Sequence[str]) -> None:
    """Refuse what is not wanted. What the header says is not repeated: it might be anything, also a name."""
    if wanted and not set(said) <= set(wanted):
        raise ReadError(code, f"another {what} than {' or '.join(wanted)}")


def _in_range(code: str, what: str, values: Sequence[float], wanted: Count | Length) -> None:
    low, high = wanted.minimum or 0.0, wanted.maximum or np.inf
    if not all(low <= value <= high for value in values):
        shown = " x ".join(f"{value:.4g}" for value in values)
        raise ReadError(code, f"{shown} {what}; expected {low:g} to {high:g}")


def _check_one(keyword: str, headers: Sequence[Header]) -> None:
    """One study and one frame of reference for all slices, or a result would stand nowhere."""
    if len({header.text(keyword) for header in headers}) > 1:
        raise ReadError("mixed-references", f"the slices differ in {keyword}; expected one")
