"""A made-up image as a DICOM source, so that a package can be tried before there is a patient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ComputedRadiographyImageStorage, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from medim.data.readers.base import LPS_TO_RAS
from medim.data.readers.dicom.reader import Plan
from medim.predict.dicom.source import TYPE_2, UTF_8, Source
from medim.types import Volume


def phantom_source(volume: Volume) -> Source:
    """Headers as a scanner would have written them for an image; no patient, no pixels, no files.

    Args:
        volume: its native grid is (columns, rows, slices), or (rows, columns).
    """
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    if volume.spatial_dims == 2:
        rows, columns = volume.native_shape
        flat = _header(uids, rows, columns)
        flat.SOPClassUID, flat.Modality = ComputedRadiographyImageStorage, "CR"
        del flat.FrameOfReferenceUID
        return Source((flat,), Plan(((Path("0"), 0),), (rows, columns), (1.0, 1.0), None))
    columns, rows, slices = volume.native_shape
    affine = LPS_TO_RAS @ volume.native_affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    made = []
    for number in range(slices):
        header = _header(uids, rows, columns)
        header.SOPClassUID, header.Modality = MRImageStorage, "MR"
        header.ImageOrientationPatient = _decimals(*(affine[:3, :2] / lengths[:2]).T.ravel())
        header.ImagePositionPatient = _decimals(*(affine[:3, 3] + number * affine[:3, 2]))
        header.PixelSpacing = _decimals(lengths[1], lengths[0])
        header.SliceThickness = _decimals(lengths[2])[0]
        made.append(header)
    plan = Plan(tuple((Path(str(n)), 0) for n in range(slices)), (rows, columns), (1.0, 1.0), affine)
    return Source(tuple(made), plan)


def _header(uids: Mapping[str, str], rows: int, columns: int) -> Dataset:
    header = Dataset()
    for name, uid in uids.items():
        setattr(header, name, uid)
    for name in (*TYPE_2, "PositionReferenceIndicator"):
        setattr(header, name, "")
    header.SpecificCharacterSet = UTF_8
    header.SOPInstanceUID = generate_uid()
    header.Rows, header.Columns = rows, columns
    return header


def _decimals(*values: float) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]
