"""Time of indexing DICOM files compared with a loop of pydicom, and memory as a function of the number of files.

    python benchmarks/index.py --data ../shared/data/mri-dicom --out index.json

The files are copies of real series with new UIDs and slices of about 64 x 64 pixels.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pydicom

from medim.data.index.index import build_index
from medim.data.index.scan_cache import FileScanner
from medim.data.parallel import count_cpus
from medim.data.readers import DICOM
from medim.files import write_json

SLICES = 100  # files per series
SIDE = 64  # target image size in pixels


def write_series_copies(source: Path, out: Path, series: int) -> list[Path]:
    """Write `series` series of `SLICES` files each; the real series are used in turn."""
    source_series = [
        [pydicom.dcmread(path) for path in sorted(folder.iterdir())] for folder in sorted(source.glob("*/*/"))
    ]
    paths = []
    for number in range(series):
        slices = source_series[number % len(source_series)]
        first = slices[0]
        orientation = [float(value) for value in first.ImageOrientationPatient]
        for position in range(SLICES):
            source_slice = slices[position % len(slices)]
            step = max(1, source_slice.Rows // SIDE)
            pixels = source_slice.pixel_array[::step, ::step]
            copy = source_slice.copy()
            copy.PixelData, (copy.Rows, copy.Columns) = pixels.tobytes(), pixels.shape
            copy.SeriesInstanceUID, copy.SOPInstanceUID = f"1.2.826.{number}", f"1.2.826.{number}.{position}"
            copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
            copy.StudyInstanceUID, copy.PatientID = f"1.2.827.{number // 5}", f"P{number // 5}"
            copy.ImagePositionPatient = [
                float(f"{value:.6f}") for value in _offset_along_normal(orientation, 2.0 * position)
            ]
            paths.append(out / f"P{number // 5}" / f"{number}" / f"{position}.dcm")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            copy.save_as(paths[-1])
    return paths


def _offset_along_normal(orientation: Sequence[float], distance: float) -> list[float]:
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    return [distance * value for value in (b * f - c * e, c * d - a * f, a * e - b * d)]


def read_headers(paths: Sequence[Path]) -> None:
    """Read all headers in a loop of pydicom."""
    for path in paths:
        pydicom.dcmread(path, stop_before_pixels=True)


def time_call(function: Callable[[], object]) -> float:
    """Measure the wall time of a call, because several processes work in parallel."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_peak_memory(folder: Path) -> int:
    """Measure the peak memory of indexing a folder: process and its largest worker, in bytes."""
    process = subprocess.run([sys.executable, __file__, "--measure", str(folder)], check=True, capture_output=True)
    return int(process.stdout)


def main() -> None:
    """Create the files; measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with real series: STUDY/SERIES/*")
    parser.add_argument("--out", type=Path, default=Path("index.json"))
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        build_index(arguments.measure, "mri", jobs=count_cpus(), remember=False)
        peak_kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(peak_kib * 1024)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEDIM_CACHE"] = f"{folder}/cache"
        many, few = Path(folder) / "many", Path(folder) / "few"
        paths = write_series_copies(arguments.data, many, arguments.series)
        write_series_copies(arguments.data, few, arguments.series // 10)
        functions: dict[str, Callable[[], object]] = {
            "pydicom loop": lambda: read_headers(paths),
            "header pass": lambda: FileScanner(jobs=count_cpus())(DICOM.inspect, paths),
            "whole index": lambda: build_index(many, "mri", jobs=count_cpus(), remember=False),
            "index, remembered": lambda: build_index(many, "mri", jobs=count_cpus()),
            "index again": lambda: build_index(many, "mri", jobs=count_cpus()),
        }
        rows = []
        for _ in range(arguments.rounds):
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            rows.append({name: time_call(function) for name, function in functions.items()})
        best = {name: min(row[name] for row in rows) for name in functions}
        speed = {name: best["pydicom loop"] / duration for name, duration in best.items()}
        memory = measure_peak_memory(many) / measure_peak_memory(few)
    for name, ratio in speed.items():
        print(f"{name}: {ratio:.2f} times as fast as the pydicom loop")
    print(f"peak memory of {len(paths):,} files over that of {len(paths) // 10:,}: {memory:.2f}")
    write_json(
        arguments.out,
        {"files": len(paths), "processes": count_cpus(), "speed": speed, "seconds": best, "memory": memory},
    )


if __name__ == "__main__":
    main()
