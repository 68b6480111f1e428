"""DICOM Segmentation on the frames of the source series.

highdicom expects pixel measures and orientation in the shared functional groups of a multi-frame source, and a mask of
all its frames. Scanners may write both frame by frame, and an object may contain several volumes. Therefore highdicom
gets a header of one object whose frames are the slices of the image, in their order, and the references to its frames
are replaced by those to the frames of the source.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medim.data.mask_classes import is_identity
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
        frames: (slices, rows, columns) uint8 labels in the order of the slices of the source; 0 is background.
        source: source image of the mask.
        equipment: package that made the mask; its labels have codes.
        labelmap: write one label map, an SOP class of DICOM 2024; otherwise BINARY, which all viewers support.
    """
    kind = SegmentationTypeValues.LABELMAP if labelmap else SegmentationTypeValues.BINARY
    with suppress_warnings():
        seg_dataset = highdicom.seg.Segmentation(
            source_images=[_build_stack_header(source)] if source.is_multi_frame else _with_slice_thickness(source),
            pixel_array=frames,
            segmentation_type=kind,
            segment_descriptions=[_describe_segment(label, equipment) for label in equipment.contract.labels],
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=bool(frames.any()),
            content_label="AI_SEGMENTATION",
            content_description=equipment.contract.not_for[:64],
            **equipment.series_attributes(SEGMENTATION_SERIES),
        )
        if source.is_multi_frame:
            _refer_to_source_frames(seg_dataset, source)
            seg_dataset = highdicom.seg.Segmentation.from_dataset(seg_dataset, copy=False)
    if source.plan.affine is None:  # Type 2C: required for an image without patient coordinates, may be empty
        seg_dataset.PatientOrientation = source.first_dataset.get("PatientOrientation") or ""
    return seg_dataset


def read_segmentation(path: Path) -> highdicom.seg.Segmentation:
    """Read a DICOM Segmentation from a file."""
    with suppress_warnings():
        return highdicom.seg.segread(path)


def read_frame_labels(dataset: highdicom.seg.Segmentation, source: DicomSource) -> Array:
    """Read the labels of a segmentation for each slice of its source.

    Returns:
        (slices, rows, columns) uint8.

    Raises:
        ValueError: the segmentation does not refer to these frames.
    """
    options: dict[str, Any] = {
        "combine_segments": True,
        "ignore_spatial_locations": True,
        "assert_missing_frames_are_empty": True,
    }
    if not source.is_multi_frame:
        uids = [header.SOPInstanceUID for header in source.datasets]
        return np.asarray(dataset.get_pixels_by_source_instance(uids, **options), np.uint8)
    if len(source.datasets) == 1:
        numbers = [number + 1 for _, number in source.plan.slices]
        uid = source.first_dataset.SOPInstanceUID
        return np.asarray(dataset.get_pixels_by_source_frame(uid, numbers, **options), np.uint8)
    labels = [
        dataset.get_pixels_by_source_frame(header.SOPInstanceUID, [number + 1], **options)[0]
        for header, number in source.list_slices()
    ]
    return np.asarray(labels, np.uint8)


def _build_stack_header(source: DicomSource) -> Dataset:
    """Build the header of one multi-frame object whose frames are the slices of the source."""
    affine = source.plan.affine
    assert affine is not None  # only images with positions have functional groups
    gap = round(float(np.linalg.norm(affine[:3, 2])), 6)
    groups = [source.find_functional_group(header, number) for header, number in source.list_slices()]
    header, shared = source.first_dataset.copy(), Dataset()
    shared.PixelMeasuresSequence = deepcopy(groups[0]["PixelMeasuresSequence"].value)
    measures = shared.PixelMeasuresSequence[0]
    for keyword in ("SliceThickness", "SpacingBetweenSlices"):
        if not measures.get(keyword):
            setattr(measures, keyword, gap)
    shared.PlaneOrientationSequence = groups[0]["PlaneOrientationSequence"].value
    header.NumberOfFrames = len(groups)
    header.SharedFunctionalGroupsSequence = [shared]
    frames = [Dataset() for _ in groups]
    for frame, group in zip(frames, groups, strict=True):
        frame.PlanePositionSequence = group["PlanePositionSequence"].value
    header.PerFrameFunctionalGroupsSequence = frames
    return header


def _refer_to_source_frames(seg_dataset: Dataset, source: DicomSource) -> None:
    """Replace the references to the frames of `_build_stack_header` by those to the frames of the source."""
    slices = source.list_slices()
    images = {  # by identity, because highdicom uses one item for all segments of a slice
        id(image): image
        for group in seg_dataset.PerFrameFunctionalGroupsSequence
        for derivation in group.get("DerivationImageSequence", [])
        for image in derivation.SourceImageSequence
    }
    for image in images.values():
        header, number = slices[int(image.ReferencedFrameNumber) - 1]
        image.ReferencedSOPClassUID = header.SOPClassUID
        image.ReferencedSOPInstanceUID = header.SOPInstanceUID
        image.ReferencedFrameNumber = number + 1
    references = []
    for header in source.datasets:
        references.append(Dataset())
        references[-1].ReferencedSOPClassUID = header.SOPClassUID
        references[-1].ReferencedSOPInstanceUID = header.SOPInstanceUID
    seg_dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence = references


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
    values = equipment.contract.spec.class_values
    if not is_identity(values):
        description.SegmentDescription = f"value {values[label.index - 1]} in mask files"
    if modifier_codes := build_modifiers(label):
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifier_codes
    return description
