"""What a command reads, in one block: files, images, subjects by split, classes, and what is left out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medim.cli.terminal import print_source
from medim.data.index.index import Index, build_index
from medim.data.loading.source_summary import describe_source
from medim.data.loading.splits import warn_label_shortage
from medim.data.source import open_source
from medim.types import UserError
from tests.data.synthetic import noise, write_nifti


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight films of four patients, of which two have no label, a copy of text and an empty file."""
    (tmp_path / "s").mkdir()
    for number in range(8):
        Image.fromarray((noise(8, 9, seed=number) / 4).astype(np.uint8)).save(tmp_path / "s" / f"{number}.png")
    (tmp_path / "s" / "empty.png").write_bytes(b"")
    (tmp_path / "s" / "notes.txt").write_text("text")
    rows = "".join(f"{k}.png,{k // 2},{'normal' if k < 4 else 'sick'}\n" for k in range(6))
    (tmp_path / "l.csv").write_text("image,patient,label\n" + rows + "6.png,3,\n7.png,3,\n")
    return tmp_path / "s"


def test_a_source_is_described_by_files_subjects_classes_and_reasons(source: Path, tmp_path: Path) -> None:
    index = build_index(source, "xray", labels=tmp_path / "l.csv", remember=False)
    rows = describe_source(index, split_seed=0, rejections_file=Path("run/rejected.csv"))
    assert rows == {
        "data": "10 files: 8 images of 4 subjects, 2 left out",
        "split": "train 3 subjects (6 images), val 1 subject (2 images)",
        "classes": "normal 4, sick 2; 2 without label",
        "left out": "empty-file 1, not-an-image 1 -> run/rejected.csv",
    }
    assert "split" not in describe_source(index)
    index.write(tmp_path / "index")
    assert describe_source(Index.read(tmp_path / "index"), split_seed=0)["data"] == rows["data"]


def test_masks_and_images_to_check_are_described(tmp_path: Path) -> None:
    for name in "ab":
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", noise(8, 8, 8, seed=ord(name)))
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    write_nifti(tmp_path / "masks" / "a.nii.gz", mask)
    rows = describe_source(build_index(tmp_path, "mri", remember=False))
    assert rows == {"data": "3 files: 2 images of 2 subjects", "masks": "1 of 2 images; classes: label-1"}


def test_the_block_goes_to_standard_error_and_not_with_quiet(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(source, "xray", remember=False)
    logger = logging.getLogger("medim")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    print_source(index, split_seed=0, rejections_file=Path("rejected.csv"))
    output = capsys.readouterr()
    assert output.out == ""
    assert "10 files: 8 images of 8 subjects, 2 left out" in output.err
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    print_source(index)
    assert capsys.readouterr().err == ""


def test_missing_subject_ids_are_told_again_where_an_index_is_read(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_source(source, "xray")[0].write(tmp_path / "index")
    assert caplog.text.count("No subject IDs") == 1
    open_source(tmp_path / "index", "xray")
    assert caplog.text.count("No subject IDs: each of 8 images counts as its own subject") == 2


def test_a_budget_above_the_labels_there_is_told(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = build_index(source, "xray", labels=tmp_path / "l.csv", remember=False).records
    warn_label_shortage(records, 6)
    warn_label_shortage(records, None)
    assert "--labelled" not in caplog.text
    warn_label_shortage(records, 1000)
    assert "--labelled 1000: the training split has 6 labelled images; all of them are used" in caplog.text


@pytest.mark.parametrize(
    ("cells", "splits"),
    [
        (("training", "validation", "TEST"), ["train", "val", "test"]),
        (("Train", "valid", "testing"), ["train", "val", "test"]),
        (("train", "", "val"), ["train", None, "val"]),
        (("train", "fold-1", "val"), None),
    ],
)
def test_splits_in_every_usual_spelling_are_taken_and_others_refused_with_the_line(
    source: Path, tmp_path: Path, cells: tuple[str, ...], splits: list[str | None] | None
) -> None:
    (tmp_path / "l.csv").write_text("image,split\n" + "".join(f"{k}.png,{cell}\n" for k, cell in enumerate(cells)))
    if splits is None:
        with pytest.raises(
            UserError, match=r"l\.csv, line 3: expected split train, val or test \(or testing, training"
        ):
            build_index(source, "xray", labels=tmp_path / "l.csv", remember=False)
        return
    index = build_index(source, "xray", labels=tmp_path / "l.csv", remember=False)
    assert [record.split for record in index.records[:3]] == splits
