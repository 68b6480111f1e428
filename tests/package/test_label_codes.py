from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydicom.sr.codedict import codes

from medim.package.label_codes import list_builtin_labels, read_label_codes
from medim.package.package import Package
from medim.types import UserError

CLASSES = ("anterior", "posterior")


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(list_builtin_labels()["hippocampus"].read_text())
    return found


def test_the_shipped_codes_are_those_of_dicom() -> None:
    labels = read_label_codes("hippocampus", CLASSES, "segmenter")
    assert [label.name for label in labels] == list(CLASSES)
    for label, part in zip(labels, (codes.SCT.Anterior, codes.SCT.Posterior), strict=True):
        assert label.category is not None
        assert label.type is not None
        assert label.category.value == codes.cid7150.AnatomicalStructure.value
        assert label.type.value == codes.cid7140.Hippocampus.value  # CID 7140: brain structures for volumetry
        assert [modifier.value for modifier in label.modifiers] == [part.value]


def wrong(change: str, to: Any) -> dict[str, Any]:
    whole = content()
    target = whole["labels"][0]
    *path, last = change.split(".")
    for key in path:
        target = target[key]
    target[last] = to
    return whole


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (wrong("type.value", "75042008"), "'Arachnoid'.*not 'Hippocampus'"),  # another structure's code
        (wrong("type.value", "99999999"), "PS3.16"),
        (wrong("type.scheme", "99MEDIM"), "scheme"),
        (wrong("name", "Head"), "the classes"),
        (wrong("index", 0), "the classes"),
        (wrong("category", None), "`category` and `type`"),
        (wrong("threshold", 0.5), "multi-label"),
        (wrong("colour", [0, 0, 256]), "colour"),
        ({"labels": content()["labels"], "notes": "x"}, "notes"),
    ],
)
def test_a_code_that_is_not_published_for_the_class_is_refused(
    schema: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(schema))
    with pytest.raises(UserError, match=told):
        read_label_codes(tmp_path / "labels.json", CLASSES, "segmenter")


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        read_label_codes("nowhere.json", CLASSES, "segmenter")


def test_findings_may_do_without_codes_and_have_thresholds(tmp_path: Path) -> None:
    schema = {"labels": [{"index": 0, "name": "edema", "threshold": 0.3}, {"index": 1, "name": "mass"}]}
    (tmp_path / "labels.json").write_text(json.dumps(schema))
    labels = read_label_codes(tmp_path / "labels.json", ("edema", "mass"), "multi_label_classifier")
    assert [label.threshold for label in labels] == [0.3, None]


def test_codes_and_rules_stand_in_the_contract(packages: dict[str, Package]) -> None:
    contract = packages["segmenter"].contract
    assert [label.name for label in contract.labels] == list(contract.classes)
    assert contract.dicom_in.modality == ("MR",)
    assert packages["classifier"].contract.labels == ()


def test_the_index_of_a_code_may_be_the_value_of_the_class_in_mask_files(tmp_path: Path) -> None:
    whole = content()
    for label, value in zip(whole["labels"], (1, 4), strict=True):
        label["index"] = value
    (tmp_path / "labels.json").write_text(json.dumps(whole))
    labels = read_label_codes(tmp_path / "labels.json", CLASSES, "segmenter", (1, 4))
    assert [label.index for label in labels] == [1, 2]  # segments of DICOM are numbered without gaps
    with pytest.raises(UserError, match="expected the classes"):
        read_label_codes(tmp_path / "labels.json", CLASSES, "segmenter", (1, 5))
