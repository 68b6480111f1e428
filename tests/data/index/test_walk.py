"""Everything in a source is a file or is named as none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from medim.data.index.index import Index, build_index
from medim.data.index.scan_cache import inspect_file
from medim.data.index.walk import list_files, list_readable_files
from medim.data.readers import ReadError, read_volume
from medim.data.readers.nifti import NiftiReader
from medim.types import UserError
from tests.data.synthetic import noise, write_nifti


def test_pipes_and_broken_links_are_named_and_not_waited_for(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "s" / "a.nii").parent
    os.mkfifo(source / "pipe.dcm")
    (source / "nowhere").symlink_to("gone")
    (source / "circle").symlink_to("circle")
    index = build_index(source, "mri", keep_names=True)
    assert [record.image for record in index.records] == ["a"]
    assert {r.path: r.reason for r in index.rejected} == dict.fromkeys(("circle", "nowhere", "pipe.dcm"), "not-a-file")
    with pytest.raises(ReadError, match="found no file"):
        read_volume(source / "pipe.dcm")


def test_what_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "closed/b", "locked"):
        write_nifti(tmp_path / f"{name}.nii")
    scandir, access = os.scandir, os.access

    def refusing(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)  # root, who runs the tests in a container, may open all
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in path.name and access(path, mode))
    files, strays = list_files([tmp_path])
    assert files == [tmp_path / "a.nii"]
    assert {stray.path.name: stray.reason for stray in strays} == {"closed": "unreadable", "locked.nii": "unreadable"}


def test_a_file_that_vanishes_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    path.unlink()
    assert [refused.reason for refused in inspect_file(NiftiReader().inspect, path).rejected] == ["unreadable"]


def test_a_tree_deeper_than_pythons_stack_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        Path("d").mkdir()
        os.chdir("d")
    Path("end").touch()
    try:
        assert [path.name for path in list_readable_files([tmp_path])] == ["end"]
    finally:  # pytest itself could not remove it
        Path("end").unlink()
        for _ in range(1100):
            os.chdir("..")
            Path("d").rmdir()


def test_names_that_are_no_text_are_hidden_and_found_again(tmp_path: Path) -> None:
    source = tmp_path / "s"
    folder = source / os.fsdecode(b"\xff")
    folder.mkdir(parents=True)
    write_nifti(tmp_path / "a.nii").rename(folder / os.fsdecode(b"\xe9t\xe9.nii"))
    index = build_index(source, "mri")
    index.write(tmp_path / "index")
    again = Index.read(tmp_path / "index")
    assert again.records[0].path.isascii()
    assert again.open(again.records[0]).shape == (4, 5, 6)


def test_a_name_with_a_number_sign_is_a_name(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a#1.nii.gz")
    write_nifti(tmp_path / "b#" / "c#2.nii.gz", noise(4, 5, 6, 2))
    index = build_index(tmp_path, "mri")
    assert [record.path for record in index.records] == ["a#1.nii.gz", "b#/c#2.nii.gz#0", "b#/c#2.nii.gz#1"]
    assert [index.open(record).shape for record in index.records] == [(4, 5, 6)] * 3


def test_suffixes_in_capitals_are_suffixes(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz").rename(tmp_path / "sub-01_T1w.NII.GZ")
    (tmp_path / "sub-01_T1w.JSON").write_text("{}")
    index = build_index(tmp_path, "mri")
    assert [(record.image, record.sequence) for record in index.records] == [("sub-01_T1w", "T1w")]
    assert index.rejected == ()


def test_a_folder_met_twice_is_walked_by_its_first_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "b" / "x.nii")
    (tmp_path / "a").symlink_to("b")
    scandir = os.scandir
    found = []
    for backwards in (False, True):

        @contextmanager
        def ordered(folder: Path, backwards: bool = backwards) -> Iterator[list[os.DirEntry[str]]]:
            with scandir(folder) as entries:
                yield sorted(entries, key=lambda entry: entry.name, reverse=backwards)

        monkeypatch.setattr(os, "scandir", ordered)
        found.append(list_readable_files([tmp_path]))
    assert found == [[tmp_path / "a" / "x.nii"]] * 2


def test_a_mask_that_is_a_link_is_no_image(tmp_path: Path) -> None:
    store = write_nifti(tmp_path / "store" / "k.nii", (noise(4, 5, 6) > 500).astype(np.uint8))
    source = write_nifti(tmp_path / "s" / "a.nii").parent
    (source / "m.nii").symlink_to(store)
    (source / "labels.csv").write_text("image,mask\na.nii,m.nii\n")
    index = build_index(source, "mri")
    assert [(record.image, record.mask) for record in index.records] == [("a", "m.nii")]


def test_a_mask_with_a_name_too_long_for_a_file_is_no_mask(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "s" / "a.nii").parent
    (source / "labels.csv").write_text(f"image,mask\na.nii,{'m' * 5000}\n")
    with pytest.raises(UserError, match="line 2: expected the path of a mask"):
        build_index(source, "mri")


def test_a_link_to_a_parent_or_to_the_operating_system_is_rejected_and_not_walked(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "s" / "a.nii").parent
    for name, target in {"root": "/", "up": "..", "self": ".", "kernel": "/proc", "null": "/dev/null"}.items():
        (source / name).symlink_to(target)
    write_nifti(tmp_path / "other" / "b.nii")
    (source / "b").symlink_to(tmp_path / "other")
    index = build_index(source, "mri", keep_names=True, remember=False)
    assert [record.image for record in index.records] == ["a", "b/b"]
    assert {r.path: r.reason for r in index.rejected} == dict.fromkeys(
        ("kernel", "null", "root", "self", "up"), "outside-folder"
    )


@pytest.mark.parametrize("source", ["/", "/dev", "/proc/self", "/sys/kernel"])
def test_a_folder_of_the_operating_system_is_no_source(source: str) -> None:
    with pytest.raises(UserError, match="one of the operating system"):
        build_index(Path(source), "mri", remember=False)
