"""DICOM headers of a synthetic image, to test the DICOM output of a package without patient data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ComputedRadiographyImageStorage, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from medim.data.readers.base import LPS_TO_RAS
from medim.data.readers.dicom.reader import SlicePlan
from medim.predict.dicom.source import TYPE_2, UTF_8, DicomSource
from medim.types import Volume


def make_phantom_source(volume: Volume) -> DicomSource:
    """Make DICOM headers for an image, without patient data, pixels or files.

    Args:
        volume: image with the native grid (columns, rows, slices), or (rows, columns).
    """
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    if volume.spatial_dims == 2:
        rows, columns = volume.native_shape
        header_2d = _make_phantom_header(uids, rows, columns)
        header_2d.SOPClassUID, header_2d.Modality = ComputedRadiographyImageStorage, "CR"
        del header_2d.FrameOfReferenceUID
        return DicomSource((header_2d,), SlicePlan(((Path("0"), 0),), (rows, columns), (1.0, 1.0), None))
    columns, rows, slices = volume.native_shape
    affine = LPS_TO_RAS @ volume.native_affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    headers = []
    for number in range(slices):
        header = _make_phantom_header(uids, rows, columns)
        header.SOPClassUID, header.Modality = MRImageStorage, "MR"
        header.ImageOrientationPatient = _to_decimal_strings(*(affine[:3, :2] / lengths[:2]).T.ravel())
        header.ImagePositionPatient = _to_decimal_strings(*(affine[:3, 3] + number * affine[:3, 2]))
        header.PixelSpacing = _to_decimal_strings(lengths[1], lengths[0])
        header.SliceThickness = _to_decimal_strings(lengths[2])[0]
        headers.append(header)
    plan = SlicePlan(tuple((Path(str(n)), 0) for n in range(slices)), (rows, columns), (1.0, 1.0), affine)
    return DicomSource(tuple(headers), plan)


def _make_phantom_header(uids: Mapping[str, str], rows: int, columns: int) -> Dataset:
    header = Dataset()
    for name, uid in uids.items():
        setattr(header, name, uid)
    for name in (*TYPE_2, "PositionReferenceIndicator"):
        setattr(header, name, "")
    header.SpecificCharacterSet = UTF_8
    header.SOPInstanceUID = generate_uid()
    header.Rows, header.Columns = rows, columns
    return header


def _to_decimal_strings(*values: float) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]
