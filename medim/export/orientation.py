"""Does a place in the patient stay where it is, whatever way a scanner wrote its slices?"""

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

SHAPE, SPACING = (6, 5, 4), (0.9, 0.4, 2.0)  # voxels and mm along left, posterior, superior; pixels that are not square
ORIGIN = np.array([-11.0, 7.0, -30.0])  # of the first voxel, mm, DICOM's LPS
MARKERS = {700: (5, 2, 1), 800: (2, 4, 1), 900: (2, 2, 3)}  # grey value: voxel furthest left, posterior, superior
NEAR = 1e-4  # mm


def misplaced() -> tuple[int, int]:
    """Write a phantom as DICOM series in all 8 directions of its axes, read them, and look for its markers.

    Returns:
        How many markers lie elsewhere than in the patient, on the reader's grid or on the file's; and of how many.
    """
    wrong = 0
    signs = list(itertools.product((1, -1), repeat=3))
    with tempfile.TemporaryDirectory() as folder:
        for number, turned in enumerate(signs):
            place = Path(folder) / str(number)
            _write(place, turned)
            volume = read_volume(place)
            native = to_native(volume.array, volume)
            for array, affine in ((volume.array[0], volume.affine), (native[0], volume.native_affine)):
                wrong += sum(not _is_there(array, affine, grey, voxel) for grey, voxel in MARKERS.items())
    return wrong, 2 * len(signs) * len(MARKERS)


def _is_there(array: Array, affine: Array, grey: int, voxel: tuple[int, ...]) -> bool:
    found = np.argwhere(np.rint(array) == grey)
    wanted = (ORIGIN + np.multiply(voxel, SPACING)) * (-1, -1, 1)  # mm, RAS+
    return len(found) == 1 and bool(np.allclose(affine @ [*found[0], 1.0], [*wanted, 1.0], atol=NEAR))


def _write(folder: Path, turned: tuple[int, ...]) -> None:
    """The phantom as a series whose columns, rows and slices run along or against left, posterior and superior."""
    image = np.zeros(SHAPE, np.uint16)
    for grey, voxel in MARKERS.items():
        image[voxel] = grey
    backwards = tuple(axis for axis, sign in enumerate(turned) if sign < 0)
    stored = np.flip(image, backwards)
    first = ORIGIN + np.multiply([n - 1 if sign < 0 else 0 for n, sign in zip(SHAPE, turned, strict=True)], SPACING)
    series, frame = generate_uid(), generate_uid()
    folder.mkdir()
    for k in range(SHAPE[2]):
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = MRImageStorage
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = generate_uid()
        made.Modality, made.SeriesInstanceUID, made.FrameOfReferenceUID = "MR", series, frame
        made.PatientID = made.PatientName = "phantom"
        made.StudyInstanceUID, made.InstanceNumber = series, k + 1
        made.ImageOrientationPatient = [turned[0], 0, 0, 0, turned[1], 0]
        made.ImagePositionPatient = [*first[:2].tolist(), float(first[2] + turned[2] * k * SPACING[2])]
        made.PixelSpacing = [SPACING[1], SPACING[0]]  # between rows, between columns
        made.SliceThickness = SPACING[2]
        made.Rows, made.Columns, made.SamplesPerPixel = SHAPE[1], SHAPE[0], 1
        made.PhotometricInterpretation, made.PixelRepresentation = "MONOCHROME2", 0
        made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
        made.PixelData = stored[:, :, k].T.tobytes()
        made.save_as(folder / f"{k}.dcm", enforce_file_format=True)
