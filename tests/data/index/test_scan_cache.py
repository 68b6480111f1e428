"""Looking at files once, and again only where they changed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medim.data.index.index import build_index
from medim.data.index.scan_cache import FileScanner, inspect_file
from medim.data.readers import DICOM
from medim.data.readers.inspection import FileInspection, ImageInfo
from medim.data.readers.nifti import NiftiReader
from medim.files import cache_folder
from tests.data.synthetic import dataset, noise, save, write_archive, write_nifti, write_series


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIM_CACHE", str(tmp_path / "cache"))


def test_a_second_look_opens_no_file_and_says_the_same(tmp_path: Path) -> None:
    source = tmp_path / "s"
    write_series(source / "mr")
    write_nifti(source / "a.nii.gz", descrip=b"Avasarala")
    (source / "cut.nii").write_bytes(write_nifti(tmp_path / "whole.nii").read_bytes()[:-9])
    first = build_index(source, "mri")
    second = build_index(source, "mri")
    assert (first.n_inspected, second.n_inspected) == (7, 0)
    assert second == first
    assert second.hash == first.hash


def test_only_what_changed_is_opened(tmp_path: Path) -> None:
    source = tmp_path / "s"
    for name in "abc":
        write_nifti(source / f"{name}.nii.gz", noise(4, 5, 6))
    build_index(source, "mri")
    write_nifti(source / "b.nii.gz", noise(7, 5, 6))
    write_nifti(source / "d.nii.gz")
    (source / "c.nii.gz").unlink()
    again = build_index(source, "mri")
    assert again.n_inspected == 2
    assert {record.image: record.shape[0] for record in again.records} == {"a": 4, "b": 7, "d": 4}


def test_another_time_is_a_change(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "s" / "a.nii")
    build_index(path.parent, "mri")
    os.utime(path, ns=(1, 1))
    assert build_index(path.parent, "mri").n_inspected == 1


def test_a_memory_that_is_damaged_or_not_wanted_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_nifti(tmp_path / "s" / "a.nii").parent
    build_index(source, "mri")
    assert build_index(source, "mri", remember=False).n_inspected == 1
    for file in (cache_folder() / "looks").iterdir():
        file.write_bytes(b"no database" * 1000)
    index = build_index(source, "mri")
    assert (len(index.records), index.n_inspected) == (1, 1)
    assert "cache cannot be used" in caplog.text


def test_no_identity_is_remembered(tmp_path: Path) -> None:
    source = tmp_path / "Avasarala_Chrisjen"
    write_series(source, PatientName="Avasarala^Chrisjen", PatientID="ROCINANTE-4711", Manufacturer="Avasarala Works")
    save(dataset(noise(4, 6), Modality="CT", PatientBirthDate="19610807"), source / "ct.dcm")
    build_index(source, "mri")
    kept = b"".join(file.read_bytes() for file in (cache_folder() / "looks").iterdir()).lower()
    for secret in (b"avasarala", b"chrisjen", b"rocinante", b"19610807", str(tmp_path).encode().lower()):
        assert secret not in kept


def test_processes_see_what_one_process_sees(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_series(tmp_path / "s" / name, noise(70, 4, 6), SeriesInstanceUID=f"1.2.{len(name)}{name == 'two':d}")
    alone = build_index(tmp_path / "s", "mri", remember=False)
    together = build_index(tmp_path / "s", "mri", remember=False, jobs=2)
    assert together == alone
    assert len(alone.records) == 2


def killed(path: Path) -> FileInspection:
    """A look that a decoder brings down, with all of its process."""
    if path.name == "7":
        os._exit(9)
    return FileInspection(images=(ImageInfo(shape=(1, 1), affine=np.eye(4)),))


def test_a_file_that_kills_its_process_is_refused_and_no_other(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(70)]
    sights = FileScanner(jobs=2)(killed, paths)
    assert [sight.rejected[0].reason for sight in sights if sight.rejected] == ["worker-died"]
    assert sights[7].rejected[0].path == paths[7]
    assert all(sight.images[0].files == (path,) for sight, path in zip(sights, paths, strict=True) if sight.images)


def test_a_file_that_grows_while_it_is_looked_at_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "s" / "a.nii", write_nifti(tmp_path / "whole.nii").read_bytes()
    path.parent.mkdir()
    path.write_bytes(whole[:-100])
    seen = NiftiReader.inspect

    def look(reader: NiftiReader, path: Path) -> FileInspection:
        try:
            return seen(reader, path)
        finally:
            path.write_bytes(whole)  # the copy ends

    monkeypatch.setattr(NiftiReader, "inspect", look)
    assert [len(FileScanner(tmp_path)(NiftiReader().inspect, [path])[0].images) for _ in range(2)] == [0, 1]


def test_what_may_pass_without_the_file_changing_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_nifti(tmp_path / "a.nii")
    with monkeypatch.context() as patch:
        patch.setattr(NiftiReader, "inspect", lambda reader, path: broken(path))
        assert FileScanner(tmp_path)(NiftiReader().inspect, [path])[0].rejected[0].reason == "reader-failed"
    assert FileScanner(tmp_path)(NiftiReader().inspect, [path])[0].images


def broken(path: Path) -> FileInspection:
    """A look with a mistake in it."""
    raise RuntimeError("Avasarala")


def test_a_reader_that_fails_refuses_the_file_alone(tmp_path: Path) -> None:
    (refused,) = inspect_file(broken, tmp_path / "a").rejected
    assert refused.reason == "reader-failed"
    assert "Avasarala" not in refused.detail


@pytest.mark.parametrize("name", ["a.nii.gz", "b.npz", "c.dcm"])
def test_a_sight_comes_back_as_it_was_kept(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "b.npz":
        from medim.data.readers.raster import NumpyReader

        look = NumpyReader().inspect
        write_archive(path)
    else:
        look = NiftiReader().inspect if "nii" in name else DICOM.inspect
        write_nifti(path) if "nii" in name else save(dataset(noise(4, 6)), path)
    seen = inspect_file(look, path)
    kept, recalled = (FileScanner(tmp_path)(look, [path])[0] for _ in range(2))
    for found, expected in zip(recalled.images, seen.images, strict=True):
        np.testing.assert_array_equal(found.affine, expected.affine)
    flat = [
        replace(sight, images=tuple(replace(f, affine=None) for f in sight.images)) for sight in (kept, recalled, seen)
    ]
    assert flat[0] == flat[1] == flat[2]
