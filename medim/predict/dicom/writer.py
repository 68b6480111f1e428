"""Write a prediction as DICOM files and build its row of `predictions.csv`."""

from __future__ import annotations

import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medim.data.index.index import Index
from medim.data.preprocessing.steps import to_native
from medim.data.readers import ReadError
from medim.files import write_bytes
from medim.package.package import Package
from medim.predict.answer import Answer, AnswerWriter, PredictionRow
from medim.predict.dicom.equipment import Equipment
from medim.predict.dicom.segmentation import build_segmentation, read_frame_labels
from medim.predict.dicom.source import DicomSource, read_dicom_source, suppress_warnings
from medim.predict.dicom.structured_report import (
    build_probabilities_report,
    build_values_report,
    build_volumes_report,
)
from medim.tasks import is_dense
from medim.tasks.segmentation import class_sizes
from medim.types import Array, UsageError, UserError, Volume

log = logging.getLogger(__name__)

_ACQUISITION_EQUIPMENT = codes.DCM.AcquisitionEquipment.value


def dicom_writer(package: Package, *, labelmap: bool = False) -> AnswerWriter:
    """Build the function that writes predictions as DICOM.

    Raises:
        UserError: the package is a segmenter without label codes.
        UsageError: `labelmap` is set and the package is not a segmenter.
    """
    contract = package.contract
    if is_dense(contract.kind) and not contract.labels:
        raise UserError(
            f"--format dicom: {contract.name} has no codes for {', '.join(contract.classes)}, which a DICOM "
            "segment requires. Export it again with --label-codes FILE, or use --format nifti."
        )
    if labelmap and not is_dense(contract.kind):
        raise UsageError(f"--labelmap: expected a segmenter, got a {contract.kind}. Omit --labelmap.")
    return partial(_write_dicom_answer, package, Equipment(contract, package.sha256), labelmap)


def _write_dicom_answer(
    package: Package, equipment: Equipment, labelmap: bool, stem: Path, index: Index, answer: Answer
) -> PredictionRow:
    record, volume = answer.record, answer.volume
    plan = index.plan_slices(record)
    if plan is None:
        raise ReadError("not-dicom", "DICOM output requires a DICOM image")
    source = read_dicom_source(plan)
    if "no-place" in (record.quality or ""):
        log.warning(
            "%s: the series has no patient coordinates, so the segmentation cannot be overlaid on other series",
            record.image,
        )
    report_path = stem.with_name(f"{stem.name}.sr.dcm")
    task, classes = package.network.task, package.contract.classes
    columns = task.answer_columns(answer.prediction, volume, classes)
    try:
        if not task.dense:
            build_report = build_values_report if task.quantity == "value" else build_probabilities_report
            save_dicom(report_path, build_report(answer.prediction, source, equipment, answer.ood_result))
            return {"image": record.image, "file": report_path.name, **columns}
        seg_dataset = segmentation_of(answer.prediction, volume, source, equipment, labelmap=labelmap)
        sizes = class_sizes(answer.prediction, volume, len(classes))
        report_dataset = build_volumes_report(seg_dataset, sizes, source, equipment, answer.ood_result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # raised by highdicom for an invalid source
        raise ReadError(
            "no-reference", f"highdicom cannot write an output for this header ({type(error).__name__})"
        ) from error
    path = stem.with_name(f"{stem.name}.seg.dcm")
    save_dicom(path, seg_dataset)
    save_dicom(report_path, report_dataset)
    return {"image": record.image, "file": path.name, "report": report_path.name, **columns}


def segmentation_of(labels: Array, volume: Volume, source: DicomSource, equipment: Equipment, *, labelmap: bool) -> Any:
    """Build a segmentation and verify its frames by reading them back.

    Raises:
        UserError: voxels of the segmentation differ from the labels.
    """
    frames = source.frames(to_native(labels[None], volume)[0])
    seg_dataset = build_segmentation(frames, source, equipment, labelmap=labelmap)
    with suppress_warnings():
        wrong_voxels = int((read_frame_labels(seg_dataset, source) != frames).sum())
    if wrong_voxels:
        raise UserError(
            f"DICOM segmentation: {wrong_voxels} of {frames.size} voxels differ when read back. Use --format nifti."
        )
    return seg_dataset


def save_dicom(path: Path, dataset: Dataset) -> None:
    """Write a DICOM file atomically, without the description of the scanner that highdicom adds."""
    dataset.ContributingEquipmentSequence = [
        item
        for item in dataset.get("ContributingEquipmentSequence", [])
        if item.PurposeOfReferenceCodeSequence[0].CodeValue != _ACQUISITION_EQUIPMENT
    ]
    buffer = io.BytesIO()
    with suppress_warnings():
        dataset.save_as(buffer, enforce_file_format=True)
    write_bytes(path, buffer.getvalue())
