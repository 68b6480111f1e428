"""The index: what is in it, what is not and why, and that nobody can be found in it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from typer.testing import CliRunner

from medim.cli import app
from medim.data.index.index import AllRejectedError, Index, build_index, is_index
from medim.data.index.tables import TableFile
from medim.data.loading.splits import assign_splits
from medim.data.readers import ReadError, read_volume
from medim.privacy import hide_name, scrubbed_name
from medim.types import Modality, UsageError, UserError
from tests.data.synthetic import (
    dataset,
    noise,
    save,
    write_archive,
    write_decathlon,
    write_nifti,
    write_series,
    xray,
)

NAMES = ("avasarala", "chrisjen", "thanos", "inevitable", "pgbm-002", "pgbm-006", "16d7f894", "lestrade")


def reasons(index: Index) -> dict[str, str]:
    return {rejection.path: rejection.reason for rejection in index.rejected}


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 9, seed=seed).astype(np.uint8)).save(path)
    return path


def everything_written(index: Index, out: Path) -> str:
    """Every byte of a written index, parquet unpacked, in lower case."""
    index.write(out)
    texts = [path.read_bytes().decode("latin-1") for path in sorted(out.iterdir())]
    if (out / "index.parquet").exists():
        import pyarrow.parquet

        texts.append(str(pyarrow.parquet.read_table(out / "index.parquet").to_pylist()))
    return "\n".join(texts).lower()


# --- real sources, row by row of their README


def test_the_hippocampus_set_is_198_images_of_68_subjects(shared_data: Path) -> None:
    began = time.monotonic()
    index = build_index(shared_data / "mri-hippocampus", "mri")
    assert time.monotonic() - began < 30
    assert len(index.records) == 198
    assert len({record.subject for record in index.records}) == 68
    assert index.rejected == ()
    assert index.classes == ("Anterior", "Posterior")
    assert [record.path for record in index.records] == sorted(record.path for record in index.records)
    record = index.records[5]
    mask, image = index.open_mask(record), index.open(record)
    assert mask.shape == image.shape == record.shape
    assert mask.array.dtype == np.uint8
    assert set(np.unique(mask.array)) == {0, 1, 2}


def test_the_mri_series_are_5_of_2_subjects(shared_data: Path) -> None:
    index = build_index(shared_data / "mri-dicom", "mri", keep_names=True)
    assert [record.image for record in index.records] == [
        "Study1/13_HCropVolume",
        "Study1/36459-FLAIRreg-76244",
        "Study1/37916-T2reg-88910",
        "Study2/14-T1post-22014",
        "Study2/14_HCropVolume",
    ]
    assert Counter(Counter(record.subject for record in index.records).values()) == {2: 1, 3: 1}
    assert index.rejected == ()
    assert index.records[3].shape == (512, 512, 24)
    assert index.records[3].field_strength == 3.0


def test_the_xrays_are_4_and_a_duplicate(shared_data: Path) -> None:
    index = build_index(shared_data / "xray-dicom", "xray")
    assert [record.image for record in index.records] == ["cr_jpeg_baseline", "test1", "test2", "test3"]
    assert reasons(index) == {"test4.dcm": "duplicate"}


def test_the_difficult_dicom_files_are_sorted_out(shared_data: Path) -> None:
    index = build_index(shared_data / "dicom-formats", "mri", keep_names=True)
    assert {
        record.image: record.shape[2] if "emri" in record.image else min(record.shape) for record in index.records
    } == {  # the given names of two patients are MR2 and RG3
        scrubbed_name("MR2_J2KI"): 1,
        "MR-SIEMENS-DICOM-WithOverlays": 1,
        "emri_small": 10,
    }
    assert reasons(index) == {
        "emri_small_jpeg_ls_lossless.dcm": "duplicate",
        "JPEG-LL.dcm": "wrong-modality",
        "OBXXXX1A_rle.dcm": "wrong-modality",
        scrubbed_name("RG3_J2KI.dcm"): "wrong-modality",
        "SC_rgb.dcm": "wrong-modality",
        "mlut_18.dcm": "wrong-modality",
        "liver.dcm": "not-an-image",
    }
    for record in index.records:
        assert index.open(record).array.std() > 0
    flat = build_index(shared_data / "dicom-formats", "xray")
    assert [record.image for record in flat.records] == [scrubbed_name("RG3_J2KI")]
    assert len(flat.rejected) == 9


def test_bad_inputs_leave_one_unlabelled_image(shared_data: Path) -> None:
    index = build_index(shared_data / "bad-inputs", "mri")
    assert [(record.image, record.mask, record.label) for record in index.records] == [
        ("imagesTr/hippocampus_118", None, None)
    ]
    assert reasons(index) == {
        "imagesTr/hippocampus_010.nii.gz": "empty-file",
        "imagesTr/hippocampus_281.nii.gz": "label-off-grid",
        "imagesTr/hippocampus_truncated.nii.gz": "truncated",
        "labelsTr/hippocampus_010.nii.gz": "label-without-image",
        "labelsTr/hippocampus_281.nii.gz": "label-off-grid",
        "labelsTr/hippocampus_999.nii.gz": "label-without-image",
        "labelsTr/hippocampus_truncated.nii.gz": "label-without-image",
    }


def test_an_archive_of_5222_images_is_indexed_with_its_splits(shared_data: Path) -> None:
    index = build_index(shared_data / "xray-pneumonia", "xray")
    assert Counter(record.split for record in index.records) == {"train": 4698, "val": 524}
    assert index.classes == index.labels == ("normal", "pneumonia")
    archive = np.load(shared_data / "xray-pneumonia" / "pneumoniamnist.npz")
    record = index.records[4698 + 17]
    assert record.path == "pneumoniamnist.npz#val/17"
    assert record.label == ("normal", "pneumonia")[archive["val_labels"][17, 0]]
    np.testing.assert_array_equal(index.open(record).array[0], archive["val_images"][17])


@pytest.mark.parametrize(("name", "modality"), [("mri-dicom", "mri"), ("xray-dicom", "xray"), ("dicom-formats", "mri")])
def test_no_planted_name_is_in_any_byte_of_an_index(
    shared_data: Path, tmp_path: Path, name: str, modality: Modality
) -> None:
    index = build_index(shared_data / name, modality)
    written = everything_written(index, tmp_path / "index") + repr(index.records) + repr(index.rejected)
    assert [planted for planted in NAMES if planted in written.lower()] == []


# --- identities


PLANTED = {
    "PatientName": "Zzyzx^Quillon",
    "PatientID": "PLANTED-77",
    "AccessionNumber": "ACC-90210",
    "PatientBirthDate": "19610412",
    "InstitutionName": "Saint Planted Hospital",
    "ReferringPhysicianName": "Housemann^Gregor",
    "StationName": "PLANTEDSTATION",
    "StudyDate": "20200119",
    "StudyInstanceUID": "1.2.826.0.1.7777.1",
    "SeriesInstanceUID": "1.2.826.0.1.7777.2",
}
TRACES = ("zzyzx", "quillon", "planted", "90210", "19610412", "1961-04", "housemann", "20200119", "2020-01-19", "7777")


def hospital(folder: Path) -> Path:
    """A source whose folders and files are named after the patient."""
    root = folder / "Quillon Zzyzx"
    series = root / "PLANTED-77" / "2020-01-19" / "T1_axial"
    for path in write_series(series, **PLANTED):
        path.rename(series / f"MR.1.2.826.0.1.7777.2.Zzyzx_{path.name}")
    save(dataset(noise(4, 6), **PLANTED | {"Modality": "CT"}), root / "ACC-90210.dcm")
    (root / "PLANTED-77" / "report.txt").write_text("not an image")
    return root


@pytest.mark.parametrize("light", [False, True])
def test_folders_and_files_named_after_a_patient_are_hidden_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, light: bool
) -> None:
    if light:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    caplog.set_level(logging.DEBUG)
    index = build_index(hospital(tmp_path), "mri")
    written = everything_written(index, tmp_path / "index") + repr(index.records) + repr(index.rejected) + caplog.text
    assert [trace for trace in TRACES if trace in written.lower()] == []
    assert "t1_axial" in written
    assert (tmp_path / "index" / ("index.csv" if light else "index.parquet")).exists()
    again = Index.read(tmp_path / "index")
    assert again == index
    assert again.root == tmp_path / "Quillon Zzyzx"
    np.testing.assert_array_equal(again.open(again.records[0]).array, index.open(index.records[0]).array)
    assert again.locate(again.records[0]).name.startswith("MR.1.2.826.0.1.7777.2.Zzyzx_0")
    again.write(tmp_path / "second")
    summary = (tmp_path / "second" / "summary.json").read_text()
    assert summary == (tmp_path / "index" / "summary.json").read_text()


def test_an_error_of_opening_names_the_hidden_path(tmp_path: Path) -> None:
    root = hospital(tmp_path)
    index = build_index(root, "mri")
    for path in sorted(root.rglob("*Zzyzx_*.dcm"))[:1]:
        pydicom_cut = path.read_bytes()[:600]
        path.write_bytes(pydicom_cut)
    with pytest.raises(UserError) as caught:
        index.open(index.records[0])
    assert [trace for trace in TRACES if trace in str(caught.value).lower()] == []


@pytest.mark.parametrize(
    ("issuers", "count"),
    [
        (("Ganymede", "Europa", "Ganymede"), 2),  # two hospitals that number their patients alike
        (("Ganymede", None, "Ganymede"), 1),
        ((None, None, "Ganymede"), 1),
        (("Ganymede", None, "Europa"), 1),  # the second may be of either: no subject may stand in two splits
    ],
)
def test_a_patient_id_of_two_issuers_is_two_subjects_unless_an_issuer_is_missing(
    tmp_path: Path, issuers: tuple[str | None, ...], count: int
) -> None:
    for number, issuer in enumerate(issuers):
        tags = {"IssuerOfPatientID": issuer} if issuer else {}
        save(xray(noise(4, 6, seed=number), StudyInstanceUID=f"1.2.{number}", **tags), tmp_path / f"{number}.dcm")
    subjects = [record.subject for record in build_index(tmp_path, "xray").records]
    assert len(set(subjects)) == count
    assert subjects[0] == subjects[2] or issuers[0] != issuers[2]
    assert all(len(subject) == 14 and subject.startswith("s-") for subject in subjects)


def test_without_a_patient_id_a_study_is_a_subject(tmp_path: Path) -> None:
    for name, study in (("a", "1.2.3"), ("b", "1.2.3"), ("c", "1.2.4")):
        save(xray(noise(4, 6), StudyInstanceUID=study, PatientID=None), tmp_path / f"{name}.dcm")
    subjects = [record.subject for record in build_index(tmp_path, "xray").records]
    assert subjects[0] == subjects[1] != subjects[2]


# --- subjects of files


def subjects_of(index: Index) -> list[int]:
    """The subject of each record as a number in order of appearance."""
    seen: list[str] = []
    for record in index.records:
        if record.subject not in seen:
            seen.append(record.subject)
    return [seen.index(record.subject) for record in index.records]


def test_a_bids_tree_says_whose_an_image_is(tmp_path: Path) -> None:
    for place in ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-01/ses-b/anat/sub-01_ses-b_T1w", "sub-02/anat/sub-02_T2w"):
        write_nifti(tmp_path / f"{place}.nii.gz")
    write_nifti(tmp_path / "sub-02/anat/sub-02_dseg.nii.gz")
    (tmp_path / "sub-02/anat/sub-02_T2w.json").write_text("{}")
    (tmp_path / "dataset_description.json").write_text("{}")
    index = build_index(tmp_path, "mri")
    assert subjects_of(index) == [0, 0, 1]
    assert index.records[0].session != index.records[1].session
    assert [record.sequence for record in index.records] == ["T1w", "T1w", "T2w"]
    assert reasons(index) == {"sub-02/anat/sub-02_dseg.nii.gz": "derived-label"}


def test_the_names_in_dicom_files_beside_a_bids_tree_are_hidden(tmp_path: Path) -> None:
    write_nifti(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    (tmp_path / "dataset_description.json").write_text("{}")
    write_series(tmp_path / "sourcedata" / "Avasarala_Chrisjen" / "s", PatientName="Avasarala^Chrisjen")
    told = reasons(build_index(tmp_path, "mri"))
    assert set(told.values()) == {"source-data"}
    assert not any("Avasarala" in path for path in told)


def test_a_table_of_subjects_in_one_folder_labels_nobody_in_another(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_nifti(tmp_path / folder / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    write_nifti(tmp_path / "b" / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
    (tmp_path / "a" / "labels.csv").write_text("subject,label\nsub-01,ad\n")
    assert [record.label for record in build_index(tmp_path, "mri").records] == ["ad", None, None]


def test_a_folder_above_that_is_called_like_a_subject_is_none(tmp_path: Path) -> None:
    root = tmp_path / "sub-study" / "scans"
    for place in ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-02/ses-a/anat/sub-02_ses-a_T1w", "sub-03/t1"):
        write_nifti(root / f"{place}.nii.gz")
    assert subjects_of(build_index(root, "mri")) == [0, 1, 2]


def test_without_any_word_of_it_a_stem_is_a_subject_and_a_folder_where_stems_repeat(tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii.gz"):
        write_nifti(tmp_path / "stems" / name)
    assert subjects_of(build_index(tmp_path / "stems", "mri")) == [0, 1]
    for name in ("p1/t1.nii", "p1/t2.nii", "p2/t1.nii", "p2/t2.nii"):
        write_nifti(tmp_path / "folders" / name)
    assert subjects_of(build_index(tmp_path / "folders", "mri")) == [0, 0, 1, 1]


def test_a_file_name_that_every_sequence_has_is_one_subject_wherever_the_source_lies(tmp_path: Path) -> None:
    indices = []
    for place in ("here", "there/deeper"):
        for name in ("T1/ann.nii", "T1/bob.nii", "T1/cy.nii", "T2/ann.nii", "T2/bob.nii", "T2/cy.nii"):
            write_nifti(tmp_path / place / name)
        indices.append(build_index(tmp_path / place, "mri"))
    assert subjects_of(indices[0]) == [0, 1, 2, 0, 1, 2]
    assert [r.subject for r in indices[0].records] == [r.subject for r in indices[1].records]


def test_subjects_that_are_guessed_from_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("p1/t1.nii", "p1/t2.nii", "p2/t1.nii", "p2/t2.nii"):
        write_nifti(tmp_path / name)
    build_index(tmp_path, "mri").log_unidentified()
    assert "No subject IDs: guessed 2 subjects for 4 images from file and folder names" in caplog.text


def test_a_table_of_subjects_in_the_source_is_used_and_one_that_is_given_wins(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path / "source")
    (source / "subjects.csv").write_text("image,subject\na.nii.gz,x\nimagesTr/b.nii.gz,x\nc,y\n")
    assert subjects_of(build_index(source, "mri")) == [0, 0, 1]
    (tmp_path / "mine.csv").write_text("Image;Subject;split\na;x;train\nb;y;val\nc;y;val\n")
    index = build_index(source, "mri", subjects=tmp_path / "mine.csv")
    assert subjects_of(index) == [0, 1, 1]
    assert [record.split for record in index.records] == ["train", "val", "val"]


# --- labels and masks


def test_labels_are_joined_by_image_or_by_subject(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "b", "c"):
        write_nifti(source / f"{name}.nii.gz")
    (tmp_path / "l.csv").write_text("image,label\na.nii.gz,sick\nb,well\n")
    index = build_index(source, "mri", labels=tmp_path / "l.csv")
    assert [record.label for record in index.records] == ["sick", "well", None]
    assert index.classes == ("sick", "well")
    (source / "labels.csv").write_text("subject,label\na,10\nc,9\n")
    index = build_index(source, "mri")
    assert [record.label for record in index.records] == ["10", None, "9"]
    assert index.classes == ("9", "10")


def test_labels_of_dicom_are_joined_by_folder_patient_or_uid(tmp_path: Path) -> None:
    for name in ("p1", "p2", "p3"):
        write_series(tmp_path / "s" / name, PatientID=name.upper(), SeriesInstanceUID=f"1.2.{name[1]}")
    (tmp_path / "l.csv").write_text("image,subject,label\np1,,one\n,P2,two\n1.2.3,,three\n")
    index = build_index(tmp_path / "s", "mri", labels=tmp_path / "l.csv")
    labels = {record.image: record.label for record in index.records}
    assert labels == {scrubbed_name("p1"): "one", scrubbed_name("p2"): "two", scrubbed_name("p3"): "three"}


def test_masks_are_joined_and_are_no_images(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "b"):
        write_nifti(source / f"{name}.nii.gz")
        write_nifti(source / f"{name}_tumour.nii.gz", (noise(4, 5, 6) > 500).astype(np.uint8))
    table = "image,mask\na.nii.gz,a_tumour.nii.gz\nb.nii.gz,source/b_tumour.nii.gz\n"
    (tmp_path / "l.csv").write_text(table)
    index = build_index(source, "mri", labels=tmp_path / "l.csv")
    assert [(record.image, record.mask) for record in index.records] == [
        ("a", "a_tumour.nii.gz"),
        ("b", "b_tumour.nii.gz"),
    ]
    assert index.classes == ("label-1",)
    assert index.rejected == ()


def test_rows_that_mean_nothing_are_counted_without_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_nifti(tmp_path / "s" / "a.nii")
    (tmp_path / "l.csv").write_text("image,label\na,1\nZzyzx,1\n")
    build_index(tmp_path / "s", "mri", labels=tmp_path / "l.csv")
    assert "1 of 2 rows do not match any image (lines 3)" in caplog.text
    assert "Zzyzx" not in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,label\nnone,1\n", "none of the 1 rows"),
        ("Scan,label\na,1\n", "columns image or subject, and label or mask; got Scan, label"),
        ("image,label\na,1\na.nii,2\n", "line 3: expected one label per image"),
        ("image,label\nt1,1\n", "matches 2 images"),
        ("image,mask\na,nowhere.nii\n", "line 2: expected the path of a mask"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(tmp_path: Path, table: str, message: str) -> None:
    for name in ("a", "p/t1", "q/t1"):
        write_nifti(tmp_path / "s" / f"{name}.nii")
    (tmp_path / "l.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        build_index(tmp_path / "s", "mri", labels=tmp_path / "l.csv")


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii")
    with pytest.raises(UserError, match=r"none\.csv"):
        build_index(tmp_path, "mri", subjects=tmp_path / "none.csv")


# --- Decathlon folders


def test_what_dataset_json_does_not_list_is_unlabelled_or_refused(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path)
    write_nifti(source / "imagesTr" / "extra.nii.gz")
    write_nifti(source / "labelsTr" / "extra.nii.gz", np.ones((4, 5, 6), np.uint8))
    write_nifti(source / "labelsTr" / "alone.nii.gz", np.ones((4, 5, 6), np.uint8))
    write_nifti(source / "imagesTs" / "t.nii.gz")
    (source / "imagesTr" / "b.nii.gz").unlink()
    index = build_index(source, "mri", keep_names=True)
    assert {record.image: record.mask for record in index.records} == {
        "imagesTr/a": "labelsTr/a.nii.gz",
        "imagesTr/c": "labelsTr/c.nii.gz",
        "imagesTr/extra": None,
        "imagesTs/t": None,
    }
    assert reasons(index) == {
        "imagesTr/b.nii.gz": "missing",
        "labelsTr/alone.nii.gz": "label-without-image",
        "labelsTr/b.nii.gz": "label-without-image",
        "labelsTr/extra.nii.gz": "label-not-listed",
    }
    assert index.classes == ("one", "two")


def test_a_mask_on_another_grid_takes_its_image_along(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path)
    write_nifti(source / "labelsTr" / "a.nii.gz", np.ones((4, 5, 6), np.uint8), np.diag([1.0, 1.0, 1.1, 1.0]))
    write_nifti(source / "labelsTr" / "b.nii.gz", np.full((4, 5, 6), 3, np.uint8))
    write_nifti(source / "labelsTr" / "c.nii.gz", np.full((4, 5, 6), 0.5, np.float32))
    with pytest.raises(AllRejectedError) as caught:
        build_index(source, "mri")
    assert caught.value.exit_code == 4
    assert reasons(caught.value.index) == {
        "imagesTr/a.nii.gz": "label-off-grid",
        "labelsTr/a.nii.gz": "label-off-grid",
        "imagesTr/b.nii.gz": "unknown-class",
        "labelsTr/b.nii.gz": "unknown-class",
        "imagesTr/c.nii.gz": "label-unreadable",
        "labelsTr/c.nii.gz": "not-a-mask",
    }
    caught.value.index.write(tmp_path / "out")
    assert "label-off-grid" in (tmp_path / "out" / "rejected.csv").read_text()


def test_a_mask_in_another_orientation_is_on_the_grid(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path, names=["a"])
    mask = index_mask = (noise(4, 5, 6) % 3).astype(np.uint8)
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = 3
    write_nifti(source / "labelsTr" / "a.nii.gz", mask[::-1], flipped)
    index = build_index(source, "mri")
    np.testing.assert_array_equal(index.open_mask(index.records[0]).array[0], index_mask)


def test_classes_by_name_are_understood_too(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path)
    description = json.loads((source / "dataset.json").read_text())
    description["labels"] = {"background": 0, "two": 2, "one": 1}
    (source / "dataset.json").write_text(json.dumps(description))
    assert build_index(source, "mri").classes == ("one", "two")


@pytest.mark.parametrize("labels", [{"0": "b", "99999999": "x"}, {"b": 0, "x": -1}, {"b": 0, "x": [1, 10**9]}])
def test_a_class_above_the_highest_value_of_a_mask_is_an_error(tmp_path: Path, labels: dict[str, Any]) -> None:
    source = write_decathlon(tmp_path)
    description = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(description | {"labels": labels}))
    with pytest.raises(UserError, match='expected mask values from 0 to 65535 in "labels", got'):
        build_index(source, "mri")


# --- pictures


def test_class_folders_are_labels(tmp_path: Path) -> None:
    for k in range(20):
        picture(tmp_path / ("sick", "well")[k // 10] / f"{k}.png", k)
    index = build_index(tmp_path, "xray")
    assert [record.label for record in index.records] == ["sick"] * 10 + ["well"] * 10
    assert index.records[0].split is None


def test_split_folders_are_splits(tmp_path: Path) -> None:
    kinds = [(split, label) for split in ("train", "val") for label in ("sick", "well")]
    for k in range(20):
        picture(tmp_path.joinpath(*kinds[k // 5]) / f"{k}.jpeg", k)
    index = build_index(tmp_path, "xray")
    assert [(r.split, r.label) for r in index.records] == [kind for kind in kinds for _ in range(5)]


def test_pictures_in_folders_of_classes_are_subjects_of_their_own_though_their_numbers_repeat(tmp_path: Path) -> None:
    for k in range(40):
        picture(tmp_path / ("train", "val")[k // 20] / ("sick", "well")[k // 10 % 2] / f"{k % 10}.png", k)
    index = build_index(tmp_path, "xray")
    assert {record.label for record in index.records} == {"sick", "well"}
    assert len({record.subject for record in index.records}) == 40


def test_a_folder_a_patient_is_no_class(tmp_path: Path) -> None:
    for k, name in enumerate(("zzyzx/1", "quillon/1", "roe/1")):
        picture(tmp_path / f"{name}.png", k)
    index = build_index(tmp_path, "xray")
    assert [record.label for record in index.records] == [None] * 3
    assert len({record.subject for record in index.records}) == 3


def test_folders_of_patients_are_subjects_and_their_names_no_classes(tmp_path: Path) -> None:
    for k in range(9):
        picture(tmp_path / ("MUELLER_HANS", "MEIER_EVA", "ABEL_TOM")[k % 3] / f"view_{k}.png", k)
    index = build_index(tmp_path, "xray")
    assert index.labels == ()
    people = Counter(record.subject for record in index.records)
    assert list(people.values()) == [3, 3, 3]


# --- sources


def test_every_file_is_an_image_or_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "empty").touch()
    picture(tmp_path / "p.png")
    (tmp_path / ".hidden").mkdir()
    write_nifti(tmp_path / ".hidden" / "b.nii.gz")
    index = build_index(tmp_path, "mri")
    assert [record.image for record in index.records] == ["a"]
    assert reasons(index) == {"README.md": "not-an-image", "empty": "empty-file", "p.png": "wrong-dimensions"}


def test_several_sources_become_one_index(tmp_path: Path) -> None:
    one, other = write_nifti(tmp_path / "x" / "a.nii"), tmp_path / "y"
    write_series(other)
    index = build_index([one, other], "mri")
    assert index.root == tmp_path
    assert [record.image for record in index.records] == ["x/a", "y"]
    assert [index.open(record).shape for record in index.records] == [(4, 5, 6), (6, 4, 5)]


def test_two_series_of_one_folder_have_keys_of_their_own(tmp_path: Path) -> None:
    write_series(tmp_path, SeriesInstanceUID="1.2.1")
    for path in write_series(tmp_path / "t", noise(5, 4, 6, seed=1), SeriesInstanceUID="1.2.2"):
        path.rename(tmp_path / f"x{path.name}")
    (tmp_path / "t").rmdir()
    index = build_index(tmp_path, "mri")
    assert len({record.image for record in index.records}) == 2
    index.write(tmp_path.parent / "out")
    again = Index.read(tmp_path.parent / "out")
    for record, seed in zip(again.records, (0, 1), strict=True):
        assert again.open(record).array.sum() == noise(5, 4, 6, seed=seed).sum()


def test_a_series_spread_over_folders_is_one_image(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s" / "a")
    (tmp_path / "s" / "b").mkdir()
    for path in paths[3:]:
        path.rename(tmp_path / "s" / "b" / path.name)
    index = build_index(tmp_path / "s", "mri")
    assert [record.shape for record in index.records] == [(6, 4, 5)]
    index.write(tmp_path / "out")
    again = Index.read(tmp_path / "out")
    np.testing.assert_array_equal(again.open(again.records[0]).array, index.open(index.records[0]).array)
    fewer = replace(again.records[0], shape=(6, 4, 4))
    with pytest.raises(ReadError, match="medim index"):
        again.open(fewer)


def test_nothing_there_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file or folder here, found none"):
        build_index(tmp_path / "nowhere", "mri")
    with pytest.raises(UserError, match="expected image files, found none") as caught:
        build_index(tmp_path, "mri")
    assert caught.value.exit_code == 1
    with pytest.raises(UserError):
        build_index([], "mri")
    with pytest.raises(UsageError, match="mri or xray"):
        build_index(tmp_path, "ct")  # type: ignore[arg-type]


def test_images_of_another_modality_are_counted_and_the_modality_to_use_is_named(tmp_path: Path) -> None:
    write_decathlon(tmp_path)
    (tmp_path / "imagesTr" / "broken.nii.gz").write_text("junk")
    with pytest.raises(
        AllRejectedError,
        match=rf"^{hide_name(tmp_path.name)}: expected 2D xray images, got \d 3D images; "
        r"files: .*1 unreadable.*; labels: \d label-[a-z-]+\. Use them as modality mri\.$",
    ):
        build_index(tmp_path, "xray", remember=False)


def test_a_table_that_does_not_exist_is_reported_with_its_option(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii")
    for option in ("labels", "subjects"):
        with pytest.raises(UserError, match=rf"none\.csv: no such file\. Check --{option}\.$"):
            build_index(tmp_path, "mri", remember=False, **{option: tmp_path / "none.csv"})  # type: ignore[arg-type]


def test_when_every_input_is_refused_the_reasons_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").touch()
    picture(tmp_path / "b.png")
    with pytest.raises(
        AllRejectedError, match=r"got 1 2D image; files: 1 empty-file\. Use them as modality xray\.$"
    ) as caught:
        build_index(tmp_path, "mri")
    assert caught.value.exit_code == 4
    assert len(pickle.loads(pickle.dumps(caught.value)).index.rejected) == 2


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    write_nifti(tmp_path / "s" / "a.nii")
    (tmp_path / "s" / "loop").symlink_to(tmp_path / "s")
    assert len(build_index(tmp_path / "s", "mri").records) == 1


def test_an_index_written_into_its_source_is_not_part_of_it(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii")
    before = build_index(tmp_path, "mri")
    before.write(tmp_path / "index")
    assert is_index(tmp_path / "index")
    assert not is_index(tmp_path)
    assert build_index(tmp_path, "mri") == before


# --- the written index


def sample(folder: Path) -> Index:
    write_archive(folder / "x.npz")
    save(xray(noise(4, 6), PixelSpacing=[0.1, 1 / 3]), folder / "d.dcm")
    (folder / "junk.txt").write_text("junk, with a comma")
    return build_index(folder, "xray")


@pytest.mark.parametrize("light", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: bool) -> None:
    if light:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    index = sample(tmp_path / "s")
    index.write(tmp_path / "i")
    table = tmp_path / "i" / ("index.csv" if light else "index.parquet")
    for path in (tmp_path / "i", table):
        again = Index.read(path)
        assert again == index
        assert again.hash == index.hash
        assert again.records[0].spacing == index.records[0].spacing
    summary = json.loads((tmp_path / "i" / "summary.json").read_text())
    assert summary["schema_version"] == 3
    assert summary["counts"] == {
        "images": 10,
        "subjects": 10,
        "labelled": 9,
        "masks": 0,
        "rejected": 1,
        "files": 3,
        "images_without_subject_id": 9,
        "guessed_subjects": 9,
    }
    assert summary["reasons"] == {"not-an-image": 1}
    assert summary["hash"] == index.hash
    assert summary["source"] == "../s"


def test_the_light_index_has_the_columns_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sample(tmp_path / "s").write(tmp_path / "i")
    columns = (tmp_path / "i" / "index.csv").read_text().splitlines()[0]
    assert columns == (
        "image,path,subject,session,series,modality,sequence,shape,spacing,affine,scanner,field_strength,label,mask,split,quality"
    )
    assert (tmp_path / "i" / "rejected.csv").read_text().splitlines()[0] == "path,reason,detail,n_files"
    with pytest.raises(UserError, match="pyarrow"):
        Index.read(next(iter([_parquet(tmp_path)])))


def _parquet(folder: Path) -> Path:
    (folder / "p").mkdir()
    shutil.copy(folder / "i" / "summary.json", folder / "p")
    (folder / "p" / "index.parquet").write_bytes(b"PAR1")
    return folder / "p"


def test_the_same_source_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    sample(tmp_path / "a" / "s").write(tmp_path / "a" / "i")
    shutil.copytree(tmp_path / "a" / "s", tmp_path / "b" / "s")
    build_index(tmp_path / "b" / "s", "xray").write(tmp_path / "b" / "i")
    for path in sorted((tmp_path / "a" / "i").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "i" / path.name).read_bytes()


def test_the_hash_follows_the_records(tmp_path: Path) -> None:
    index = sample(tmp_path)
    changed = replace(index.records[0], label="other")
    assert replace(index, records=(changed, *index.records[1:])).hash != index.hash
    assert replace(index, rejected=()).hash == index.hash


def test_half_an_index_is_no_index(tmp_path: Path) -> None:
    sample(tmp_path / "s").write(tmp_path / "i")
    (tmp_path / "i" / "summary.json").unlink()
    assert not is_index(tmp_path / "i")
    with pytest.raises(UserError, match=r"expected an index .*summary\.json"):
        Index.read(tmp_path / "i")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    sample(tmp_path / "s").write(tmp_path / "i")
    summary = json.loads((tmp_path / "i" / "summary.json").read_text())
    (tmp_path / "i" / "summary.json").write_text(json.dumps(summary | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 3, got 99"):
        Index.read(tmp_path / "i")


def test_an_index_whose_source_is_gone_says_so_when_a_file_is_asked_for(tmp_path: Path) -> None:
    sample(tmp_path / "s").write(tmp_path / "i")
    shutil.rmtree(tmp_path / "s")
    index = Index.read(tmp_path / "i")
    with pytest.raises(UserError, match="Was the source moved"):
        index.open(index.records[0])


def test_another_site_key_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sample(tmp_path / "s").write(tmp_path / "i")
    monkeypatch.setenv("MEDIM_SITE_KEY", "another one")
    Index.read(tmp_path / "i")
    assert "another site key" in caplog.text


def test_a_fingerprint_changes_with_any_file_of_the_image(tmp_path: Path) -> None:
    write_series(tmp_path / "s")
    source = write_decathlon(tmp_path / "d")
    index = build_index([tmp_path / "s", source], "mri")
    series = next(record for record in index.records if record.series)
    masked = next(record for record in index.records if record.mask)
    before = [index.fingerprint(record) for record in index.records]
    assert len(set(before)) == len(before)
    assert [index.fingerprint(record) for record in index.records] == before
    for record, file in ((series, tmp_path / "s" / "3.dcm"), (masked, source / "labelsTr" / "a.nii.gz")):
        fingerprint = index.fingerprint(record)
        os.utime(file, ns=(1, 1))
        assert index.fingerprint(record) != fingerprint


def test_an_image_that_changed_since_is_not_opened_in_silence(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii")
    index = build_index(tmp_path, "mri")
    write_nifti(path, noise(4, 5, 7))
    with pytest.raises(ReadError, match=r"a\.nii: shape.*\[changed\]"):
        index.open(index.records[0])
    write_nifti(path, np.full((4, 5, 6), np.nan, np.float32))
    with pytest.raises(ReadError) as caught:
        index.open(index.records[0])
    error: Any = pickle.loads(pickle.dumps(caught.value))
    assert (error.reason, str(error)) == ("not-finite", str(caught.value))


def test_opening_gives_what_read_volume_gives(tmp_path: Path) -> None:
    write_series(tmp_path / "s")
    index = build_index(tmp_path, "mri")
    volume, record = read_volume(tmp_path / "s"), index.records[0]
    np.testing.assert_array_equal(index.open(record).array, volume.array)
    assert record.affine == tuple(volume.affine.ravel())
    assert record.shape == volume.shape
    with pytest.raises(ReadError, match=r"\[no-mask\]"):
        index.open_mask(record)
    assert isinstance(pydicom.dcmread(index.locate(record)), pydicom.FileDataset)


def test_a_table_of_labels_gives_the_subjects_that_the_files_do_not(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for name in ("a", "b", "c", "d"):
        np.save(source / f"{name}.npy", np.random.default_rng(ord(name)).random((8, 8)).astype(np.float32))
    (tmp_path / "l.csv").write_text("image,subject,label\na,p1,x\nb,p1,y\nc,p2,x\n")
    subjects = {r.image: r.subject for r in build_index(source, "xray", labels=tmp_path / "l.csv").records}
    assert subjects["a"] == subjects["b"]
    assert len({subjects["a"], subjects["c"], subjects["d"]}) == 3
    (tmp_path / "s.csv").write_text("image,subject\na,q1\nb,q1\nc,q3\n")
    index = build_index(source, "xray", labels=tmp_path / "l.csv", subjects=tmp_path / "s.csv")
    assert len({r.subject for r in index.records}) == 3


@pytest.mark.parametrize("table", ["a,q1\nb,q2\nc,q3\n", "a,q1\nb,q1\nc,q1\n"])
def test_two_tables_that_group_images_differently_are_refused_with_the_line(tmp_path: Path, table: str) -> None:
    for name in "abc":
        picture(tmp_path / "s" / f"{name}.png", seed=ord(name))
    (tmp_path / "l.csv").write_text("image,subject,label\na,p1,x\nb,p1,y\nc,p2,x\n")
    (tmp_path / "s.csv").write_text("image,subject\n" + table)
    with pytest.raises(UserError, match=r"l\.csv, line [34]: the table of subjects groups this image"):
        build_index(tmp_path / "s", "xray", labels=tmp_path / "l.csv", subjects=tmp_path / "s.csv")
    (tmp_path / "l.csv").write_text("image,subject,label\na,p1,x\na,p2,x\n")
    with pytest.raises(UserError, match=r"l\.csv, line 3: expected one subject per image"):
        build_index(tmp_path / "s", "xray", labels=tmp_path / "l.csv")


@pytest.mark.parametrize("column", ["Patient", "patient_id", "PatientID", "participant_id", "Patient ID", "SUBJECT"])
def test_a_column_of_patients_beside_the_labels_groups_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, column: str
) -> None:
    for name in "abcd":
        picture(tmp_path / "s" / f"{name}.png", seed=ord(name))
    (tmp_path / "l.csv").write_text(
        f"Image Index,Finding Labels,{column}\na.png,x,1\nb.png,y,1\nc.png,x,2\nd.png,y,2\n"
    )
    index = build_index(tmp_path / "s", "xray", labels=tmp_path / "l.csv")
    assert subjects_of(index) == [0, 0, 1, 1]
    assert [record.label for record in index.records] == ["x", "y", "x", "y"]
    index.log_unidentified()
    assert "No subject IDs" not in caplog.text


def test_a_column_of_subjects_overrides_the_files_and_their_other_images_follow(tmp_path: Path) -> None:
    for name, patient in (("1", "A"), ("2", "A"), ("3", "B"), ("4", "C")):
        save(
            xray(noise(8, 9, seed=int(name)), PatientID=patient, SOPInstanceUID=f"1.2.{name}"),
            tmp_path / f"s/{name}.dcm",
        )
    (tmp_path / "l.csv").write_text("image,subject,label\n1,study7,x\n3,study7,y\n4,C,x\n")
    index = build_index(tmp_path / "s", "xray", labels=tmp_path / "l.csv")
    assert subjects_of(index) == [0, 0, 0, 1]
    assert index.records[3].subject == build_index(tmp_path / "s", "xray").records[3].subject
    (tmp_path / "again.csv").write_text(
        "image,subject,label\n" + "".join(f"{r.image},{r.subject},x\n" for r in index.records)
    )
    again = build_index(tmp_path / "s", "xray", labels=tmp_path / "again.csv")
    assert [r.subject for r in again.records] == [r.subject for r in index.records]


def test_images_without_subjects_are_told_once_and_names_that_begin_alike_are_one_subject(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(6):
        picture(tmp_path / "alone" / f"image_{number:03}.png", seed=number)
        picture(tmp_path / "views" / f"pat{number // 2:03}_view{number % 2}.png", seed=number)
    index = build_index(tmp_path / "alone", "xray")
    assert subjects_of(index) == list(range(6))
    index.log_unidentified()
    assert caplog.text.count("No subject IDs: each of 6 images counts as its own subject") == 1
    caplog.clear()
    index = build_index(tmp_path / "views", "xray")
    index.log_unidentified()
    assert subjects_of(index) == [0, 0, 1, 1, 2, 2]
    assert "No subject IDs: guessed 3 subjects for 6 images" in caplog.text
    assert "pat0" not in caplog.text


def test_subjects_that_are_guessed_from_starts_of_names_stay_within_the_splits_of_the_source(tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / "s" / ("train" if number < 4 else "test")
        picture(folder / f"person{number % 4 // 2}_bacteria_{number}.png", seed=number)
    index = build_index(tmp_path / "s", "xray")
    assert Counter((r.split, r.subject) for r in index.records).most_common()[-1][1] == 2
    assert len({r.subject for r in index.records}) == 3
    assign_splits(index)


def test_columns_of_a_table_are_named_where_they_are_unusual(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "s" / f"{name}.png", seed=ord(name))
    table = "Aufnahme,label,Befund,class,Fall\na,9,x,0,1\nb,9,y,0,1\nc,9,x,0,2\n"
    (tmp_path / "l.csv").write_text(table)
    columns = {"image": "aufnahme", "label": "Befund", "subject": "Fall"}
    index = build_index(tmp_path / "s", "xray", labels=TableFile(tmp_path / "l.csv", columns))
    assert [record.label for record in index.records] == ["x", "y", "x"]
    assert subjects_of(index) == [0, 0, 1]
    with pytest.raises(UserError, match=r"--label-column Befnd: .* got 0\. Did you mean 'p-\w+'|'befund'"):
        build_index(tmp_path / "s", "xray", labels=TableFile(tmp_path / "l.csv", columns | {"label": "Befnd"}))
    with pytest.raises(UserError, match=r"columns image or subject, and .*named with --image-column, --label-column"):
        build_index(tmp_path / "s", "xray", labels=tmp_path / "l.csv")


def test_options_name_the_columns_of_the_table_of_labels(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / "s" / f"{name}.png", seed=ord(name))
    (tmp_path / "l.csv").write_text("a name,finding\na,x\nb,y\n")
    command = ["index", str(tmp_path / "s"), "--modality", "xray", "--label-column", "finding"]
    refused = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "i")])
    assert refused.exit_code == 2
    assert "--label-column: requires --labels" in refused.output
    command += ["--labels", str(tmp_path / "l.csv"), "--image-column", "a name"]
    assert CliRunner().invoke(app, [*command, "--out", str(tmp_path / "i")]).exit_code == 0
    assert Index.read(tmp_path / "i").labels == ("x", "y")
