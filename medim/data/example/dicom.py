"""Write a simulated scan as a DICOM series: MR Image Storage, 16 bit, axial slices from feet to head."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from medim.files import write_bytes

if TYPE_CHECKING:
    from medim.data.example.scan import ExampleScan


def write_dicom_series(scan: ExampleScan, folder: Path, *, seed: int) -> None:
    """Write one file per slice, `IM-0001.dcm` onwards, into a new folder.

    DICOM coordinates point to the patient's Left and Posterior (LPS), those of the scan to Right and Anterior (RAS).
    Rows and columns are the reversed y and x axes of the scan, which gives the radiological display orientation, and
    x and y of the position change sign.

    Args:
        scan: simulated scan.
        folder: output folder, created here.
        seed: seed of the cohort; the UIDs are derived from it and the scan.
    """
    spacing = float(scan.affine[0, 0])
    dataset = _build_series_dataset(scan, spacing=spacing, seed=seed)
    last_index = (scan.image.shape[0] - 1, scan.image.shape[1] - 1)
    series = str(dataset.SeriesInstanceUID)
    for z in range(scan.image.shape[2]):
        right, anterior, superior, _ = scan.affine @ (*last_index, z, 1)  # the centre of the first pixel, mm, RAS+
        uid = generate_uid(entropy_srcs=[series, str(z)])
        dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.SOPInstanceUID = uid
        dataset.InstanceNumber = z + 1
        dataset.ImagePositionPatient = [_format_decimal(-right), _format_decimal(-anterior), _format_decimal(superior)]
        dataset.SliceLocation = _format_decimal(superior)
        dataset.PixelData = scan.image[::-1, ::-1, z].T.astype("<u2").tobytes()  # (rows, columns)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        write_bytes(folder / f"IM-{z + 1:04d}.dcm", buffer.getvalue())


def _format_decimal(value: float) -> DSfloat:
    """Format a number in at most 16 characters, the limit of DICOM decimal strings."""
    return DSfloat(float(value), auto_format=True)


def _build_series_dataset(scan: ExampleScan, *, spacing: float, seed: int) -> Dataset:
    """Build the data set that the slices of a scan share."""
    number = int(scan.subject.removeprefix("EX-"))
    source = [f"medim example {seed} {spacing} {number}"]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.SOPClassUID = MRImageStorage

    dataset.PatientName = f"EXAMPLE^{number:03d}"
    dataset.PatientID = scan.subject
    dataset.PatientBirthDate = ""
    dataset.PatientSex = ""
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "Simulated from a template: there is no such patient"

    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[*source, f"study {scan.session}"])
    dataset.StudyDate = f"202{scan.session}0101"
    dataset.StudyTime = "120000"
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.StudyID = str(scan.session)
    dataset.StudyDescription = "Example brain"

    dataset.Modality = "MR"
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[*source, f"series {scan.session}"])
    dataset.SeriesNumber = 1
    dataset.SeriesDate = dataset.StudyDate
    dataset.SeriesTime = dataset.StudyTime
    dataset.SeriesDescription = "T1w simulated"
    dataset.BodyPartExamined = "BRAIN"
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[*source, f"frame {scan.session}"])
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = "medim"
    dataset.ManufacturerModelName = "Example"
    _add_mr_image_module(dataset, scan, spacing)
    return dataset


def _add_mr_image_module(dataset: Dataset, scan: ExampleScan, spacing: float) -> None:
    """Add the MR Image, Image Plane and Image Pixel modules, except for attributes that differ between slices."""
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.AcquisitionNumber = 1
    dataset.ScanningSequence = "GR"
    dataset.SequenceVariant = "SP"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = "3D"
    dataset.RepetitionTime = 10.0
    dataset.EchoTime = 3.0
    dataset.EchoTrainLength = 1
    dataset.FlipAngle = 20.0
    dataset.MagneticFieldStrength = 1.5

    dataset.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    dataset.PixelSpacing = [_format_decimal(spacing), _format_decimal(spacing)]
    dataset.SliceThickness = _format_decimal(spacing)
    dataset.SpacingBetweenSlices = _format_decimal(spacing)

    columns, rows, _ = scan.image.shape
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    brightest = float(np.percentile(scan.image, 99.5))
    dataset.WindowCenter = round(brightest / 2)
    dataset.WindowWidth = round(brightest)
