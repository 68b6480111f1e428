"""Numbers as a DICOM structured report (TID 1500), unverified and preliminary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highdicom
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medim.inference.ood import Verdict
from medim.package.label_codes import Label
from medim.predict.dicom.equipment import REPORT_SERIES, Equipment, concept, modifiers
from medim.predict.dicom.source import Source, unheard
from medim.types import Array, Modality

UNKNOWN = Verdict()
LARGEST = 1e6  # a score beyond that is told as that
PRIVATE = "99MEDIM"  # designator of codes that no public scheme has, as PS3.16 section 8 allows
SCORE = sr.CodedConcept("ood-score", PRIVATE, "Out-of-distribution score")
FLAG = sr.CodedConcept("ood", PRIVATE, "Unlike the training images")
PROCEDURES: dict[Modality, Any] = {"mri": codes.LN.MRIUnspecifiedBodyRegion, "xray": codes.LN.XRUnspecifiedBodyRegion}


def volumes_report(
    segmentation: Any,
    volumes: Sequence[float],
    source: Source,
    equipment: Equipment,
    verdict: Verdict = UNKNOWN,
) -> sr.Comprehensive3DSR:
    """Report the volume of each segment.

    Args:
        segmentation: what was measured.
        volumes: in mm3, one a label of the contract; in mm2 for a 2D image.
        source: the image that it is a segmentation of.
        equipment: what made it.
        verdict: of the out-of-distribution guard; a group of its own where there is one.
    """
    name, unit = (codes.SCT.Volume, codes.UCUM.CubicMillimeter)
    if source.plan.affine is None:
        name, unit = codes.SCT.Area, codes.UCUM.SquareMillimeter
    with unheard():
        groups = []
        tracked = {int(segment.SegmentNumber): segment for segment in segmentation.SegmentSequence}
        for label, volume in zip(equipment.contract.labels, volumes, strict=True):
            described = tracked[label.index]
            assert label.category is not None  # `read_labels` saw to it
            assert label.type is not None
            groups.append(
                sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                    tracking_identifier=sr.TrackingIdentifier(described.TrackingUID, described.TrackingID),
                    referenced_segment=sr.ReferencedSegment(
                        segmentation.SOPClassUID,
                        segmentation.SOPInstanceUID,
                        label.index,
                        source_series=sr.SourceSeriesForSegmentation(source.first.SeriesInstanceUID),
                    ),
                    finding_category=concept(label.category),
                    finding_type=concept(label.type),
                    finding_sites=_sites(label),
                    algorithm_id=equipment.reported_algorithm(),
                    measurements=[sr.Measurement(name, volume, unit)],
                )
            )
        groups += _usual(verdict, source, equipment)
        return _report(groups, [*source.datasets, segmentation], equipment)


def probabilities_report(
    probabilities: Array, source: Source, equipment: Equipment, verdict: Verdict = UNKNOWN
) -> sr.Comprehensive3DSR:
    """Report the probability of each class, with the operating point at which it is called.

    Args:
        probabilities: (K,).
        source: the image.
        equipment: what made it.
        verdict: see `volumes_report`.
    """
    contract = equipment.contract
    labels = contract.labels or tuple(Label(index=i, name=name) for i, name in enumerate(contract.classes))
    with unheard():
        images = _images(source)
        groups = [
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(highdicom.UID(), label.name),
                finding_category=concept(label.category) if label.category else None,
                finding_type=concept(label.type) if label.type else None,
                algorithm_id=equipment.reported_algorithm(f"operating point: {operating_point(label, equipment)}"),
                measurements=[sr.Measurement(codes.DCM.Probability, round(float(p), 6), codes.UCUM.NoUnits)],
                source_images=images,
            )
            for label, p in zip(labels, probabilities, strict=True)
        ]
        groups += _usual(verdict, source, equipment)
        return _report(groups, list(source.datasets), equipment)


def _usual(verdict: Verdict, source: Source, equipment: Equipment) -> list[Any]:
    """What the out-of-distribution guard says of the image; nothing where the package has none."""
    if verdict.score is None:
        return []
    score = round(min(verdict.score, LARGEST), 4)
    return [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(highdicom.UID(), "Out-of-distribution guard"),
            algorithm_id=equipment.reported_algorithm(f"flag: score > 1; by {verdict.by}"),
            measurements=[sr.Measurement(SCORE, score, codes.UCUM.NoUnits)],
            qualitative_evaluations=[sr.QualitativeEvaluation(FLAG, codes.SCT.Yes if verdict.ood else codes.SCT.No)],
            source_images=_images(source),
        )
    ]


def _images(source: Source) -> list[sr.SourceImageForMeasurementGroup]:
    return [sr.SourceImageForMeasurementGroup.from_source_image(image) for image in source.datasets]


def operating_point(label: Label, equipment: Equipment) -> str:
    """In words, the rule by which a class is called."""
    classes = equipment.contract.classes
    if equipment.contract.kind == "multi_label_classifier":
        return f"probability >= {label.threshold or 0.5:g}"
    return "probability >= 0.5" if len(classes) == 2 else f"highest probability of {len(classes)} classes"


def _sites(label: Label) -> list[sr.FindingSite] | None:
    """Where a part lies in its parent structure."""
    if label.type is None or not (label.modifiers or label.laterality):
        return None
    parts = modifiers(label)
    side = parts.pop() if label.laterality else None
    return [sr.FindingSite(concept(label.type), side, parts[0] if parts else None)]


def _report(groups: Sequence[Any], evidence: Sequence[Any], equipment: Equipment) -> sr.Comprehensive3DSR:
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
        **equipment.series(REPORT_SERIES),
    )
    own = Dataset()
    own.CodingSchemeDesignator, own.CodingSchemeResponsibleOrganization = PRIVATE, "medim"
    report.CodingSchemeIdentificationSequence = [*report.get("CodingSchemeIdentificationSequence", []), own]
    return report
