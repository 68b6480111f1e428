"""Reference from a replacement report to the report that it replaces (PS3.3 C.17.2, Predecessor Documents)."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from medim.files import write_bytes


def add_predecessor(path: Path, earlier_path: Path) -> None:
    """Add the reference to an earlier report of the same series to a report that has not been sent.

    Args:
        path: report, which is written again.
        earlier_path: earlier report in the outbox.
    """
    report, earlier = pydicom.dcmread(path), pydicom.dcmread(earlier_path, stop_before_pixels=True)
    sop_reference, series_reference, study_reference = Dataset(), Dataset(), Dataset()
    sop_reference.ReferencedSOPClassUID = earlier.SOPClassUID
    sop_reference.ReferencedSOPInstanceUID = earlier.SOPInstanceUID
    series_reference.SeriesInstanceUID = earlier.SeriesInstanceUID
    series_reference.ReferencedSOPSequence = [sop_reference]
    study_reference.StudyInstanceUID = earlier.StudyInstanceUID
    study_reference.ReferencedSeriesSequence = [series_reference]
    report.PredecessorDocumentsSequence = [study_reference]
    buffer = io.BytesIO()
    report.save_as(buffer, enforce_file_format=True)
    write_bytes(path, buffer.getvalue())
