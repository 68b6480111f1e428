from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim.data.index.index import AllRejectedError, build_index
from medim.data.readers import ReadError
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.package.dicom_rules import DEFAULT_RULES, DicomRules, load_dicom_rules
from medim.package.package import Package
from medim.predict.predict import predict
from medim.types import Modality, UserError
from tests.data.synthetic import dataset, noise, save, write_series, xray
from tests.predict.test_predict import rows_of

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # code, rules, tags of a series that breaks them
    ("wrong-modality", {"modality": ["CR"]}, {}),
    ("wrong-sop-class", {"sop_class": ["EnhancedMRImageStorage"]}, {}),
    ("wrong-body-part", {"body_part": ["CHEST"]}, {"BodyPartExamined": "RIBCAGE"}),
    ("wrong-body-part", {"body_part": ["CHEST", "SCT:816094009"]}, {"BodyPartExamined": "Smith"}),
    ("no-body-part", {"body_part": ["CHEST"]}, {"BodyPartExamined": ""}),
    ("wrong-image-type", {"image_type_never": ["T2 MAP"]}, {"ImageType": ["DERIVED", "PRIMARY", "T2 MAP"]}),
    ("wrong-image-type", {"image_type": ["ORIGINAL"]}, {"ImageType": ["DERIVED", "PRIMARY"]}),
    ("wrong-orientation", {"orientation": ["sagittal", "coronal"]}, {}),
    ("wrong-slice-count", {"slices": {"minimum": 6}}, {}),
    ("wrong-slice-count", {"slices": {"maximum": 4}}, {}),
    ("wrong-spacing", {"slice_spacing": {"maximum": 1.5}}, {}),
    ("wrong-spacing", {"pixel_spacing": {"minimum": 1.1}}, {}),
]


def check(rules: dict[str, Any], folder: Path, modality: Modality = "mri") -> None:
    index = build_index(folder, modality, remember=False)
    plan = index.plan_slices(index.records[0])
    assert plan is not None
    DicomRules.model_validate_json(json.dumps(rules)).check_plan(plan)


@pytest.mark.parametrize(("code", "rules", "tags"), CASES)
def test_each_rule_refuses_with_its_own_code(
    code: str, rules: dict[str, Any], tags: dict[str, Any], tmp_path: Path
) -> None:
    write_series(tmp_path, **tags)
    with pytest.raises(ReadError) as raised:
        check(rules, tmp_path)
    assert raised.value.reason == code
    assert "Smith" not in str(raised.value)


def test_an_image_that_keeps_every_rule_is_let_through(tmp_path: Path) -> None:
    write_series(tmp_path, BodyPartExamined="brain", FrameOfReferenceUID="1.2.3")
    rules = {
        "modality": ["MR"],
        "sop_class": ["MRImageStorage"],
        "body_part": ["BRAIN", "HEAD"],
        "image_type": ["ORIGINAL"],
        "image_type_never": ["T1 MAP"],
        "orientation": ["axial"],
        "slices": {"minimum": 5, "maximum": 5},
        "pixel_spacing": {"minimum": 0.5, "maximum": 1.5},
        "slice_spacing": {"minimum": 1.5, "maximum": 2.5},
    }
    check(rules, tmp_path)


def test_an_anatomic_region_counts_where_the_body_part_is_not_said(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset

    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "816094009", "SCT", "Chest"
    save(xray(noise(9, 9).astype(np.uint16), AnatomicRegionSequence=[region]), tmp_path / "a.dcm")
    check({"body_part": ["SCT:816094009"]}, tmp_path, "xray")
    with pytest.raises(ReadError, match="wrong-body-part"):
        check({"body_part": ["ABDOMEN"]}, tmp_path, "xray")


def test_slices_of_which_some_have_no_frame_of_reference_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, each=[{"FrameOfReferenceUID": "1.2.3"}])
    with pytest.raises(ReadError) as raised:
        check({}, tmp_path)
    assert raised.value.reason == "mixed-references"


def test_every_slice_is_held_against_the_rules(tmp_path: Path) -> None:
    write_series(tmp_path, each=[{}, {}, {"BodyPartExamined": "CHEST"}], BodyPartExamined="BRAIN")
    with pytest.raises(ReadError, match="wrong-body-part"):
        check({"body_part": ["BRAIN"]}, tmp_path)


def test_real_images_keep_the_rules_of_their_modality(shared_data: Path) -> None:
    for folder, modality in (("mri-dicom", "mri"), ("xray-dicom", "xray")):
        index = build_index(shared_data / folder, modality)  # type: ignore[arg-type]
        for record in index.records:
            plan = index.plan_slices(record)
            assert plan is not None
            DEFAULT_RULES[index.modality].check_plan(plan)


def test_one_slice_is_no_volume_by_default(tmp_path: Path) -> None:
    save(dataset(noise(9, 9).astype(np.uint16)), tmp_path / "a.dcm")
    with pytest.raises(ReadError, match="wrong-slice-count"):
        check(json.loads(DEFAULT_RULES["mri"].model_dump_json()), tmp_path)


def test_rules_of_a_file_stand_in_place_of_the_defaults_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text('{"body_part": ["CHEST"]}')
    rules = load_dicom_rules("xray", tmp_path / "rules.json")
    assert rules.body_part == ("CHEST",)
    assert rules.modality == DEFAULT_RULES["xray"].modality
    for wrong in ('{"study_description": ["x"]}', '{"modality": ["CT"]}', '{"body_part": ["chest*"]}', "["):
        (tmp_path / "rules.json").write_text(wrong)
        with pytest.raises(UserError, match=r"rules\.json"):
            load_dicom_rules("xray", tmp_path / "rules.json")


@pytest.fixture(scope="module")
def chest(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A classifier of chest X-rays."""
    folder = tmp_path_factory.mktemp("chest")
    (folder / "rules.json").write_text('{"body_part": ["CHEST"]}')
    return export(runs["classifier"], folder / "package", ExportOptions(dicom_rules=folder / "rules.json"))


@pytest.mark.parametrize("output_format", ["nifti", "dicom"])
def test_another_body_part_or_modality_gets_no_answer_and_nothing_left_is_exit_4(
    output_format: Any, chest: Package, shared_data: Path, tmp_path: Path
) -> None:
    save(dataset(noise(9, 9).astype(np.uint16), Modality="CT"), tmp_path / "in" / "ct.dcm")
    sources = [shared_data / "xray-dicom" / "test4.dcm", tmp_path / "in"]
    with pytest.raises(AllRejectedError) as raised:
        predict(chest, sources, tmp_path / "out", output_format=output_format)
    assert raised.value.exit_code == 4
    assert {row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")} == {
        "wrong-body-part",
        "wrong-modality",
    }
    rows = predict(
        chest, [shared_data / "xray-dicom" / "test2.dcm", *sources], tmp_path / "two", output_format=output_format
    )
    assert len(rows) == 1
