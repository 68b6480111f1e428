"""A mask as DICOM Segmentation, on the frames of the series it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medim.package.label_codes import LabelCode
from medim.predict.dicom.equipment import SEGMENTATION_SERIES, Equipment, build_modifiers, to_coded_concept
from medim.predict.dicom.source import DicomSource, suppress_warnings
from medim.types import Array


def build_segmentation(
    frames: Array, source: DicomSource, equipment: Equipment, *, labelmap: bool = False
) -> highdicom.seg.Segmentation:
    """Make a segmentation.

    Every frame refers to the frame of the source that it lies on, and empty frames are left out (a mask without any
    voxel keeps them: DICOM has no image without a frame). Patient and study are copied from the source.

    Args:
        frames: (frames, rows, columns) uint8 labels in the order of the source's frames; 0 is background.
        source: what it is a mask of.
        equipment: what made it; its labels have codes.
        labelmap: one image of label numbers, the SOP class of DICOM 2024; else BINARY, which every viewer knows.
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
    if source.plan.affine is None:  # Type 2C: an image that lies nowhere says how it is turned, if that is known
        seg_dataset.PatientOrientation = source.first_dataset.get("PatientOrientation") or ""
    return seg_dataset


def read_segmentation(path: Path) -> highdicom.seg.Segmentation:
    """A segmentation from a file."""
    with suppress_warnings():
        return highdicom.seg.segread(path)


def read_frame_labels(dataset: highdicom.seg.Segmentation, source: DicomSource) -> Array:
    """The labels that a segmentation holds for each frame of a source: (frames, rows, columns) uint8.

    Raises:
        ValueError: it does not refer to these frames.
    """
    options: dict[str, Any] = {
        "combine_segments": True,
        "ignore_spatial_locations": True,
        "assert_missing_frames_are_empty": True,
    }
    group = dataset.PerFrameFunctionalGroupsSequence[0]
    if "ReferencedFrameNumber" in group.DerivationImageSequence[0].SourceImageSequence[0]:
        numbers = list(range(1, int(source.first_dataset.NumberOfFrames) + 1))
        labels = dataset.get_pixels_by_source_frame(source.first_dataset.SOPInstanceUID, numbers, **options)
    else:
        labels = dataset.get_pixels_by_source_instance([image.SOPInstanceUID for image in source.datasets], **options)
    return np.asarray(labels, np.uint8)


def _with_slice_thickness(source: DicomSource) -> tuple[Dataset, ...]:
    """The source's headers, each with the thickness that a segment's frames must state."""
    for dataset in source.datasets:
        if source.plan.affine is not None and "PixelSpacing" in dataset and not dataset.get("SliceThickness"):
            dataset.SliceThickness = round(float(np.linalg.norm(source.plan.affine[:3, 2])), 6)
    return source.datasets


def _describe_segment(label: LabelCode, equipment: Equipment) -> SegmentDescription:
    assert label.category is not None  # `read_labels` saw to it
    assert label.type is not None
    description = SegmentDescription(
        segment_number=label.index,
        segment_label=label.name,
        segmented_property_category=to_coded_concept(label.category),
        segmented_property_type=to_coded_concept(label.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=equipment.algorithm_sequence(),
        tracking_uid=highdicom.UID(),
        tracking_id=label.name,
        display_color=highdicom.color.CIELabColor.from_rgb(*label.colour) if label.colour else None,
    )
    if modifier_codes := build_modifiers(label):
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifier_codes
    return description
