"""Conditions of `--where`: comparisons of columns, and errors that name columns and values."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from medim.cli import app
from medim.cli.sources import read_source
from medim.data.index.index import Index, build_index
from medim.data.index.records import ImageRecord
from medim.data.index.selection import hide_names, parse_condition, scrub_condition
from medim.data.loading.source_summary import describe_source, warn_mixed_sizes
from medim.types import UsageError, UserError
from tests.data.synthetic import noise, write_nifti

RECORD = ImageRecord(
    image="p1/t1",
    path="p1/t1.nii.gz",
    subject="s-0123456789ab",
    session=None,
    series=None,
    modality="mri",
    sequence="SE\\IR",
    shape=(64, 64, 20),
    spacing=(0.5, 0.5, 6.5),
    affine=(),
    scanner="SIEMENS Skyra fit",
    field_strength=3.0,
    label="01",
    mask=None,
    split=None,
    quality="derived single-slice",
)


@pytest.mark.parametrize(
    ("text", "is_true"),
    [
        ('sequence="se\\ir"', True),
        ("sequence=SE\\IR and spacing_z<3", False),
        ("sequence=SE* and spacing_z>=6.5", True),
        ("sequence=SE", False),
        ("sequence!=SE", True),
        ("scanner='siemens skyra fit'", True),
        ("SCANNER = siemens* AND Field_Strength==3", True),
        ("fov_x=32 and fov_z>129 and shape_y=64", True),
        ("quality=single-slice", True),
        ("quality=single", False),
        ("not quality=derived", False),
        ("label=01", True),
        ("label=1", False),
        ("label in (00, 01)", True),
        ("spacing_x in (1, 0.5)", True),
        ("mask=none", True),
        ("mask!=none", False),
        ("split!=train", True),
        ("split=train or label=01 and field_strength<2", False),
        ("(split=train or label=01) and field_strength>2", True),
        ("not (split=train or label=02)", True),
        ("not not label=01", True),
    ],
)
def test_a_condition_compares_columns(text: str, is_true: bool) -> None:
    assert parse_condition(text)(RECORD) is is_true


def test_missing_numbers_satisfy_only_none_and_unequal() -> None:
    record = replace(RECORD, field_strength=None, shape=(8, 9), spacing=(1.0, 1.0))
    texts = ["field_strength<9", "field_strength!=3", "field_strength=none", "spacing_z<9", "not spacing_z<9"]
    assert [parse_condition(text)(record) for text in texts] == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequnce=SE", "expected a column, got 'sequnce'. Did you mean 'sequence'"),
        ("spacing<3", "'spacing_.'.*Columns: image, path, .*fov_z"),
        ("spacing_z<thin", "expected a number for 'spacing_z', got 'thin'"),
        ("spacing_z<nan", "expected a finite number for 'spacing_z', got 'nan'"),
        ("sequence<SE", "expected = or != for the text column 'sequence', got '<'"),
        ("field_strength<none", "expected = or != before none, got '<'"),
        ("spacing_z>=none", "expected = or != before none, got '>='"),
        ("sequence", "ends early"),
        ("sequence SE", "expected =, .* after 'sequence', got 'SE'"),
        ("sequence=", "ends early"),
        ("sequence==SE)", r"expected 'and' or 'or', got '\)'"),
        ("(sequence=SE", r"expected '\)', got 'the end'"),
        ("sequence=SE spacing_z<3", "expected 'and' or 'or', got 'spacing_z'"),
        ("", "ends early"),
        ("sequence='SE", "expected words, numbers and quoted texts"),
        ("label in 01", r"expected '\(', got '01'"),
        ("(" * 25 + "label=1" + ")" * 25, "at most 20 nested"),
        ("__import__('os').system('x')", "expected a column, got '__import__'"),
        ("label=1 and " * 300 + "label=1", "at most 2000 characters"),
    ],
)
def test_an_invalid_condition_is_wrong_usage_and_the_problem_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_condition(text)


def test_a_recorded_condition_has_no_name_that_the_index_hides() -> None:
    text = "path!=*zzyzx* and subject in (s-0123456789ab, 'Zzyzx Quillon') and label=01 and fov_x>3 or label=label"
    recorded = scrub_condition(text, [RECORD])
    assert re.fullmatch(
        r"path!=s-\w{12} and subject in \(s-0123456789ab, s-\w{12}\) and label=01 and fov_x>3 or label=s-\w{12}",
        recorded,
    )
    assert parse_condition(recorded)(RECORD) is parse_condition(text)(RECORD)
    expected = "path!=hidden and subject in (hidden, hidden) and label=01 and fov_x>3 or label=label"
    assert hide_names(text) == expected


def test_images_that_are_not_selected_are_counted_and_classes_follow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, (length, label) in enumerate([(40, "crop"), (40, "crop"), (240, "head")]):
        affine = [[length / 8, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        write_nifti(tmp_path / "s" / f"sub-{number}_T{1 + number // 2}w.nii.gz", noise(8, 8, 8, seed=number), affine)
        with (tmp_path / "l.csv").open("a") as file:
            file.write(("image,label\n" if not number else "") + f"sub-{number}_T{1 + number // 2}w,{label}\n")
    index = build_index(tmp_path / "s", "mri", labels=tmp_path / "l.csv", remember=False)
    assert describe_source(index)["sequences"] == "T1w 2, T2w 1"
    warn_mixed_sizes(index)
    assert "fields of view of the images differ by a factor of 6.0 (40 to 240 mm)" in caplog.text
    assert '--where "fov_x<140"' in caplog.text
    selected = index.select("fov_x<140 and sequence=t1w")
    caplog.clear()
    warn_mixed_sizes(selected)
    assert caplog.text == ""
    assert [record.image for record in selected.records] == [record.image for record in index.records[:2]]
    assert [rejection.reason for rejection in selected.rejected] == ["not-selected"]
    assert selected.classes == ("crop",)
    assert selected.hash != index.hash
    assert describe_source(selected)["left out"] == "not-selected 1"
    assert "leaves 2 of 3 images and 2 of 3 subjects. Values in the index: fov_x: 40 to 240" in selected.selection
    assert selected.append_selection("Too few.") == f"Too few. {selected.selection}"
    assert index.append_selection("Too few.") == "Too few."
    selected.write(tmp_path / "i")
    read_index = Index.read(tmp_path / "i")
    assert (index.where, selected.where, read_index.where) == (None, *["fov_x<140 and sequence=t1w"] * 2)
    assert read_index.select("shape_x=8").where == "(fov_x<140 and sequence=t1w) and (shape_x=8)"
    with pytest.raises(UserError, match=r"none of 3 images satisfies .* sequence: T1w 2, T2w 1; fov_x: 40 to 240"):
        index.select("sequence=FLAIR and fov_x>1")


def test_the_commands_select_images_and_check_the_condition_before_they_read(tmp_path: Path) -> None:
    for number in range(4):
        write_nifti(tmp_path / "s" / f"sub-{number}_T{1 + number // 2}w.nii.gz", noise(8, 8, 8, seed=number))
    command = ["index", str(tmp_path / "s"), "--modality", "mri"]
    done = CliRunner().invoke(app, [*command, "--where", "sequence=T2w", "--out", str(tmp_path / "i")])
    assert done.exit_code == 0, done.output
    assert "4 files: 2 images of 2 subjects, 2 left out" in done.output
    assert [record.sequence for record in Index.read(tmp_path / "i").records] == ["T2w", "T2w"]
    refused = CliRunner().invoke(app, [*command, "--where", "sequnce=T2w", "--out", str(tmp_path / "o")])
    assert refused.exit_code == 2
    assert "Did you mean 'sequence'" in refused.output
    assert not (tmp_path / "o").exists()
    arguments = SimpleNamespace(data=tmp_path / "no", where="sequnce=T2w")
    with pytest.raises(UsageError, match="Did you mean 'sequence'"):
        read_source(arguments, "mri")
    arguments = SimpleNamespace(data=tmp_path / "i", where="sequence=T2w", split_seed=0)
    assert len(read_source(arguments, "mri")[0].records) == 2
