"""Real files, cut short or with a flipped byte: a reason or an image of the right shape, and nothing else.

The damage is drawn with a seed. Every damaged file goes through the index and through `read_volume`.
"""

from __future__ import annotations

import gzip
import logging
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medim.data.index.index import AllRejectedError, Index, build_index
from medim.data.readers import ReadError, read_volume
from medim.types import Modality
from tests.data.synthetic import noise, save, write_nifti

NIFTI = ("mri-hippocampus/imagesTr/hippocampus_001.nii.gz", "mri-hippocampus/imagesTr/hippocampus_003.nii.gz")
DICOM: tuple[tuple[str, Modality], ...] = (
    ("mri-dicom/Study1/13_HCropVolume/7.dcm", "mri"),
    ("dicom-formats/MR2_J2KI.dcm", "mri"),
    ("dicom-formats/emri_small_jpeg_ls_lossless.dcm", "mri"),
    ("dicom-formats/MR-SIEMENS-DICOM-WithOverlays.dcm", "mri"),
    ("dicom-formats/RG3_J2KI.dcm", "xray"),
    ("xray-dicom/cr_jpeg_baseline.dcm", "xray"),
)
LIBJPEG = ("Corrupt JPEG data", "Premature end of JPEG")  # said by the decoder, of pixels alone
HEADER = 352  # bytes, where most flips go: those in voxels are another image, and nobody can tell


def damaged(whole: bytes, count: int, seed: int, header: int) -> Iterator[bytes]:
    """Truncations and flipped bytes in turns; every other flip within the header."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        if number % 2:
            yield whole[: int(draw.integers(len(whole)))]
            continue
        raw = bytearray(whole)
        raw[int(draw.integers(header if number % 4 else len(raw)))] ^= int(draw.integers(1, 256))
        yield bytes(raw)


def index_of(source: Path, modality: Modality) -> Index:
    """The index, also where every file is refused."""
    try:
        return build_index([source], modality)
    except AllRejectedError as error:
        return error.index


def survives(source: Path, modality: Modality, shape: tuple[int, ...]) -> int:
    """Check every file of a folder, and count the images."""
    index = index_of(source, modality)
    files = {path.name for path in source.iterdir()}
    assert {Path(record.path).name for record in index.records} | {Path(r.path).name for r in index.rejected} == files
    assert len(index.records) + len(index.rejected) == len(files)
    assert all(rejection.reason != "reader-failed" and rejection.detail for rejection in index.rejected)
    for record in index.records:
        assert sorted(record.shape) == sorted(shape)
        with suppress(ReadError):  # of pixels that the index leaves undecoded
            assert read_volume(source / record.path).shape == record.shape
    for rejection in index.rejected:
        if rejection.reason not in {"duplicate", "conflicting-duplicate", "wrong-modality", "wrong-dimensions"}:
            with pytest.raises(ReadError):
                read_volume(source / rejection.path)
    return len(index.records)


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No warning and no line on a stream: they would quote what the header says of a patient."""
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.WARNING, "medim")  # a command of another test may have lowered it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert caplog.text == ""
    assert [line for line in "".join(capfd.readouterr()).splitlines() if not line.startswith(LIBJPEG)] == []


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "packed"])
@pytest.mark.parametrize("name", NIFTI)
def test_damaged_nifti_files_are_refused_or_keep_their_shape(
    shared_data: Path, tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    shape = read_volume(shared_data / name).shape
    whole = gzip.decompress((shared_data / name).read_bytes())
    tracemalloc.start()
    for number, raw in enumerate(damaged(whole, 25, len(name), HEADER)):
        (tmp_path / f"{number}.{'nii' if pack is bytes else 'nii.gz'}").write_bytes(pack(raw))
    survives(tmp_path, "mri", shape)
    assert tracemalloc.get_traced_memory()[1] < 12 * 4 * np.prod(shape)
    tracemalloc.stop()


@pytest.mark.parametrize("name", NIFTI)
def test_damage_to_a_packed_stream_is_always_noticed(shared_data: Path, tmp_path: Path, name: str) -> None:
    whole = (shared_data / name).read_bytes()
    unharmed = read_volume(shared_data / name)
    for number, raw in enumerate(damaged(whole, 25, 1, len(whole))):
        (tmp_path / f"{number}.nii.gz").write_bytes(raw)
    survives(tmp_path, "mri", unharmed.shape)
    for record in index_of(tmp_path, "mri").records:  # a flip in gzip's own header harms nothing
        np.testing.assert_array_equal(read_volume(tmp_path / record.path).array, unharmed.array)


def test_every_flipped_bit_of_the_size_and_type_of_a_nifti_file_is_noticed(tmp_path: Path) -> None:
    whole = write_nifti(tmp_path / "a" / "whole.nii", noise(4, 5, 6)).read_bytes()
    for place in [*range(40, 56), *range(70, 72), *range(108, 112)]:  # dim, datatype, vox_offset
        for bit in range(8):
            raw = bytearray(whole)
            raw[place] ^= 1 << bit
            (tmp_path / "a" / f"{place}-{bit}.nii").write_bytes(raw)
    index = index_of(tmp_path / "a", "mri")
    assert all(record.shape == (4, 5, 6) for record in index.records)
    unnoticed = {record.image for record in index.records} - {"whole"}
    assert len(index.records) + len(index.rejected) == 8 * 22 + 1
    unused = {f"{place}-{bit}" for place in range(48, 56) for bit in range(8)}
    assert unnoticed <= unused | {"40-2"}  # lengths of axes that are not there; seven axes, the last four of length 1


@pytest.mark.parametrize(("name", "modality"), DICOM)
def test_damaged_dicom_files_are_refused_or_keep_their_shape(
    shared_data: Path, tmp_path: Path, name: str, modality: Modality
) -> None:
    shape = read_volume(shared_data / name).shape
    whole = (shared_data / name).read_bytes()
    for number, raw in enumerate(damaged(whole, 17, len(name), min(4096, len(whole)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.dcm").write_bytes(raw)
        survives(folder, modality, shape)


@pytest.mark.parametrize("name", ["mri-dicom/Study1/13_HCropVolume/7.dcm", "dicom-formats/RG3_J2KI.dcm"])
def test_every_flipped_bit_of_the_size_of_a_dicom_file_is_noticed(shared_data: Path, tmp_path: Path, name: str) -> None:
    original = pydicom.dcmread(shared_data / name)
    modality: Modality = "mri" if original.Modality == "MR" else "xray"
    for keyword in ("Rows", "Columns"):
        for bit in range(12):
            harmed = original.copy()
            setattr(harmed, keyword, getattr(original, keyword) ^ (1 << bit))
            harmed.SOPInstanceUID = harmed.SeriesInstanceUID = f"1.2.{len(keyword)}.{bit}"
            save(harmed, tmp_path / keyword / f"{bit}.dcm")
    index = index_of(tmp_path, modality)
    assert len(index.records) + len(index.rejected) == 24
    for record in index.records:
        with pytest.raises(ReadError):
            index.open(record)
