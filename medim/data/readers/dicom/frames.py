"""Where the frames of a DICOM file lie in the patient, and what tells frames at one place apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.values import Header
from medim.data.readers.inspection import Frame
from medim.privacy import pseudonym

KEYS = {  # what the first table of `stacks_of` asks for, in this order; an attribute may lie in a functional group
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
_TEXTS = {"image type", "complex component"}
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_POSITION = ("ImagePositionPatient", "PlanePositionSequence/ImagePositionPatient")
_ORIENTATION = ("ImageOrientationPatient", "PlaneOrientationSequence/ImageOrientationPatient")
_SPACING = ("PixelSpacing", "PixelMeasuresSequence/PixelSpacing")
_GAP = ("SpacingBetweenSlices", "PixelMeasuresSequence/SpacingBetweenSlices")
_THICKNESS = ("SliceThickness", "PixelMeasuresSequence/SliceThickness")
_PLACES = (_POSITION, _ORIENTATION, _SPACING, _GAP, _THICKNESS, *KEYS.values())
ATTRIBUTES = frozenset(part for paths in _PLACES for path in paths for part in path.split("/")) | {*_GROUPS}
_AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_OF_A_SLICE = tuple(sorted({path for paths in _PLACES for path in paths if "/" not in path} - {_POSITION[0]}))


def frames_in(header: Header, count: int) -> tuple[Frame, ...]:
    """Where the frames lie; none where the header does not say.

    A multi-frame object without functional groups (a stripped one) gets frames in stored order, `SpacingBetweenSlices`
    apart, at no place in the patient that is known.

    Raises:
        ReadError: the header contradicts itself, or a number is none.
    """
    groups, shared = header.items(_GROUPS[1]), header.items(_GROUPS[0])
    if groups and len(groups) != count:
        raise ReadError("bad-geometry", f"{len(groups)} functional groups for {count} frames")
    if not groups and not shared and count > 1 and not header.raw.get(_POSITION[0]):
        step = abs((_numbers([header], _GAP) or _numbers([header], _THICKNESS) or (1.0,))[0]) or 1.0
        size, keys = _size(header), ("",) * len(KEYS)
        spacing = lengths(header.numbers("PixelSpacing") or (1.0, 1.0))
        return tuple(Frame((0.0, 0.0, step * k), _AXIAL, spacing, size, step, keys) for k in range(count))
    if groups:
        frames = [_frame([group, *shared, header]) for group in groups]
    else:
        frames = [_frame([*shared, header]) if shared else _slice(header)] * count
    return tuple(frame for frame in frames if frame is not None) if None not in frames else ()


def lengths(values: Sequence[float]) -> tuple[float, float]:
    """Two positive lengths in mm.

    Raises:
        ReadError: otherwise.
    """
    pair = tuple(values)
    if len(pair) != 2 or not all(map(math.isfinite, pair)) or min(pair) <= 0:
        raise ReadError("bad-geometry", f"pixel spacing {pair}; expected two lengths above 0 mm")
    return pair


def _slice(header: Header) -> Frame | None:
    """The one frame of a plain slice; what its neighbours say alike is worked out once."""
    raw = header.raw
    said = _plane(tuple(raw.get(keyword) for keyword in (*_OF_A_SLICE, "Rows", "Columns")), header.order)
    position = header.numbers(_POSITION[0])
    return Frame(_triple(position), *said) if said is not None and position else None


@lru_cache(maxsize=256)
def _plane(
    raws: tuple[bytes | None, ...], order: str
) -> tuple[tuple[float, ...], tuple[float, float], tuple[int, int], float, tuple[str, ...]] | None:
    raw = dict(zip((*_OF_A_SLICE, "Rows", "Columns"), raws, strict=True))
    frame = _frame([Header({**raw, _POSITION[0]: b"0\\0\\0"}, order)])
    return None if frame is None else (frame.orientation, frame.spacing, frame.size, frame.thickness, frame.keys)


def _frame(levels: Sequence[Header]) -> Frame | None:
    """A frame by the levels that may describe it, the nearest one first."""
    position, orientation, spacing = (_numbers(levels, paths) for paths in (_POSITION, _ORIENTATION, _SPACING))
    if not position or not orientation or not spacing:
        return None
    if len(orientation) != 6 or not all(map(math.isfinite, orientation)):
        raise ReadError("bad-geometry", "the orientation is not made of 6 finite numbers")
    gap = (_numbers(levels, _GAP) or (0.0,))[0] or (_numbers(levels, _THICKNESS) or (0.0,))[0]
    thickness = abs(gap) if math.isfinite(gap) and gap else 1.0
    keys = tuple(_key(levels, name) for name in KEYS)
    return Frame(_triple(position), orientation, lengths(spacing), _size(levels[-1]), thickness, keys)


def _size(header: Header) -> tuple[int, int]:
    return header.whole("Rows"), header.whole("Columns")


def _triple(position: tuple[float, ...]) -> tuple[float, ...]:
    if len(position) != 3 or not all(map(math.isfinite, position)):
        raise ReadError("bad-geometry", "the position is not made of 3 finite numbers")
    return position


def _key(levels: Sequence[Header], name: str) -> str:
    """What a frame says of a key, in a form that rounding does not change and that holds no free text."""
    if name in _TEXTS:
        texts = next((found for found in (_texts(levels, path) for path in KEYS[name]) if found), [])
        return pseudonym("\\".join(texts), prefix="k") if texts else ""
    return " ".join(f"{number:.4g}" for number in _numbers(levels, KEYS[name]))


def _numbers(levels: Sequence[Header], paths: Sequence[str]) -> tuple[float, ...]:
    for level in levels:
        for path in paths:
            *inside, keyword = path.split("/")
            for header in _inside(level, inside):
                if found := header.numbers(keyword):
                    return found
    return ()


def _texts(levels: Sequence[Header], path: str) -> list[str]:
    *inside, keyword = path.split("/")
    return next((found for level in levels for h in _inside(level, inside) if (found := h.texts(keyword))), [])


def _inside(header: Header, sequences: Sequence[str]) -> list[Header]:
    """The first items of sequences inside one another."""
    found = [header]
    for keyword in sequences:
        found = [item for header in found for item in header.items(keyword)[:1]]
    return found
