"""Several findings an image, from a table or an archive into the one label of an index, and out again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medim.data.index.index import Index, build_index
from medim.data.labels import (
    check_label_kind,
    count_labels,
    detect_finding_columns,
    finding_names,
    format_findings,
    parse_finding,
    parse_findings,
    stratification_labels,
)
from medim.data.loading.splits import assign_splits, select_label_budget
from medim.types import UserError

names = st.text(st.characters(exclude_characters="|", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


@given(st.dictionaries(names, st.sampled_from([True, False, None]), min_size=2, max_size=5))
def test_a_label_says_what_it_was_made_of(findings: dict[str, bool | None]) -> None:
    label = format_findings(findings)
    known = any(told is not None for told in findings.values())
    assert (parse_findings(label) or None) == (findings if known else None)


@pytest.mark.parametrize("label", [None, "", "0", "1", "-1", "+1", "?", "normal", "a|b", "+a|b", "+a|", "stage -1"])
def test_any_other_label_is_a_class(label: str | None) -> None:
    assert parse_findings(label) is None


def test_findings_come_in_order_whatever_the_order_of_the_images() -> None:
    assert finding_names(["+b|-a", None, "?b|+c"]) == finding_names(["?b|+c", "+b|-a"]) == ("b", "a", "c")
    assert finding_names(["b", "a", None]) == ()


def test_classes_and_findings_in_one_index_stay_labels_until_something_is_to_be_learnt_from_them() -> None:
    assert finding_names(["+b|-a", "normal"]) == ()
    check_label_kind(["+b|-a", "-b|-a", None])
    check_label_kind(["normal", "ill", None])
    with pytest.raises(UserError, match=r"classes or findings, got both: 'normal' and '\+b\|-a'"):
        check_label_kind(["+b|-a", "normal", None])


def test_images_are_counted_by_finding_or_by_class() -> None:
    assert count_labels(["+a|-b", "+a|+b", "-a|-b", None]) == Counter(a=2, b=1)
    assert count_labels(["x", "x", "y", None]) == Counter(x=2, y=1)


@pytest.mark.parametrize(
    ("cell", "told"),
    [("1", True), ("1.0", True), ("0", False), ("0.0", False), ("", None), ("-1", None), ("-1.0", None), ("nan", None)],
)
def test_a_cell_tells_present_absent_or_nothing(cell: str, told: bool | None) -> None:
    assert parse_finding(cell) is told


def test_columns_of_other_numbers_and_words_are_no_findings() -> None:
    rows = [
        {"image": "0", "age": "70", "sex": "F", "edema": "1", "mass": "", "empty": ""},
        {"image": "1", "age": "1", "sex": "M", "edema": "", "mass": "0", "empty": ""},
    ]
    assert detect_finding_columns(rows) == ("edema", "mass")
    assert detect_finding_columns([{"image": "0", "edema": "1"}]) == ()


def test_a_name_with_a_bar_is_refused() -> None:
    with pytest.raises(UserError, match="Rename the column"):
        format_findings({"a|b": True, "c": False})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"p{number}.png")
    return source


def indexed(pictures: Path, table: str) -> Index:
    path = pictures.parent / "labels.csv"
    path.write_text(table)
    return build_index(pictures, "xray", labels=path)


def test_a_table_with_a_column_a_finding_labels_images_and_outlives_the_index(pictures: Path, tmp_path: Path) -> None:
    index = indexed(pictures, "Image,Age,Edema,Mass\np0,61,1,0\np1,70,0,\np2,55,,-1\np3,40,0.0,1.0\n")
    assert [record.label for record in index.records] == ["+edema|-mass", "-edema|?mass", None, "-edema|+mass"]
    assert index.findings == index.labels == ("edema", "mass")
    index.write(tmp_path / "index")
    assert Index.read(tmp_path / "index").findings == ("edema", "mass")


def test_a_label_column_stays_what_it_was(pictures: Path) -> None:
    index = indexed(pictures, "image,label,edema,mass\np0,a,1,0\np1,b,0,1\n")
    assert [record.label for record in index.records] == ["a", "b", None, None]
    assert index.findings == ()


def test_one_column_of_yes_and_no_is_refused_as_before(pictures: Path) -> None:
    with pytest.raises(UserError, match="Findings need two or more columns"):
        indexed(pictures, "image,edema\np0,1\np1,0\n")


def test_wide_labels_of_an_archive_are_findings_by_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "set.npz"
    wide = np.array([[0, 1, 0], [1, 1, 0]], np.uint8)
    np.savez(path, train_images=rng.integers(0, 255, (2, 8, 8), dtype=np.uint8), train_labels=wide)
    assert [r.label for r in build_index(path, "xray").records] == ["-0|+1|-2", "+0|+1|-2"]
    np.savez(path, train_images=rng.integers(0, 255, (2, 8, 8), dtype=np.uint8), train_labels=wide + 3)
    assert [r.label for r in build_index(path, "xray").records] == [None, None]


def test_the_stratum_of_findings_is_the_rarest_one_and_of_classes_all() -> None:
    assert stratification_labels([{"+a|-b"}, {"+a|+b"}, {"-a|-b", "+a|-b"}, {"-a|?b"}, set()]) == [
        ("a",),
        ("b",),
        ("a",),
        (),
        (),
    ]
    assert stratification_labels([{"x"}, {"y", "x"}, set()]) == [("x",), ("x", "y"), ()]


def test_a_rare_finding_is_on_both_sides_of_a_split_and_in_a_small_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((80, 3)) < [0.5, 0.3, 0.1]
    labels[:6, 2] = True
    path = tmp_path / "set.npz"
    np.savez(path, train_images=rng.integers(0, 255, (80, 4, 4), dtype=np.uint8), train_labels=labels.astype(np.uint8))
    index = build_index(path, "xray")
    free = [record.__class__(**{**record.__dict__, "split": None}) for record in index.records]
    for seed in range(5):
        parts = assign_splits(Index(root=index.root, modality="xray", records=tuple(free)), seed=seed)
        both = {parts[record.image] for record in free if record.label and "+2" in record.label}
        assert both == {"train", "val"}
        assert any("+2" in str(record.label) for record in select_label_budget(free, labelled=5, seed=seed))


@pytest.mark.parametrize("cell", ["", "NaN", "nan", "NA", "N/A", "n/a", "None", "null", "NULL", "-", "?", " <NA> "])
def test_a_missing_label_is_missing_however_it_is_written(
    pictures: Path, caplog: pytest.LogCaptureFixture, cell: str
) -> None:
    index = indexed(pictures, f"image,label\np0,a\np1,{cell}\np2,b\n")
    assert [record.label for record in index.records] == ["a", None, "b", None]
    assert ("1 labels count as missing" in caplog.text) == bool(cell.strip())
    findings = indexed(pictures, f"image,edema,mass\np0,1,{cell}\np1,{cell},0\np2,0,1\n")
    assert [record.label for record in findings.records] == ["+edema|?mass", "?edema|-mass", "-edema|+mass", None]


def test_several_findings_in_a_cell_are_split_as_chestxray14_writes_them(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    index = indexed(pictures, "Image Index,Finding Labels\np0,Mass|Edema\np1,No Finding\np2,edema \np3,Mass | Edema\n")
    assert index.findings == ("Edema", "Mass")
    labels = [record.label for record in index.records]
    assert labels == ["+Edema|+Mass", "-Edema|-Mass", "+Edema|-Mass", "+Edema|+Mass"]
    assert "split at '|' into 2 findings (Edema, Mass)" in caplog.text
    assert "'No Finding' lists none" in caplog.text
    with pytest.raises(UserError, match=r"expected a list of findings, got 'Mass\|No Finding'"):
        indexed(pictures, "image,label\np0,Mass|No Finding\np1,Edema\n")
    with pytest.raises(UserError, match=r"expected two or more findings in labels with '\|', got Mass"):
        indexed(pictures, "image,label\np0,Mass|Mass\np1,No Finding\n")


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (("NORMAL", "normal", "normal", "ill"), ["normal", "normal", "normal", "ill"]),
        (("No  mass", "No mass", "no mass", "no mass"), ["no mass"] * 4),
        (("1", "1.0", "1", "2"), ["1", "1", "1", "2"]),
    ],
)
def test_labels_that_differ_in_case_blanks_or_decimals_are_one_class_with_a_warning(
    pictures: Path, caplog: pytest.LogCaptureFixture, cells: tuple[str, ...], labels: list[str]
) -> None:
    table = "".join(f"p{number},{cell}\n" for number, cell in enumerate(cells))
    assert [record.label for record in indexed(pictures, f"image,label\n{table}").records] == labels
    assert "differ only in case, blanks or decimals and count as one class" in caplog.text
