"""What folders say: BIDS trees, Decathlon folders and nnU-Net's."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from medim.data.index.index import Index, build_index
from medim.data.loading.splits import assign_splits
from medim.data.loading.store import Store, fill_store
from medim.types import UserError
from tests.data.synthetic import noise, write_decathlon, write_nifti


def reasons(index: Index) -> dict[str, str]:
    return {rejection.path: rejection.reason for rejection in index.rejected}


def mask(path: Path) -> Path:
    return write_nifti(path, (noise(4, 5, 6) % 3).astype(np.uint8))


# --- BIDS


def bids(root: Path) -> Path:
    """Three subjects with runs of every kind; sub-03 is only listed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text("{}")
    (root / "participants.tsv").write_text(
        "participant_id\tsex\tborn\tlabel\nsub-01\tfemale\t1961-04-12\tsick\nsub-03\tmale\t1971-02-03\twell\n"
    )
    for name in ("sub-01/anat/sub-01_T1w", "sub-02/anat/sub-02_T1w"):
        write_nifti(root / f"{name}.nii.gz")
    write_nifti(root / "sub-01/func/sub-01_task-rest_bold.nii.gz", noise(4, 5, 6, 3))
    write_nifti(root / "sub-01/dwi/sub-01_dwi.nii.gz", noise(4, 5, 6, 7))
    (root / "sub-01/dwi/sub-01_dwi.bval").write_text("0 1000")
    write_nifti(root / "sub-01/fmap/sub-01_phasediff.nii.gz")
    write_nifti(root / "sourcedata/sub-01/scan.nii.gz")
    write_nifti(root / "derivatives/prep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    mask(root / "derivatives/prep/sub-01/anat/sub-01_label-GM_dseg.nii.gz")
    return root


def test_a_bids_tree_gives_its_structural_images_and_a_row_for_all_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = build_index(bids(tmp_path), "mri")
    assert [record.image for record in index.records] == ["sub-01/anat/sub-01_T1w", "sub-02/anat/sub-02_T1w"]
    segmentation = "derivatives/prep/sub-01/anat/sub-01_label-GM_dseg.nii.gz"
    assert [record.mask for record in index.records] == [segmentation, None]
    assert reasons(index) == {
        "derivatives/prep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz": "derivative",
        "sourcedata/sub-01/scan.nii.gz": "source-data",
        "sub-01/dwi/sub-01_dwi.nii.gz": "not-structural",
        "sub-01/fmap/sub-01_phasediff.nii.gz": "not-structural",
        "sub-01/func/sub-01_task-rest_bold.nii.gz": "not-structural",
    }
    assert "1 of its 2 participants have no image; 1 subjects with images are not listed in it" in caplog.text
    assert "sub-0" not in caplog.text


def test_derivatives_are_images_where_they_alone_are_indexed(tmp_path: Path) -> None:
    source = bids(tmp_path) / "derivatives"
    index = build_index(source, "mri")
    assert [record.sequence for record in index.records] == ["T1w"]
    assert index.records[0].mask == "prep/sub-01/anat/sub-01_label-GM_dseg.nii.gz"
    mask(source / "prep/sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    index = build_index(source, "mri")
    assert index.records[0].mask is None
    assert list(reasons(index).values()) == ["derived-label"] * 2
    assert {rejection.detail[:28] for rejection in index.rejected} == {"2 label maps fit its image; "}


def test_participants_serve_as_labels_and_nothing_else_of_them_is_kept(tmp_path: Path) -> None:
    source = bids(tmp_path / "s")
    index = build_index(source, "mri", labels=source / "participants.tsv")
    assert [record.label for record in index.records] == ["sick", None]
    index.write(tmp_path / "index")
    written = b"".join(path.read_bytes() for path in sorted((tmp_path / "index").iterdir()))
    assert b"female" not in written
    assert b"1961" not in written
    (source / "participants.tsv").write_text("participant_id\tlabel\nsub-01\tn/a\nsub-02\twell\n")
    index = build_index(source, "mri", labels=source / "participants.tsv")
    assert [record.label for record in index.records] == [None, "well"]


def test_without_a_label_column_participants_are_no_table_of_labels(tmp_path: Path) -> None:
    source = bids(tmp_path)
    (source / "participants.tsv").write_text("participant_id\tage\nsub-01\t83\n")
    with pytest.raises(UserError, match="columns image or subject, and label or mask; got participant_id, age"):
        build_index(source, "mri", labels=source / "participants.tsv")


def test_a_segmentation_of_the_derivatives_is_joined_and_then_not_refused(tmp_path: Path) -> None:
    source = bids(tmp_path / "s")
    segmentation = "derivatives/prep/sub-01/anat/sub-01_label-GM_dseg.nii.gz"
    (tmp_path / "l.csv").write_text(f"image,mask\nsub-01_T1w.nii.gz,{segmentation}\n")
    index = build_index(source, "mri", labels=tmp_path / "l.csv")
    assert index.records[0].mask == segmentation
    assert segmentation not in reasons(index)


# --- Decathlon


def test_volumes_of_one_file_share_its_mask_and_subject_and_have_names(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path / "s", names=["a", "b"])
    for name in "ab":
        write_nifti(source / "imagesTr" / f"{name}.nii.gz", noise(4, 5, 6, 3, seed=ord(name)))
    description = json.loads((source / "dataset.json").read_text())
    description["modality"] = {"0": "FLAIR", "1": "T1w", "2": "T2w"}
    (source / "dataset.json").write_text(json.dumps(description))
    index = build_index(source, "mri")
    assert [(r.path, r.sequence) for r in index.records[:3]] == [
        ("imagesTr/a.nii.gz#0", "FLAIR"),
        ("imagesTr/a.nii.gz#1", "T1w"),
        ("imagesTr/a.nii.gz#2", "T2w"),
    ]
    assert [r.image for r in index.records[:2]] == ["imagesTr/a/0", "imagesTr/a/1"]
    assert {r.mask for r in index.records[:3]} == {"labelsTr/a.nii.gz"}
    assert len({r.subject for r in index.records}) == 2
    assert len({index.fingerprint(r) for r in index.records}) == 6
    np.testing.assert_array_equal(index.open(index.records[1]).array[0], noise(4, 5, 6, 3, seed=97)[..., 1])
    index.write(tmp_path / "index")
    again = Index.read(tmp_path / "index")
    assert again.open(again.records[2]).shape == again.open_mask(again.records[2]).shape == (4, 5, 6)
    assert len(set(assign_splits(index, seed=0).values())) == 2
    keys, refused = fill_store(Store(tmp_path / "store"), again, again.records, [{"op": "ras"}])
    assert (len(set(keys.values())), refused) == (6, ())


def test_a_label_of_a_file_is_one_of_each_of_its_volumes(tmp_path: Path) -> None:
    write_nifti(tmp_path / "s" / "a.nii.gz", noise(4, 5, 6, 2))
    write_nifti(tmp_path / "s" / "b.nii.gz", noise(4, 5, 6, 2))
    (tmp_path / "l.csv").write_text("image,label\na.nii.gz,sick\nb.nii.gz#1,well\n")
    index = build_index(tmp_path / "s", "mri", labels=tmp_path / "l.csv")
    assert [record.label for record in index.records] == ["sick", "sick", None, "well"]


def test_a_bad_mask_of_several_volumes_is_one_row(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path, names=["a", "b"])
    write_nifti(source / "imagesTr" / "a.nii.gz", noise(4, 5, 7, 3))
    index = build_index(source, "mri")
    assert [record.image for record in index.records] == ["imagesTr/b"]
    assert [rejection.reason for rejection in index.rejected] == ["label-off-grid"] * 2


def test_what_a_mac_leaves_beside_files_is_passed_over(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path, names=["a"])
    for name in ("imagesTr/._a.nii.gz", "labelsTr/._a.nii.gz", ".DS_Store"):
        (source / name).write_bytes(b"\0\5\x16\7")
    index = build_index(source, "mri")
    assert (len(index.records), index.rejected) == (1, ())


def test_test_images_are_unlabelled_unless_their_labels_lie_beside_them(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path, names=["a"])
    for name in ("t", "u"):
        write_nifti(source / "imagesTs" / f"{name}.nii.gz")
    mask(source / "labelsTs" / "t.nii.gz")
    index = build_index(source, "mri")
    assert [(r.image, r.mask, r.split) for r in index.records] == [
        ("imagesTr/a", "labelsTr/a.nii.gz", None),
        ("imagesTs/t", "labelsTs/t.nii.gz", "test"),
        ("imagesTs/u", None, None),
    ]


# --- nnU-Net


@pytest.mark.parametrize("version", [1, 2, None])
def test_channels_of_a_case_are_images_of_one_subject(tmp_path: Path, version: int | None) -> None:
    for case in ("p1", "p2"):
        for channel in range(2):
            write_nifti(tmp_path / "imagesTr" / f"{case}_{channel:04}.nii.gz", noise(4, 5, 6, seed=channel))
        mask(tmp_path / "labelsTr" / f"{case}.nii.gz")
    names = {"0": "T1", "1": "T2"}
    pairs = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("p1", "p2")]
    first = {"modality": names, "training": pairs, "labels": {"0": "background", "1": "one", "2": "two"}}
    second = {"channel_names": names, "file_ending": ".nii.gz", "numTraining": 2, "labels": {"background": 0, "one": 1}}
    second["labels"] = {"background": 0, "whole": [1, 2], "two": 2}
    if version:
        (tmp_path / "dataset.json").write_text(json.dumps(first if version == 1 else second))
    index = build_index(tmp_path, "mri")
    assert index.rejected == ()
    assert [r.image for r in index.records] == [f"imagesTr/{c}_000{k}" for c in ("p1", "p2") for k in (0, 1)]
    assert [r.sequence for r in index.records] == ["T1", "T2"] * 2 if version else [None] * 4
    assert [r.mask for r in index.records][::2] == ["labelsTr/p1.nii.gz", "labelsTr/p2.nii.gz"]
    assert index.records[0].mask == index.records[1].mask
    assert len({r.subject for r in index.records}) == 2
    assert index.classes == {1: ("one", "two"), 2: ("part of whole", "two"), None: ("label-1", "label-2")}[version]


def test_a_number_that_is_a_patients_is_no_channel(tmp_path: Path) -> None:
    source = write_decathlon(tmp_path, names=["case_0001", "case_0002"])
    index = build_index(source, "mri")
    assert len({record.subject for record in index.records}) == 2
    assert all(record.mask for record in index.records)


def test_the_log_is_silent_where_participants_and_images_agree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    source = bids(tmp_path)
    (source / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\n")
    build_index(source, "mri")
    assert caplog.text == ""
