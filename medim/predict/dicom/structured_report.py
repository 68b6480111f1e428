"""Measurements as an unverified, preliminary DICOM structured report (TID 1500)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medim.inference.ood import OODResult
from medim.package.label_codes import LabelCode
from medim.predict.dicom.equipment import REPORT_SERIES, Equipment, build_modifiers, to_coded_concept
from medim.predict.dicom.source import DicomSource, suppress_warnings
from medim.predict.dicom.uids import create_uid
from medim.tasks import find_task_of_kind
from medim.types import Array, Modality

UNKNOWN_RESULT = OODResult()
MAX_SCORE = 1e6  # larger scores are reported as this value
PRIVATE_SCHEME = "99MEDIM"  # designator of private codes (PS3.16 section 8)
SCORE_CONCEPT = sr.CodedConcept("ood-score", PRIVATE_SCHEME, "Out-of-distribution score")
VALUE_CONCEPT = sr.CodedConcept("predicted-value", PRIVATE_SCHEME, "Predicted value")
FLAG_CONCEPT = sr.CodedConcept("ood", PRIVATE_SCHEME, "Unlike the training images")
PROCEDURES: dict[Modality, Any] = {"mri": codes.LN.MRIUnspecifiedBodyRegion, "xray": codes.LN.XRUnspecifiedBodyRegion}


def build_volumes_report(
    segmentation: Any,
    volumes: Sequence[float],
    source: DicomSource,
    equipment: Equipment,
    ood_result: OODResult = UNKNOWN_RESULT,
) -> sr.Comprehensive3DSR:
    """Report the volume of each segment.

    Args:
        segmentation: measured segmentation.
        volumes: volume of each label of the contract in mm3; area in mm2 for a 2D image.
        source: source image of the segmentation.
        equipment: package that made the segmentation.
        ood_result: out-of-distribution result, reported as a separate measurement group if there is a score.
    """
    name, unit = (codes.SCT.Volume, codes.UCUM.CubicMillimeter)
    if source.plan.affine is None:
        name, unit = codes.SCT.Area, codes.UCUM.SquareMillimeter
    with suppress_warnings():
        groups = []
        segments = {int(segment.SegmentNumber): segment for segment in segmentation.SegmentSequence}
        for label, volume in zip(equipment.contract.labels, volumes, strict=True):
            segment_description = segments[label.index]
            assert label.category is not None  # checked by `read_label_codes`
            assert label.type is not None
            groups.append(
                sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                    tracking_identifier=sr.TrackingIdentifier(
                        segment_description.TrackingUID, segment_description.TrackingID
                    ),
                    referenced_segment=sr.ReferencedSegment(
                        segmentation.SOPClassUID,
                        segmentation.SOPInstanceUID,
                        label.index,
                        source_series=sr.SourceSeriesForSegmentation(source.first_dataset.SeriesInstanceUID),
                    ),
                    finding_category=to_coded_concept(label.category),
                    finding_type=to_coded_concept(label.type),
                    finding_sites=_anatomic_sites(label),
                    algorithm_id=equipment.algorithm_identification(),
                    measurements=[sr.Measurement(name, volume, unit)],
                )
            )
        groups += _ood_measurements(ood_result, source, equipment)
        return _build_structured_report(groups, [*source.datasets, segmentation], equipment)


def build_probabilities_report(
    probabilities: Array, source: DicomSource, equipment: Equipment, ood_result: OODResult = UNKNOWN_RESULT
) -> sr.Comprehensive3DSR:
    """Report the probability of each class with its operating point.

    Args:
        probabilities: (K,).
        source: source image.
        equipment: package that made the prediction.
        ood_result: as in `build_volumes_report`.
    """
    contract = equipment.contract
    labels = contract.labels or tuple(LabelCode(index=i, name=name) for i, name in enumerate(contract.classes))
    with suppress_warnings():
        images = _reference_source_images(source)
        groups = [
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(create_uid(), label.name),
                finding_category=to_coded_concept(label.category) if label.category else None,
                finding_type=to_coded_concept(label.type) if label.type else None,
                algorithm_id=equipment.algorithm_identification(
                    f"operating point: {format_operating_point(label, equipment)}"
                ),
                measurements=[sr.Measurement(codes.DCM.Probability, round(float(p), 6), codes.UCUM.NoUnits)],
                source_images=images,
            )
            for label, p in zip(labels, probabilities, strict=True)
        ]
        groups += _ood_measurements(ood_result, source, equipment)
        return _build_structured_report(groups, list(source.datasets), equipment)


def build_values_report(
    values: Array, source: DicomSource, equipment: Equipment, ood_result: OODResult = UNKNOWN_RESULT
) -> sr.Comprehensive3DSR:
    """Report predicted numbers, each with the unit of its label code.

    Args:
        values: (K,).
        source: image.
        equipment: device of the report.
        ood_result: see `build_volumes_report`.
    """
    contract = equipment.contract
    labels = contract.labels or tuple(LabelCode(index=i, name=name) for i, name in enumerate(contract.classes))
    with suppress_warnings():
        images = _reference_source_images(source)
        groups = [
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(create_uid(), label.name),
                finding_category=to_coded_concept(label.category) if label.category else None,
                finding_type=to_coded_concept(label.type) if label.type else None,
                algorithm_id=equipment.algorithm_identification(),
                measurements=[sr.Measurement(VALUE_CONCEPT, float(f"{float(value):.8g}"), _unit_of(label))],
                source_images=images,
            )
            for label, value in zip(labels, values, strict=True)
        ]
        groups += _ood_measurements(ood_result, source, equipment)
        return _build_structured_report(groups, list(source.datasets), equipment)


def _unit_of(label: LabelCode) -> Any:
    """UCUM unit of a label code; no units if it has none."""
    return sr.CodedConcept(label.unit.value, "UCUM", label.unit.meaning) if label.unit else codes.UCUM.NoUnits


def _ood_measurements(ood_result: OODResult, source: DicomSource, equipment: Equipment) -> list[Any]:
    """Build the measurement group of the out-of-distribution score; empty if there is no score."""
    if ood_result.score is None:
        return []
    score = round(min(ood_result.score, MAX_SCORE), 4)
    return [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(create_uid(), "Out-of-distribution detector"),
            algorithm_id=equipment.algorithm_identification(f"flag: score > 1; by {ood_result.feature_group}"),
            measurements=[sr.Measurement(SCORE_CONCEPT, score, codes.UCUM.NoUnits)],
            qualitative_evaluations=[
                sr.QualitativeEvaluation(FLAG_CONCEPT, codes.SCT.Yes if ood_result.ood else codes.SCT.No)
            ],
            source_images=_reference_source_images(source),
        )
    ]


def _reference_source_images(source: DicomSource) -> list[sr.SourceImageForMeasurementGroup]:
    return [sr.SourceImageForMeasurementGroup.from_source_image(image) for image in source.datasets]


def format_operating_point(label: LabelCode, equipment: Equipment) -> str:
    """Describe the decision rule of a class in words."""
    classes = equipment.contract.classes
    if find_task_of_kind(equipment.contract.kind).has_thresholds:
        return f"probability >= {label.threshold or 0.5:g}"
    return "probability >= 0.5" if len(classes) == 2 else f"highest probability of {len(classes)} classes"


def _anatomic_sites(label: LabelCode) -> list[sr.FindingSite] | None:
    """Build the finding site of a part within its parent structure; None without modifiers and laterality."""
    if label.type is None or not (label.modifiers or label.laterality):
        return None
    parts = build_modifiers(label)
    side = parts.pop() if label.laterality else None
    return [sr.FindingSite(to_coded_concept(label.type), side, parts[0] if parts else None)]


def _build_structured_report(
    groups: Sequence[Any], evidence: Sequence[Any], equipment: Equipment
) -> sr.Comprehensive3DSR:
    contract = equipment.contract
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=equipment.device_uid,
        name=contract.name,
        manufacturer_name="medim",
        model_name=contract.name,
        serial_number=equipment.sha256,
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=sr.ObserverContext(codes.DCM.Device, device)),
        procedure_reported=PROCEDURES[contract.modality],
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = sr.Comprehensive3DSR(
        evidence=evidence,
        content=content[0],
        is_complete=True,
        is_verified=False,
        is_final=False,
        **equipment.series_attributes(REPORT_SERIES),
    )
    coding_scheme = Dataset()
    coding_scheme.CodingSchemeDesignator, coding_scheme.CodingSchemeResponsibleOrganization = PRIVATE_SCHEME, "medim"
    report.CodingSchemeIdentificationSequence = [*report.get("CodingSchemeIdentificationSequence", []), coding_scheme]
    return report
