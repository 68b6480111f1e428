"""Time of indexing a series of many volumes that only InstanceNumber separates, per file, accepted and rejected.

    python benchmarks/time_series.py --out time_series.json

A series is rejected if a slice is missing in the middle. Its pixels are then compared, once per file, so the time per
file must not grow with the number of files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from medim.data.index.index import AllRejectedError, build_index
from medim.files import write_json

SLICES, SIDE = 20, 64  # slices per volume, pixels per row


def write_time_series(folder: Path, volumes: int) -> list[Path]:
    """Write a series of `volumes` volumes, numbered one after the other."""
    rng = np.random.default_rng(0)
    series = generate_uid()
    paths = []
    for number in range(volumes * SLICES):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.Modality, dataset.InstanceNumber = series, "MR", number + 1
        dataset.ImagePositionPatient = [0.0, -10.0, 3.0 * (number % SLICES)]
        dataset.ImageOrientationPatient, dataset.PixelSpacing = [1.0, 0, 0, 0, 1.0, 0], [1.0, 1.0]
        dataset.Rows = dataset.Columns = SIDE
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.PixelData = rng.integers(0, 1000, (SIDE, SIDE), np.uint16).tobytes()
        paths.append(folder / f"{number:06d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def time_index(folder: Path, volumes: int) -> float:
    """Measure the seconds of an index of one process; check the number of its images, 0 if it is rejected."""
    start, n_images = time.perf_counter(), 0
    with suppress(AllRejectedError):
        n_images = len(build_index(folder, "mri", remember=False).records)
    duration = time.perf_counter() - start
    if n_images != volumes:
        raise SystemExit(f"expected {volumes} images, got {n_images}")
    return duration


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("time_series.json"))
    parser.add_argument("--volumes", type=int, nargs="+", default=[20, 100, 300])
    arguments = parser.parse_args()
    rows = []
    for volumes in arguments.volumes:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_time_series(Path(folder), volumes)
            accepted = time_index(Path(folder), volumes)
            paths[len(paths) // 2].unlink()
            rejected = time_index(Path(folder), 0)
        rows.append({"files": len(paths), "accepted seconds": accepted, "rejected seconds": rejected})
        each = ", ".join(
            f"{1000 * seconds / len(paths):.2f} ms {name}"
            for name, seconds in (("accepted", accepted), ("rejected", rejected))
        )
        print(f"{len(paths):,} files: {accepted:.2f} s accepted, {rejected:.2f} s rejected; per file {each}")
    write_json(arguments.out, {"rows": rows})


if __name__ == "__main__":
    main()
