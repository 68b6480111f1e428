"""DICOM Segmentation on the frames of the source series."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import highdicom
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medim.package.label_codes import LabelCode
from medim.predict.dicom.equipment import SEGMENTATION_SERIES, Equipment, build_modifiers, to_coded_concept
from medim.predict.dicom.source import DicomSource, suppress_warnings
from medim.predict.dicom.uids import create_uid
from medim.types import Array


def build_segmentation(
    frames: Array, source: DicomSource, equipment: Equipment, *, labelmap: bool = False
) -> highdicom.seg.Segmentation:
    """Build a DICOM Segmentation from a label map.

    Each frame refers to its source frame. Empty frames are omitted, except in an empty mask, because a DICOM image
    has at least one frame. Patient and study attributes are copied from the source.

    Args:
        frames: (frames, rows, columns) uint8 labels in the order of the source frames; 0 is background.
        source: source image of the mask.
        equipment: package that made the mask; its labels have codes.
        labelmap: write one label map, an SOP class of DICOM 2024; otherwise BINARY, which all viewers support.
    """
    kind = SegmentationTypeValues.LABELMAP if labelmap else SegmentationTypeValues.BINARY
    with suppress_warnings():
        seg_dataset = highdicom.seg.Segmentation(
            source_images=_with_slice_thickness(source),
            pixel_array=frames,
            segmentation_type=kind,
            segment_descriptions=[_describe_segment(label, equipment) for label in equipment.contract.labels],
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=bool(frames.any()),
            content_label="AI_SEGMENTATION",
            content_description=equipment.contract.not_for[:64],
            **equipment.series_attributes(SEGMENTATION_SERIES),
        )
    if source.plan.affine is None:  # Type 2C: required for an image without patient coordinates, may be empty
        seg_dataset.PatientOrientation = source.first_dataset.get("PatientOrientation") or ""
    return seg_dataset


def read_segmentation(path: Path) -> highdicom.seg.Segmentation:
    """Read a DICOM Segmentation from a file."""
    with suppress_warnings():
        return highdicom.seg.segread(path)


def read_frame_labels(dataset: highdicom.seg.Segmentation, source: DicomSource) -> Array:
    """Read the labels of a segmentation for each frame of its source.

    Returns:
        (frames, rows, columns) uint8.

    Raises:
        ValueError: the segmentation does not refer to these frames.
    """
    group = dataset.PerFrameFunctionalGroupsSequence[0]
    if "ReferencedFrameNumber" in group.DerivationImageSequence[0].SourceImageSequence[0]:
        numbers = list(range(1, int(source.first_dataset.NumberOfFrames) + 1))
        read_labels = partial(dataset.get_pixels_by_source_frame, source.first_dataset.SOPInstanceUID, numbers)
    else:
        read_labels = partial(dataset.get_pixels_by_source_instance, [d.SOPInstanceUID for d in source.datasets])
    labels = read_labels(combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True)
    return np.asarray(labels, np.uint8)


def _with_slice_thickness(source: DicomSource) -> tuple[Dataset, ...]:
    """Add the slice thickness, which a segmentation requires, to source headers without it."""
    for dataset in source.datasets:
        if source.plan.affine is not None and "PixelSpacing" in dataset and not dataset.get("SliceThickness"):
            dataset.SliceThickness = round(float(np.linalg.norm(source.plan.affine[:3, 2])), 6)
    return source.datasets


def _describe_segment(label: LabelCode, equipment: Equipment) -> SegmentDescription:
    assert label.category is not None  # checked by `read_label_codes`
    assert label.type is not None
    description = SegmentDescription(
        segment_number=label.index,
        segment_label=label.name,
        segmented_property_category=to_coded_concept(label.category),
        segmented_property_type=to_coded_concept(label.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=equipment.algorithm_sequence(),
        tracking_uid=create_uid(),
        tracking_id=label.name,
        display_color=highdicom.color.CIELabColor.from_rgb(*label.colour) if label.colour else None,
    )
    if modifier_codes := build_modifiers(label):
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifier_codes
    return description
