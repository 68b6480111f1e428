"""What looking at DICOM headers costs: the index beside a plain pydicom loop, and its memory as the source grows.

    python benchmarks/index.py --data ../shared/data/mri-dicom --out index.json

The files are made from real series: each series again and again with UIDs of its own, slices of at most 64 x 64 pixels.
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
from medim.data.index.scan_cache import Looks
from medim.data.parallel import available
from medim.data.readers import DICOM
from medim.files import write_json

SLICES = 100  # files a series
SIDE = 64  # pixels


def make(source: Path, out: Path, series: int) -> list[Path]:
    """Write `series` series of `SLICES` files each, in turn from each real one."""
    real = [[pydicom.dcmread(path) for path in sorted(folder.iterdir())] for folder in sorted(source.glob("*/*/"))]
    paths = []
    for number in range(series):
        slices = real[number % len(real)]
        first = slices[0]
        normal = [float(value) for value in first.ImageOrientationPatient]
        for place in range(SLICES):
            made = slices[place % len(slices)]
            step = max(1, made.Rows // SIDE)
            pixels = made.pixel_array[::step, ::step]
            copy = made.copy()
            copy.PixelData, (copy.Rows, copy.Columns) = pixels.tobytes(), pixels.shape
            copy.SeriesInstanceUID, copy.SOPInstanceUID = f"1.2.826.{number}", f"1.2.826.{number}.{place}"
            copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
            copy.StudyInstanceUID, copy.PatientID = f"1.2.827.{number // 5}", f"P{number // 5}"
            copy.ImagePositionPatient = [float(f"{value:.6f}") for value in _along(normal, 2.0 * place)]
            paths.append(out / f"P{number // 5}" / f"{number}" / f"{place}.dcm")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            copy.save_as(paths[-1])
    return paths


def _along(orientation: Sequence[float], distance: float) -> list[float]:
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    return [distance * value for value in (b * f - c * e, c * d - a * f, a * e - b * d)]


def plain(paths: Sequence[Path]) -> None:
    """The loop that everybody writes."""
    for path in paths:
        pydicom.dcmread(path, stop_before_pixels=True)


def seconds(function: Callable[[], object]) -> float:
    """By the clock: processes work side by side."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak(folder: Path) -> int:
    """Bytes that a process that indexes a folder takes at its highest, and the largest of its workers."""
    taken = subprocess.run([sys.executable, __file__, "--measure", str(folder)], check=True, capture_output=True)
    return int(taken.stdout)


def main() -> None:
    """Make the files, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="real series, a folder each in a folder a study")
    parser.add_argument("--out", type=Path, default=Path("index.json"))
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        build_index(given.measure, "mri", jobs=available(), remember=False)
        used = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(used * 1024)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEDIM_CACHE"] = f"{folder}/cache"
        many, few = Path(folder) / "many", Path(folder) / "few"
        paths = make(given.data, many, given.series)
        make(given.data, few, given.series // 10)
        functions: dict[str, Callable[[], object]] = {
            "pydicom loop": lambda: plain(paths),
            "header pass": lambda: Looks(jobs=available())(DICOM.look, paths),
            "whole index": lambda: build_index(many, "mri", jobs=available(), remember=False),
            "index, remembered": lambda: build_index(many, "mri", jobs=available()),
            "index again": lambda: build_index(many, "mri", jobs=available()),
        }
        rows = []
        for _ in range(given.rounds):
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            rows.append({name: seconds(function) for name, function in functions.items()})
        best = {name: min(row[name] for row in rows) for name in functions}
        speed = {name: best["pydicom loop"] / taken for name, taken in best.items()}
        memory = peak(many) / peak(few)
    for name, ratio in speed.items():
        print(f"{name}: {ratio:.2f} times as fast as the pydicom loop")
    print(f"peak memory of {len(paths):,} files over that of {len(paths) // 10:,}: {memory:.2f}")
    write_json(
        given.out,
        {"files": len(paths), "processes": available(), "speed": speed, "seconds": best, "memory": memory},
    )


if __name__ == "__main__":
    main()
