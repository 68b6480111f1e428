from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medim.data.index.records import ImageRecord
from medim.privacy import make_pseudonym
from medim.study.audit.groups import (
    collect_header_groups,
    compute_group_metrics,
    number_values,
    read_groups,
    usable_groups,
)
from medim.types import UserError


def record(n: int, **changed: Any) -> ImageRecord:
    empty = dict.fromkeys(("session", "series", "sequence", "scanner", "field_strength", "label", "mask", "split"))
    made: dict[str, Any] = {"image": f"a/scan{n}", "path": f"a/scan{n}.nii.gz", "subject": make_pseudonym(f"P{n // 2}")}
    made |= {"modality": "mri", "shape": (4, 4, 4), "spacing": (1.0,) * 3, "affine": (0.0,) * 16, "quality": None}
    return ImageRecord(**{**made, **empty, **changed})


@pytest.fixture
def records() -> list[ImageRecord]:
    return [record(n, scanner="A" if n < 4 else None, field_strength=1.5) for n in range(8)]


def table(folder: Path, text: str) -> Path:
    (folder / "groups.csv").write_text(text)
    return folder / "groups.csv"


def test_headers_tell_scanner_and_field_strength(records: list[ImageRecord]) -> None:
    found = collect_header_groups(records)
    assert found["scanner"] == {f"a/scan{n}": "A" for n in range(4)}
    assert set(found["field strength"].values()) == {"1.5 T"}
    assert collect_header_groups([record(0)]) == {}


@pytest.mark.parametrize("name", ["a/scan3", "a/scan3.nii.gz", "scan3.nii.gz", "scan3"])
def test_an_image_is_meant_by_key_path_or_file_name(tmp_path: Path, records: list[ImageRecord], name: str) -> None:
    found = read_groups(table(tmp_path, f"image,sex,site\n{name},F,\n"), records)
    assert found == {"sex": {"a/scan3": "F"}, "site": {}}


@pytest.mark.parametrize("name", [str, make_pseudonym])
def test_a_subject_is_meant_by_the_sites_name_or_the_pseudonym(
    tmp_path: Path, records: list[ImageRecord], name: Callable[[str], str]
) -> None:
    found = read_groups(table(tmp_path, f"subject,sex\n{name('P1')},F\n"), records)
    assert found == {"sex": {"a/scan2": "F", "a/scan3": "F"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,sex\nscan1,F\n", "column image or subject"),
        ("image\nscan1\n", "columns to group by"),
        ("image,sex\nelse,F\n", "none of the 1 rows matches the image"),
        ("image,sex\nscan1,F\na/scan1,M\n", "line 3: expected one sex per image"),
        ("", "got none"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, records: list[ImageRecord], text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_groups(table(tmp_path, text), records)
    with pytest.raises(UserError, match="cannot be read"):
        read_groups(tmp_path / "absent.csv", records)


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ("ABCD", True),  # each of a subject of its own
        ("AABB", False),
        ("ABCA", False),
        ("A", False),
    ],
)
def test_a_column_must_not_say_who_somebody_is(
    tmp_path: Path, records: list[ImageRecord], values: str, refused: bool
) -> None:
    path = table(tmp_path, "subject,code\n" + "".join(f"P{n},{value}\n" for n, value in enumerate(values)))
    if refused:
        with pytest.raises(UserError, match="column code may identify subjects: 4 of its 4 values belong"):
            read_groups(path, records)
    else:
        assert len(read_groups(path, records)["code"]) == 2 * len(values)


def test_of_many_values_it_is_enough_that_most_mean_one_subject(tmp_path: Path) -> None:
    many = [record(2 * n) for n in range(20)]
    values = [*(f"name{n}" for n in range(14)), *["unknown"] * 6]
    path = table(tmp_path, "subject,code\n" + "".join(f"P{n},{value}\n" for n, value in enumerate(values)))
    with pytest.raises(UserError, match="14 of its 15 values"):
        read_groups(path, many)


def test_more_than_twelve_values_are_called_by_number() -> None:
    few = {"site": {f"i{n}": f"site {n % 12}" for n in range(24)}}
    assert number_values(few) == few
    found = number_values({"born": {f"i{n}": str(1950 + n % 13) for n in range(26)}})["born"]
    assert set(found.values()) == {f"value {n}" for n in range(1, 14)}
    assert found["i0"] == found["i13"] == "value 1"


def case(n: int, *, dice: float) -> dict[str, Any]:
    return {"image": f"i{n}", "subject": f"s{n}", "class": "front", "dice": dice, "hd95": 1.0, "surface_dice": dice}


def test_each_group_has_its_metrics_and_small_ones_are_named_without() -> None:
    rows = [case(n, dice=0.8 if n < 6 else 0.5) for n in range(12)]
    rows += [{"image": "i90", "subject": "s90", "rejected": "unreadable", "detail": ""}]
    of = {f"i{n}": "A" if n < 6 else "B" if n < 9 else "C" for n in range(11)} | {"i90": "A"}
    found = {
        group.value: group for group in compute_group_metrics("dim", rows, "segmenter", ["front"], {"scanner": of})
    }
    assert [(group.images, group.subjects) for group in found.values()] == [(6, 6), (3, 3), (2, 2)]
    assert found["A"].metrics is not None
    assert found["A"].metrics["dice"]["value"] == pytest.approx(0.8)
    assert found["B"].metrics is found["C"].metrics is None


def test_a_group_is_told_apart_where_both_sides_have_five_subjects_of_it() -> None:
    people = [record(2 * n) for n in range(30)]
    values = {r.image: "A" if n % 2 else "B" if n < 26 else "C" for n, r in enumerate(people)}
    assert usable_groups(values, people[:15], people[15:]) == (("A", "B"), ("C",))
    assert usable_groups(values, people[:15], people[15:20]) == ((), ("A", "B"))
