"""Tiny images in every format, written for the tests. All names in them are invented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from medim.data.index.scan_cache import inspect_file
from medim.data.readers import Reader, collect_images
from medim.data.readers.inspection import CollectionResult
from medim.types import Modality

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def scan(reader: Reader, paths: Sequence[Path], modality: Modality) -> CollectionResult:
    """What a reader finds in files, as an index asks it."""
    return collect_images(reader, [inspect_file(reader.inspect, path) for path in paths], modality)


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Whole numbers from 0 to 999 as float32."""
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.float32)


def write_nifti(path: Path, array: np.ndarray[Any, Any] | None = None, affine: Any = None, **header: Any) -> Path:
    """A NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(noise(4, 5, 6) if array is None else array, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def dataset(pixels: np.ndarray[Any, Any], **tags: Any) -> FileDataset:
    """A DICOM MR slice (rows, columns), or frames (n, rows, columns); `tags` replace or, as None, remove attributes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    signed = pixels.dtype.kind == "i"
    defaults: dict[str, Any] = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(entropy_srcs=["study"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=["series"]),
        "Modality": "MR",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "PatientID": "ID-4711",
        "PatientName": "Avasarala^Chrisjen",
        "PixelSpacing": [1.0, 1.0],
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(signed),
        "PixelData": pixels.astype(np.int16 if signed else np.uint16).tobytes(),
    }
    if pixels.ndim == 3:
        defaults["NumberOfFrames"] = len(pixels)
    for name, value in {**defaults, **tags}.items():
        if value is not None:
            setattr(made, name, value)
    meta.MediaStorageSOPClassUID = made.get("SOPClassUID", MRImageStorage)
    meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID", "1.2.3")
    return made


def save(made: FileDataset, path: Path) -> Path:
    """Write a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    slices: np.ndarray[Any, Any] | None = None,
    *,
    positions: Sequence[Sequence[float]] | None = None,
    gap: float = 2.0,
    each: Sequence[dict[str, Any]] = (),
    order: Sequence[int] | None = None,
    **tags: Any,
) -> list[Path]:
    """An MR series, one file a slice.

    Args:
        folder: where to.
        slices: (n, rows, columns), the first one lowest on the normal.
        positions: of the slices; else `gap` mm apart along the normal from the tag ImagePositionPatient.
        gap: in mm.
        each: tags of single slices.
        order: number in the file's name by slice.
        tags: of every slice.
    """
    slices = noise(5, 4, 6) if slices is None else slices
    direction = np.array(tags.get("ImageOrientationPatient", AXIAL))
    normal = np.cross(direction[:3], direction[3:])
    origin = np.array(tags.pop("ImagePositionPatient", (10.0, 20.0, 30.0)))
    places = positions if positions is not None else [list(origin + normal * gap * k) for k in range(len(slices))]
    paths = []
    for k, (pixels, place) in enumerate(zip(slices, places, strict=True)):
        own = {"ImagePositionPatient": [float(f"{v:.8f}") for v in place], **tags, **(each[k] if k < len(each) else {})}
        paths.append(save(dataset(pixels, **own), folder / f"{order[k] if order else k}.dcm"))
    return paths


def xray(pixels: np.ndarray[Any, Any], **tags: Any) -> FileDataset:
    """A DICOM chest X-ray."""
    place = {"ImageOrientationPatient": None, "ImagePositionPatient": None}
    sop = DigitalXRayImageStorageForPresentation
    return dataset(pixels, **{"Modality": "DX", "SOPClassUID": sop, **place, **tags})


def enhanced(frames: np.ndarray[Any, Any], positions: Sequence[Sequence[float]], **tags: Any) -> FileDataset:
    """An enhanced MR object with functional groups: plane and rescaling by frame, spacing shared."""
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.8], 3.0
    plane.ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    groups = []
    for k, position in enumerate(positions):
        group, place, scale = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = list(position)
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = k + 1, 100 * k, "US"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [place], [scale]
        groups.append(group)
    absent = {"PixelSpacing": None, "ImageOrientationPatient": None, "ImagePositionPatient": None}
    functional = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": groups}
    return dataset(frames, **{"SOPClassUID": EnhancedMRImageStorage, **absent, **functional, **tags})


def write_archive(path: Path, *, train: int = 6, val: int = 3, side: int = 8) -> Path:
    """A MedMNIST archive with classes 0 and 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        train_images=noise(train, side, side).astype(np.uint8),
        train_labels=(np.arange(train) % 2)[:, None].astype(np.uint8),
        val_images=noise(val, side, side, seed=1).astype(np.uint8),
        val_labels=(np.arange(val) % 2)[:, None].astype(np.uint8),
    )
    return path


def write_decathlon(
    folder: Path, *, names: Sequence[str] = ("a", "b", "c"), classes: Sequence[str] = ("one", "two")
) -> Path:
    """A Medical Segmentation Decathlon folder whose images all have a mask."""
    import json

    for k, name in enumerate(names):
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", noise(4, 5, 6, seed=k))
        mask = (noise(4, 5, 6, seed=k) % (len(classes) + 1)).astype(np.uint8)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", mask)
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    labels = {str(k): name for k, name in enumerate(["background", *classes])}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    return folder
