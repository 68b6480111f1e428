"""Names of files and folders in an index: pseudonyms unless neutral or kept, and the way back to the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medim.cli import app
from medim.data.index.index import Index, build_index
from medim.data.index.locate import locate_files
from medim.privacy import Scrubber, format_path, scrubbed_name, text_tokens
from medim.types import UserError
from tests.data.synthetic import noise, write_archive, write_nifti

NAMES = ("Zyxwvuta_QX7731904Z", "Quillon-Anna", "Abel_17-11-1943")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A volume per patient in a folder of the patient's name."""
    for number, name in enumerate(NAMES):
        write_nifti(tmp_path / "s" / name / f"{name}_t1.nii.gz", noise(4, 5, 6, seed=number))
    return tmp_path / "s"


def test_names_of_files_and_folders_are_pseudonyms_and_the_images_are_still_read(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "subjects.csv").write_text("image,subject\n" + "".join(f"{n}_t1.nii.gz,{n}\n" for n in NAMES))
    index = build_index(tree, "mri", subjects=tmp_path / "subjects.csv", remember=False)
    index.write(tmp_path / "index")
    written = repr(index.records) + (tmp_path / "index" / "summary.json").read_text()
    assert not [word for word in ("zyx", "quillon", "anna", "abel_", "7731904", "1943") if word in written.lower()]
    again = Index.read(tmp_path / "index")
    assert {again.locate(record).parent.name for record in again.records} == set(NAMES)
    assert all(again.open(record).shape == (4, 5, 6) for record in again.records)


def test_a_neutral_name_stays_and_keep_names_keeps_every_name(tmp_path: Path) -> None:
    for name in ("case_01", "Doe"):
        write_nifti(tmp_path / "s" / f"{name}.nii.gz", noise(4, 5, 6, seed=len(name)))
    assert [record.path for record in build_index(tmp_path / "s", "mri").records] == [
        "case_01.nii.gz",
        f"{scrubbed_name('Doe')}.nii.gz",
    ]
    index = build_index(tmp_path / "s", "mri", keep_names=True)
    assert [record.image for record in index.records] == ["Doe", "case_01"]
    index.write(tmp_path / "i")
    assert Index.read(tmp_path / "i").keep_names


def test_the_names_of_a_fetched_set_are_kept(tree: Path) -> None:
    (tree / "fetched.json").write_text("{}")
    assert {Path(record.path).parent.name for record in build_index(tree, "mri").records} == set(NAMES)


def test_rows_are_in_the_order_of_their_written_paths(tree: Path) -> None:
    write_nifti(tree / "case_1" / "t1.nii.gz")
    (tree / "Zzz.txt").write_text("no image")
    (tree / "Aaa.txt").write_text("no image")
    index = build_index(tree, "mri")
    assert [record.path for record in index.records] == sorted(record.path for record in index.records)
    assert [rejection.path for rejection in index.rejected] == sorted(r.path for r in index.rejected)


def test_each_word_of_a_nifti_description_is_hidden_even_where_names_are_kept(tmp_path: Path) -> None:
    write_nifti(tmp_path / "s" / "ZYXWVUTA-1.nii.gz", descrip="Zyxwvuta NIfTI scan")
    record = build_index(tmp_path / "s", "mri", keep_names=True).records[0]
    assert record.image == scrubbed_name("ZYXWVUTA-1")
    assert Scrubber(text_tokens(["Zyxwvuta NIfTI scan"])).scrub_part("scan") == "scan"


def test_class_folders_of_patients_give_labels_without_their_names(tmp_path: Path) -> None:
    for name in ("normal", "Zyxwvuta_Quillon"):
        (tmp_path / "s" / name).mkdir(parents=True)
        for number in range(10):
            picture = Image.fromarray(noise(8, 8, seed=number + len(name)).astype(np.uint8))
            picture.save(tmp_path / "s" / name / f"{number}.png")
    assert build_index(tmp_path / "s", "xray").labels == ("normal", scrubbed_name("Zyxwvuta_Quillon"))
    assert build_index(tmp_path / "s", "xray", keep_names=True).labels == ("Zyxwvuta_Quillon", "normal")


def test_a_bids_suffix_that_is_a_name_is_no_sequence(tmp_path: Path) -> None:
    write_nifti(tmp_path / "s" / "sub-01_Quillon.nii.gz")
    assert build_index(tmp_path / "s", "mri").records[0].sequence is None


def test_a_key_leads_back_to_its_file_from_the_images_and_from_an_index(tree: Path, tmp_path: Path) -> None:
    index = build_index(tree, "mri")
    index.write(tmp_path / "i")
    for record in index.records:
        assert locate_files(tree, record.image) == locate_files(tree, record.path) == [index.locate(record)]
        assert locate_files(tmp_path / "i", record.image) == [index.locate(record)]
    result = CliRunner().invoke(app, ["locate", str(tree), index.records[0].image])
    assert result.output.strip() == str(index.locate(index.records[0]))
    with pytest.raises(UserError, match=r"^p-[0-9a-f]{12}: expected the key or path"):
        locate_files(tree, "Doe")


def test_a_key_of_an_archive_leads_to_the_archive(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    path = write_archive(tmp_path / "s" / "Quillon.npz", train=3)
    record = build_index(tmp_path / "s", "xray").records[0]
    assert locate_files(tmp_path / "s", record.image) == locate_files(tmp_path / "s", record.path) == [path]


def test_an_index_of_an_earlier_version_is_read_with_a_warning(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = build_index(tree, "mri", keep_names=True)
    index.write(tmp_path / "i")
    summary = json.loads((tmp_path / "i" / "summary.json").read_text())
    del summary["keep_names"]
    (tmp_path / "i" / "summary.json").write_text(json.dumps(summary | {"schema_version": 2}))
    assert Index.read(tmp_path / "i").records == index.records
    assert "run `medim index` again" in caplog.text


def test_keep_names_on_an_index_is_an_error(tree: Path, tmp_path: Path) -> None:
    build_index(tree, "mri").write(tmp_path / "i")
    result = CliRunner().invoke(
        app, ["preprocess", str(tmp_path / "i"), "--modality", "mri", "--keep-names", "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 1
    assert "--keep-names has no effect on an existing index" in result.output


def test_a_message_names_a_file_without_the_folders_above_and_without_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert format_path("/home/doe/labels.csv") == "labels.csv"
    assert format_path(tmp_path / "scans" / "Doe" / "labels.csv") == f"scans/{scrubbed_name('Doe')}/labels.csv"
    assert format_path(".") == format_path(tmp_path.name)
