"""From an answer to DICOM files beside each other, and their row in `predictions.csv`."""

from __future__ import annotations

import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from medim.data.index.index import Index, Record
from medim.data.preprocessing.steps import to_native
from medim.data.readers import ReadError
from medim.files import write_bytes
from medim.inference.ood import Verdict
from medim.package.package import Package
from medim.predict.dicom.equipment import Equipment
from medim.predict.dicom.segmentation import read_back, segmentation
from medim.predict.dicom.source import Source, read_source, unheard
from medim.predict.dicom.structured_report import probabilities_report, volumes_report
from medim.predict.outputs import classified, sizes, volumes
from medim.types import Array, UsageError, UserError, Volume

log = logging.getLogger(__name__)


def writer(package: Package, *, labelmap: bool = False) -> Any:
    """What writes the answers of a package as DICOM; see `medim.predict.predict.Writer`.

    Raises:
        UserError: a segmenter's package without label codes.
        UsageError: a label map of something else than a segmenter.
    """
    contract = package.contract
    if contract.kind == "segmenter" and not contract.labels:
        raise UserError(
            f"--as dicom: {contract.name} has no codes for {', '.join(contract.classes)}, which a DICOM segment must "
            "have. Export it again with --labels-schema FILE, or use --as nifti."
        )
    if labelmap and contract.kind != "segmenter":
        raise UsageError(f"--labelmap: expected a segmenter, got a {contract.kind}. Leave it out.")
    return partial(_write, package, Equipment(contract, package.sha256), labelmap)


def _write(
    package: Package,
    equipment: Equipment,
    labelmap: bool,
    stem: Path,
    index: Index,
    record: Record,
    volume: Volume,
    answer: Array,
    verdict: Verdict,
) -> dict[str, Any]:
    plan = index.plan(record)
    if plan is None:
        raise ReadError("not-dicom", "not a DICOM image, for which no DICOM answer can be written")
    source = read_source(plan)
    if "no-place" in (record.quality or ""):
        log.warning("%s: its place in the patient is unknown, and so is that of the answer", record.image)
    report = stem.with_name(f"{stem.name}.sr.dcm")
    try:
        if package.contract.kind != "segmenter":
            save(report, probabilities_report(answer, source, equipment, verdict))
            return {"image": record.image, "file": report.name, **classified(package.network, answer)}
        made = answer_in_seg(answer, volume, source, equipment, labelmap=labelmap)
        classes = package.contract.classes
        told = volumes_report(made, volumes(answer, volume, len(classes)), source, equipment, verdict)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what highdicom raises for an odd source
        raise ReadError("no-reference", f"its header cannot carry an answer ({type(error).__name__})") from error
    path = stem.with_name(f"{stem.name}.seg.dcm")
    save(path, made)
    save(report, told)
    return {"image": record.image, "file": path.name, "report": report.name, **sizes(answer, volume, classes)}


def answer_in_seg(labels: Array, volume: Volume, source: Source, equipment: Equipment, *, labelmap: bool) -> Any:
    """A segmentation that has been read back, frame by frame.

    Raises:
        UserError: what it holds is not what was put in.
    """
    frames = source.frames(to_native(labels[None], volume)[0])
    made = segmentation(frames, source, equipment, labelmap=labelmap)
    with unheard():
        wrong = int((read_back(made, source) != frames).sum())
    if wrong:
        raise UserError(f"DICOM segmentation: {wrong} of {frames.size} voxels read back otherwise. Use --as nifti.")
    return made


def save(path: Path, dataset: Dataset) -> None:
    """Write a DICOM file, whole or not at all."""
    buffer = io.BytesIO()
    with unheard():
        dataset.save_as(buffer, enforce_file_format=True)
    write_bytes(path, buffer.getvalue())
