"""Check that readers preserve patient coordinates for all axis directions of a DICOM series."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from medim.data.preprocessing.steps import to_native
from medim.data.readers import read_volume
from medim.types import Array

SHAPE, SPACING = (6, 5, 4), (0.9, 0.4, 2.0)  # voxels and mm along left, posterior, superior; pixels are not square
ORIGIN = np.array([-11.0, 7.0, -30.0])  # position of the first voxel, mm, DICOM's LPS
MARKERS = {700: (5, 2, 1), 800: (2, 4, 1), 900: (2, 2, 3)}  # grey value: voxel furthest left, posterior, superior
POSITION_TOLERANCE = 1e-4  # mm


def count_misplaced_markers() -> tuple[int, int]:
    """Write a phantom as DICOM series with all 8 axis directions, read them and check the positions of the markers.

    Returns:
        Number of markers at a wrong position on the reader's grid or the native grid, and number of all markers.
    """
    misplaced_count = 0
    signs = list(itertools.product((1, -1), repeat=3))
    with tempfile.TemporaryDirectory() as folder:
        for number, axis_signs in enumerate(signs):
            series_folder = Path(folder) / str(number)
            _write_phantom_series(series_folder, axis_signs)
            volume = read_volume(series_folder)
            native = to_native(volume.array, volume)
            for array, affine in ((volume.array[0], volume.affine), (native[0], volume.native_affine)):
                misplaced_count += sum(not _is_marker_at(array, affine, grey, voxel) for grey, voxel in MARKERS.items())
    return misplaced_count, 2 * len(signs) * len(MARKERS)


def _is_marker_at(array: Array, affine: Array, grey: int, voxel: tuple[int, ...]) -> bool:
    voxels = np.argwhere(np.rint(array) == grey)
    position = (ORIGIN + np.multiply(voxel, SPACING)) * (-1, -1, 1)  # mm, RAS+
    return len(voxels) == 1 and bool(np.allclose(affine @ [*voxels[0], 1.0], [*position, 1.0], atol=POSITION_TOLERANCE))


def _write_phantom_series(folder: Path, axis_signs: tuple[int, ...]) -> None:
    """Write the phantom as a DICOM series.

    Args:
        folder: new folder of the series.
        axis_signs: directions of columns, rows and slices: 1 along or -1 against left, posterior and superior.
    """
    image = np.zeros(SHAPE, np.uint16)
    for grey, voxel in MARKERS.items():
        image[voxel] = grey
    reverse_axes = tuple(axis for axis, sign in enumerate(axis_signs) if sign < 0)
    pixels = np.flip(image, reverse_axes)
    first_position = ORIGIN + np.multiply(
        [n - 1 if sign < 0 else 0 for n, sign in zip(SHAPE, axis_signs, strict=True)], SPACING
    )
    series, frame = generate_uid(), generate_uid()
    folder.mkdir()
    for k in range(SHAPE[2]):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.Modality, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "MR", series, frame
        dataset.PatientID = dataset.PatientName = "phantom"
        dataset.StudyInstanceUID, dataset.InstanceNumber = series, k + 1
        dataset.ImageOrientationPatient = [axis_signs[0], 0, 0, 0, axis_signs[1], 0]
        dataset.ImagePositionPatient = [
            *first_position[:2].tolist(),
            float(first_position[2] + axis_signs[2] * k * SPACING[2]),
        ]
        dataset.PixelSpacing = [SPACING[1], SPACING[0]]  # between rows, between columns
        dataset.SliceThickness = SPACING[2]
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = SHAPE[1], SHAPE[0], 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelData = pixels[:, :, k].T.tobytes()
        dataset.save_as(folder / f"{k}.dcm", enforce_file_format=True)
