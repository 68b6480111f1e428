"""Planes of DICOM frames in the patient, and attributes that distinguish frames at the same position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.values import DicomHeader
from medim.data.readers.inspection import FramePlane
from medim.privacy import make_pseudonym

FRAME_KEYS = {  # attributes that distinguish frames, in order of preference; all may be in a functional group
    "echo number": ("EchoNumbers",),
    "echo time": ("EchoTime", "MREchoSequence/EffectiveEchoTime"),
    "acquisition": ("AcquisitionNumber", "FrameContentSequence/FrameAcquisitionNumber"),
    "time point": ("TemporalPositionIdentifier", "FrameContentSequence/TemporalPositionIndex"),
    "b-value": ("DiffusionBValue", "MRDiffusionSequence/DiffusionBValue"),
    "diffusion direction": (
        "DiffusionGradientOrientation",
        "MRDiffusionSequence/DiffusionGradientDirectionSequence/DiffusionGradientOrientation",
    ),
    "image type": ("MRImageFrameTypeSequence/FrameType", "ImageType"),
    "complex component": ("ComplexImageComponent", "MRImageFrameTypeSequence/ComplexImageComponent"),
    "trigger time": ("TriggerTime", "CardiacSynchronizationSequence/NominalCardiacTriggerDelayTime"),
    "inversion time": ("InversionTime", "MRModifierSequence/InversionTimes"),
    "flip angle": ("FlipAngle", "MRTimingAndRelatedParametersSequence/FlipAngle"),
}
_TEXT_KEYS = {"image type", "complex component"}
FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_POSITION = ("ImagePositionPatient", "PlanePositionSequence/ImagePositionPatient")
_ORIENTATION = ("ImageOrientationPatient", "PlaneOrientationSequence/ImageOrientationPatient")
_SPACING = ("PixelSpacing", "PixelMeasuresSequence/PixelSpacing")
_GAP = ("SpacingBetweenSlices", "PixelMeasuresSequence/SpacingBetweenSlices")
_THICKNESS = ("SliceThickness", "PixelMeasuresSequence/SliceThickness")
_FRAME_PATHS = (_POSITION, _ORIENTATION, _SPACING, _GAP, _THICKNESS, *FRAME_KEYS.values())
ATTRIBUTES = frozenset(part for paths in _FRAME_PATHS for path in paths for part in path.split("/")) | {
    *FUNCTIONAL_GROUPS
}
_AXIAL_ORIENTATION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_SLICE_KEYWORDS = tuple(sorted({path for paths in _FRAME_PATHS for path in paths if "/" not in path} - {_POSITION[0]}))


def read_frame_planes(header: DicomHeader, count: int) -> tuple[FramePlane, ...]:
    """Read the planes of the frames; an empty tuple if the header does not specify them.

    Frames of a multi-frame object without functional groups (removed, for example, by anonymisation) are placed in
    stored order, `SpacingBetweenSlices` apart, with an unknown position in the patient.

    Raises:
        ReadError: the header is inconsistent or contains an invalid number.
    """
    groups, shared_groups = header.items(FUNCTIONAL_GROUPS[1]), header.items(FUNCTIONAL_GROUPS[0])
    if groups and len(groups) != count:
        raise ReadError("bad-geometry", f"{len(groups)} functional groups for {count} frames")
    if not groups and not shared_groups and count > 1 and not header.raw.get(_POSITION[0]):
        step = abs((_find_numbers([header], _GAP) or _find_numbers([header], _THICKNESS) or (1.0,))[0]) or 1.0
        size, keys = _read_image_size(header), ("",) * len(FRAME_KEYS)
        spacing = check_pixel_spacing(header.numbers("PixelSpacing") or (1.0, 1.0))
        return tuple(
            FramePlane(
                position=(0.0, 0.0, step * k),
                orientation=_AXIAL_ORIENTATION,
                spacing=spacing,
                size=size,
                thickness=step,
                keys=keys,
            )
            for k in range(count)
        )
    if groups:
        frames = [read_plane([group, *shared_groups, header]) for group in groups]
    else:
        frames = [read_plane([*shared_groups, header]) if shared_groups else _read_slice_plane(header)] * count
    return tuple(frame for frame in frames if frame is not None) if None not in frames else ()


def read_frame_types(header: DicomHeader) -> list[list[str]]:
    """Read FrameType of each frame of a multi-frame object with functional groups; an empty list if none has one."""
    shared_groups = header.items(FUNCTIONAL_GROUPS[0])
    groups = header.items(FUNCTIONAL_GROUPS[1])
    levels = [[group, *shared_groups] for group in groups] or ([shared_groups] if shared_groups else [])
    types = [_find_texts(level, FRAME_KEYS["image type"][:1]) for level in levels]
    return types if any(types) else []


def check_pixel_spacing(values: Sequence[float]) -> tuple[float, float]:
    """Check that the pixel spacing consists of two positive lengths in mm.

    Raises:
        ReadError: it does not.
    """
    pair = tuple(values)
    if len(pair) != 2 or not all(map(math.isfinite, pair)) or min(pair) <= 0:
        raise ReadError("bad-geometry", f"pixel spacing {pair}; expected two lengths above 0 mm")
    return pair


def _read_slice_plane(header: DicomHeader) -> FramePlane | None:
    """Read the plane of a single-frame slice; values that the slices of a series share are parsed once."""
    raw = header.raw
    plane = _read_shared_plane(
        tuple(raw.get(keyword) for keyword in (*_SLICE_KEYWORDS, "Rows", "Columns")), header.byte_order
    )
    position = header.numbers(_POSITION[0])
    return replace(plane, position=_check_position(position)) if plane is not None and position else None


@lru_cache(maxsize=256)
def _read_shared_plane(raw_values: tuple[bytes | None, ...], byte_order: str) -> FramePlane | None:
    """Read the plane of a slice from the values that the slices of a series share, with the position (0, 0, 0)."""
    raw = dict(zip((*_SLICE_KEYWORDS, "Rows", "Columns"), raw_values, strict=True))
    return read_plane([DicomHeader({**raw, _POSITION[0]: b"0\\0\\0"}, byte_order)])


def read_plane(levels: Sequence[DicomHeader]) -> FramePlane | None:
    """Read the plane of a frame from the headers that may describe it, nearest first."""
    position, orientation, spacing = (_find_numbers(levels, paths) for paths in (_POSITION, _ORIENTATION, _SPACING))
    if not position or not orientation or not spacing:
        return None
    if len(orientation) != 6 or not all(map(math.isfinite, orientation)):
        raise ReadError("bad-geometry", "the orientation does not consist of 6 finite numbers")
    gap = (_find_numbers(levels, _GAP) or (0.0,))[0] or (_find_numbers(levels, _THICKNESS) or (0.0,))[0]
    thickness = abs(gap) if math.isfinite(gap) and gap else 1.0
    keys = tuple(_read_frame_key(levels, name) for name in FRAME_KEYS)
    return FramePlane(
        position=_check_position(position),
        orientation=orientation,
        spacing=check_pixel_spacing(spacing),
        size=_read_image_size(levels[-1]),
        thickness=thickness,
        keys=keys,
    )


def _read_image_size(header: DicomHeader) -> tuple[int, int]:
    return header.integer("Rows"), header.integer("Columns")


def _check_position(position: tuple[float, ...]) -> tuple[float, ...]:
    if len(position) != 3 or not all(map(math.isfinite, position)):
        raise ReadError("bad-geometry", "the position does not consist of 3 finite numbers")
    return position


def _read_frame_key(levels: Sequence[DicomHeader], name: str) -> str:
    """Read the value of a key of a frame, in a form that tolerates rounding and contains no free text."""
    if name in _TEXT_KEYS:
        texts = _find_texts(levels, FRAME_KEYS[name])
        return make_pseudonym("\\".join(texts), prefix="k") if texts else ""
    return " ".join(f"{number:.4g}" for number in _find_numbers(levels, FRAME_KEYS[name]))


def _find_numbers(levels: Sequence[DicomHeader], paths: Sequence[str]) -> tuple[float, ...]:
    return next((numbers for h, keyword in _open_paths(levels, paths) if (numbers := h.numbers(keyword))), ())


def _find_texts(levels: Sequence[DicomHeader], paths: Sequence[str]) -> list[str]:
    return next((texts for h, keyword in _open_paths(levels, paths) if (texts := h.texts(keyword))), [])


def _open_paths(levels: Sequence[DicomHeader], paths: Sequence[str]) -> Iterator[tuple[DicomHeader, str]]:
    """Yield the headers that may contain an attribute, with its keyword.

    All paths of a level come before the next level, because the value of the object may summarise those of its frames
    (MIXED).
    """
    for level in levels:
        for path in paths:
            *sequences, keyword = path.split("/")
            for header in _open_sequences(level, sequences):
                yield header, keyword


def _open_sequences(header: DicomHeader, sequences: Sequence[str]) -> list[DicomHeader]:
    """Return the first items of nested sequences."""
    headers = [header]
    for keyword in sequences:
        headers = [item for header in headers for item in header.items(keyword)[:1]]
    return headers
