"""Damaged image files and slices: refused with a code, or the same voxels."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import SimpleITK
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medim.data.index.index import Index
from medim.data.readers import ReadError
from medim.types import Modality
from tests.attack.case import EXIT_CODE, OTHER, UNPROTECTED, VOXELS, Case, Finding, Outcome, run_command
from tests.attack.damage import Damage, RandomDamage, draw_damage
from tests.data.synthetic import enhanced, noise, save, write_archive, write_nifti, write_series, xray

N_PER_FORMAT, N_PER_SERIES, N_FLIPS = 30, 12, 60
VOXEL_FILE = "voxels.json"
VOLUME = noise(12, 14, 10)
PICTURE = noise(40, 36).astype(np.uint8)


@dataclass(frozen=True)
class Sample:
    """An image file.

    Attributes:
        name: file name.
        modality: of the image.
        data: content.
        protected_from: first byte that a checksum covers; None if the format has no checksum.
    """

    name: str
    modality: Modality
    data: bytes
    protected_from: int | None


def _save_picture(path: Path, **options: str) -> None:
    Image.fromarray(PICTURE).save(path, **options)


def _write_itk(path: Path, *, compress: bool) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), path, useCompression=compress)


def _write_deflated(path: Path) -> None:
    made = xray(noise(28, 28))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(made, path)


_WRITERS: Mapping[str, tuple[Modality, Callable[[Path], object], bytes | None]] = {  # bytes before the checked part
    "scan.nii": ("mri", lambda path: write_nifti(path, VOLUME), None),
    "scan.nii.gz": ("mri", lambda path: write_nifti(path, VOLUME), b""),
    "scan.mha": ("mri", partial(_write_itk, compress=False), None),
    "packed.mha": ("mri", partial(_write_itk, compress=True), b"ElementDataFile = LOCAL\n"),
    "scan.nrrd": ("mri", partial(_write_itk, compress=False), None),
    "packed.nrrd": ("mri", partial(_write_itk, compress=True), b"\n\n"),
    "image.png": ("xray", _save_picture, b""),
    "image.jpg": ("xray", _save_picture, None),
    "image.tif": ("xray", _save_picture, None),
    "deflated.tif": ("xray", partial(_save_picture, compression="tiff_adobe_deflate"), None),
    "image.bmp": ("xray", _save_picture, None),
    "image.npy": ("xray", lambda path: np.save(path, PICTURE), None),
    "scan.npy": ("mri", lambda path: np.save(path, VOLUME), None),
    "archive.npz": ("xray", write_archive, b""),
    "slice.dcm": ("xray", lambda path: save(xray(noise(28, 28)), path), None),
    "deflated.dcm": ("xray", _write_deflated, None),
    "enhanced.dcm": ("mri", lambda path: save(_build_enhanced(), path), None),
}


def _build_enhanced() -> object:
    return enhanced(noise(6, 8, 8).astype(np.uint16), [[0.0, 0.0, 2.0 * k] for k in range(6)])


def list_samples(folder: Path) -> list[Sample]:
    """Write a file of each format, and read the DICOM files of `MEDIM_DATA` if it is set."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for name, (modality, write, marker) in _WRITERS.items():
        path = folder / name
        write(path)
        data = path.read_bytes()
        samples.append(Sample(name, modality, data, None if marker is None else data.index(marker) + len(marker)))
    if "MEDIM_DATA" in os.environ:
        real = Path(os.environ["MEDIM_DATA"])
        for path in sorted([*real.glob("dicom-formats/*.dcm"), *real.glob("xray-dicom/*.dcm")]):
            modality = "xray" if path.name.startswith(("JPEG", "RG", "SC", "mlut", "test", "cr")) else "mri"
            samples.append(Sample(path.name, modality, path.read_bytes(), None))
    return samples


def index_and_read(modality: Modality) -> int:
    """Index the folder `source`, and write the digests of the voxels of each image."""
    code = run_command("index", "source", "--modality", modality, "--jobs", "1", "--no-cache", "--out", "index")
    content: dict[str, object] = {"images": [], "n_rejected": 0}
    if code == 0:
        index = Index.read(Path("index"))
        images = []
        for record in index.records:
            digest = None
            with suppress(ReadError):
                digest = hashlib.sha256(index.open(record).array.tobytes()).hexdigest()
            images.append({"shape": record.shape, "quality": record.quality, "sha256": digest})
        content = {"images": images, "n_rejected": len(index.rejected)}
    Path(VOXEL_FILE).write_text(json.dumps(content))
    return code


def read_digests(sample: Sample, folder: Path) -> frozenset[str]:
    """Read the voxels of an undamaged file; empty if it is no image of the modality."""
    from medim.data.index.index import AllRejectedError, build_index

    (folder / "source").mkdir(parents=True, exist_ok=True)
    (folder / "source" / sample.name).write_bytes(sample.data)
    try:
        index = build_index(folder / "source", sample.modality, remember=False)
    except AllRejectedError:
        return frozenset()
    finally:
        (folder / "source" / sample.name).unlink()
    (folder / "source" / sample.name).write_bytes(sample.data)
    digests = frozenset(hashlib.sha256(index.open(record).array.tobytes()).hexdigest() for record in index.records)
    (folder / "source" / sample.name).unlink()
    return digests


def list_image_cases(base: Path, seed: int) -> list[Case]:
    """List files of each format with damage at random."""
    cases = []
    for sample in list_samples(base.parent / "samples"):
        draw, digests = random.Random(f"{seed} {sample.name}"), read_digests(sample, base.parent / "originals")
        for _ in range(N_PER_FORMAT):
            cases.append(_build_case(sample, draw_damage(sample.data, draw), digests))
    return cases


def list_flip_cases(base: Path, seed: int) -> list[Case]:
    """List compressed MetaImage and NRRD files with one flipped bit in the voxels."""
    cases = []
    for sample in list_samples(base.parent / "samples"):
        if not sample.name.startswith("packed"):
            continue
        draw, digests = random.Random(f"{seed} {sample.name}"), read_digests(sample, base.parent / "originals")
        for _ in range(N_FLIPS):
            changed = bytearray(sample.data)
            place = draw.randrange(sample.protected_from or 0, len(changed))
            changed[place] ^= 1 << draw.randrange(8)
            cases.append(_build_case(sample, RandomDamage(f"bit at {place}", bytes(changed), place), digests))
    return cases


def _build_case(sample: Sample, damage: RandomDamage, digests: frozenset[str]) -> Case:
    is_protected = sample.protected_from is not None and damage.start >= sample.protected_from

    def prepare(folder: Path) -> None:
        """Write the damaged file."""
        (folder / "source").mkdir()
        (folder / "source" / sample.name).write_bytes(damage.data)

    return Case(
        name=f"{sample.name}: {damage.name}",
        kind=sample.name,
        prepare=prepare,
        act=partial(index_and_read, sample.modality),
        check=partial(_check_voxels, digests, is_protected),
    )


def _check_voxels(digests: frozenset[str], is_protected: bool, folder: Path, outcome: Outcome) -> Finding | None:
    """Accept rejected files, images that cannot be opened later, and the voxels of the undamaged file."""
    if outcome.exit_code not in (0, 4):
        return Finding(EXIT_CODE, f"{outcome.exit_code}: {' '.join(outcome.output.split())[-160:]}")
    content = json.loads((folder / VOXEL_FILE).read_text())
    if outcome.exit_code == 0 and len(content["images"]) < len(digests) and not content["n_rejected"]:
        return Finding(OTHER, "images are missing without a row in rejected.csv")
    changed = [image for image in content["images"] if image["sha256"] not in {*digests, None}]
    if changed:
        return Finding(VOXELS if is_protected else UNPROTECTED, f"{len(changed)} images")
    return None


def list_series(folder: Path) -> list[Path]:
    """List folders of real series, or of synthetic ones without `MEDIM_DATA`."""
    if "MEDIM_DATA" in os.environ:
        real = sorted(path for path in Path(os.environ["MEDIM_DATA"], "mri-dicom").glob("*/*") if path.is_dir())
        if real:
            return real
    for number in range(5):
        if not (folder / str(number)).exists():
            write_series(folder / str(number), noise(8, 12, 12, seed=number), SeriesInstanceUID=f"1.2.3.{number}")
    return [folder / str(number) for number in range(5)]


def list_series_cases(base: Path, seed: int) -> list[Case]:
    """List series with one damaged slice: the first, the last or any."""
    cases = []
    series = list_series(base.parent / "series")
    for folder in series:
        draw = random.Random(f"{seed} {folder.name}")
        files = sorted(folder.iterdir(), key=_read_position)
        for number in range(N_PER_SERIES * 10 // len(series)):
            file = (files[0], files[-1], draw.choice(files))[number % 3]
            data = file.read_bytes()
            if number % 4 == 0:
                size = draw.choice([len(data) - 2, len(data) // 2, 2000, 300, 100, 0])
                damage = Damage(f"cut to {size}", data[:size])
            else:
                damage = draw_damage(data, draw)
            cases.append(_build_series_case(folder, files, file, damage))
    return cases


def _read_position(path: Path) -> float:
    import pydicom

    header = pydicom.dcmread(path, stop_before_pixels=True)
    normal = np.cross(header.ImageOrientationPatient[:3], header.ImageOrientationPatient[3:])
    return float(np.dot(normal, header.ImagePositionPatient))


def _read_series_uid(data: bytes) -> str | None:
    """Read the SeriesInstanceUID with pydicom; None if pydicom cannot read it."""
    import pydicom

    try:
        return str(pydicom.dcmread(BytesIO(data), stop_before_pixels=True).get("SeriesInstanceUID", ""))
    except Exception:  # damaged bytes raise errors of many types
        return None


def _build_series_case(series: Path, files: list[Path], file: Path, damage: Damage) -> Case:
    uid = _read_series_uid(file.read_bytes())

    def prepare(folder: Path) -> None:
        """Link the intact slices, and write the damaged one."""
        (folder / "source").mkdir()
        for path in files:
            if path != file:
                os.link(path, folder / "source" / path.name) if path.stat().st_dev == folder.stat().st_dev else (
                    folder / "source" / path.name
                ).write_bytes(path.read_bytes())
        (folder / "source" / file.name).write_bytes(damage.data)

    def check(folder: Path, outcome: Outcome) -> Finding | None:
        """Accept a rejected series, a whole one, and a shorter one with a code of quality or without its own UID."""
        if outcome.exit_code not in (0, 4):
            return Finding(EXIT_CODE, f"{outcome.exit_code}: {' '.join(outcome.output.split())[-160:]}")
        for image in json.loads((folder / VOXEL_FILE).read_text())["images"]:
            if len(files) not in image["shape"] and not image["quality"] and _read_series_uid(damage.data) == uid:
                return Finding(VOXELS, f"shape {image['shape']} of {len(files)} slices without a code")
        return None

    return Case(
        name=f"{series.name}, {file.name} ({files.index(file)}): {damage.name}",
        kind=series.name,
        prepare=prepare,
        act=partial(index_and_read, "mri"),
        check=check,
    )
