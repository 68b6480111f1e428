"""Classes of masks: the values that occur or are named, mapped to consecutive numbers inside."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim.data.index.index import Index, build_index
from medim.data.loading.store import Store
from medim.data.mask_classes import to_class_numbers, to_file_values
from medim.tasks import find_task
from medim.types import Array, UserError
from tests.data.synthetic import noise, write_nifti

SHAPE = (6, 5, 4)


def values(*numbers: int, dtype: Any = np.int32) -> Array:
    """A mask in which each of the numbers occurs."""
    return np.resize(np.array(numbers), SHAPE).astype(dtype)


def decathlon(root: Path, mask: Array, labels: dict[str, Any] | None, n_cases: int = 2) -> Path:
    for case in range(n_cases):
        write_nifti(root / "imagesTr" / f"c{case}.nii.gz", noise(*SHAPE, seed=case))
        write_nifti(root / "labelsTr" / f"c{case}.nii.gz", mask)
    if labels is not None:
        pairs = [{"image": f"imagesTr/c{k}.nii.gz", "label": f"labelsTr/c{k}.nii.gz"} for k in range(n_cases)]
        (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    return root


def mask_of(index: Index) -> Array:
    return index.open_mask(index.records[0]).array[0]


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ((0, 255), np.uint8),
        ((0, 1, 4), np.float32),
        ((0, 2, 41, 1035, 2035), np.int32),  # as FreeSurfer numbers structures
        ((7, 9), np.uint16),  # without a background
    ],
)
def test_each_value_of_a_mask_but_zero_is_a_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, numbers: tuple[int, ...], dtype: Any
) -> None:
    caplog.set_level(logging.INFO)
    mask = values(*numbers, dtype=dtype)
    index = build_index(decathlon(tmp_path, mask, None), "mri")
    class_values = tuple(sorted({*numbers} - {0}))
    assert index.classes == tuple(f"label-{value}" for value in class_values)
    assert index.class_values == class_values
    numbered = mask_of(index)
    assert numbered.dtype == np.uint8
    np.testing.assert_array_equal(to_file_values(numbered, index.class_values), mask)
    plural = "es" * (len(class_values) > 1)
    listing = ", ".join(map(str, (0, *class_values)))
    assert f"mask values {listing}: {len(class_values)} class{plural}" in caplog.text


def test_a_picture_of_0_and_255_is_a_mask_of_one_class(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:6] = 255
    for k in range(2):
        Image.fromarray((noise(8, 8, seed=k) % 256).astype(np.uint8)).save(tmp_path / f"x{k}.png")
        Image.fromarray(mask).save(tmp_path / f"m{k}.png")
    (tmp_path / "labels.csv").write_text("image,mask\nx0.png,m0.png\nx1.png,m1.png\n")
    index = build_index(tmp_path, "xray")
    assert (index.classes, index.class_values) == (("label-255",), (255,))
    np.testing.assert_array_equal(mask_of(index), mask // 255)


def test_a_jpeg_with_the_marks_of_its_compression_and_a_grey_image_are_no_masks(tmp_path: Path) -> None:
    ball = np.hypot(*np.mgrid[-16:16, -16:16]) < 9
    for name, pixels in (("soft.jpg", 255 * ball), ("grey.png", np.resize(np.arange(256), (32, 32)))):
        (tmp_path / name).mkdir()
        Image.fromarray((noise(32, 32) % 256).astype(np.uint8)).save(tmp_path / name / "x.png")
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"m-{name}")
        (tmp_path / name / "labels.csv").write_text(f"image,mask\nx.png,m-{name}\n")
    with pytest.raises(UserError, match="label-unreadable"):
        build_index(tmp_path / "soft.jpg", "xray")
    with pytest.raises(UserError, match=r"expected up to 254 classes, got 255 values from 1 to 255"):
        build_index(tmp_path / "grey.png", "xray")


def test_a_gap_in_the_named_values_is_no_class(tmp_path: Path) -> None:
    labels = {"0": "background", "1": "necrosis", "2": "oedema", "4": "enhancing"}
    index = build_index(decathlon(tmp_path, values(0, 1, 2, 4), labels), "mri")
    assert index.classes == ("necrosis", "oedema", "enhancing")
    assert index.class_values == (1, 2, 4)
    assert mask_of(index).max() == 3
    index.write(tmp_path / "index")
    again = Index.read(tmp_path / "index")
    assert (again.classes, again.class_values, again.hash) == (index.classes, index.class_values, index.hash)
    np.testing.assert_array_equal(mask_of(again), mask_of(index))


def test_a_value_that_dataset_json_does_not_name_is_rejected(tmp_path: Path) -> None:
    source = decathlon(tmp_path, values(0, 1, 2), {"0": "background", "1": "a", "4": "b"})
    write_nifti(source / "labelsTr" / "c1.nii.gz", values(0, 1, 4))
    index = build_index(source, "mri")
    assert [record.image for record in index.records] == ["imagesTr/c1"]
    assert {rejection.reason for rejection in index.rejected} == {"unknown-class"}
    assert "the value 2, which dataset.json does not name" in index.rejected[0].detail


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "gland": 1, "core": 2, "ignore": 3},
        {"0": "background", "1": "gland", "2": "core", "3": "Ignore"},
        {"background": 0, "gland": [1], "core": 2, "IGNORE": 3},
    ],
)
def test_the_ignore_label_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: dict[str, Any]) -> None:
    caplog.set_level(logging.INFO)
    mask = values(3, 0, 1, 2, 3)
    index = build_index(decathlon(tmp_path, mask, labels), "mri")
    assert (index.classes, index.ignore_value) == (("gland", "core"), 3)
    np.testing.assert_array_equal(mask_of(index) == 255, mask == 3)
    assert "2 classes (gland, core); voxels of value 3 are ignored" in caplog.text


def test_regions_are_refused_for_training_by_name_and_never_renamed(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    index = build_index(decathlon(tmp_path, values(0, 1, 2, 3), labels), "mri")
    assert index.classes == ("part of whole", "part of whole and core", "enhancing")
    error = find_task("segmentation").find_training_error(index)
    assert error is not None
    assert "'whole', 'core'" in error
    assert "Name each value" in error


@pytest.mark.parametrize(
    "labels", [{"0": "background", "1": "a", "2": "a"}, {"background": 0, "a": 1, "b": 1}, {"a": -1}, {"a": 1.5e9}]
)
def test_values_or_names_that_are_not_unique_or_not_in_range_are_an_error(
    tmp_path: Path, labels: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r'expected (one name per mask value|mask values from 0 to 65535) in "labels"'):
        build_index(decathlon(tmp_path, values(0, 1), labels), "mri")


def test_an_index_of_an_earlier_version_is_read_as_identity(tmp_path: Path) -> None:
    source = decathlon(tmp_path, values(0, 1, 2), {"0": "background", "1": "a", "2": "b"})
    index = build_index(source, "mri")
    assert index.class_values == ()
    index.write(tmp_path / "index")
    summary = json.loads((tmp_path / "index" / "summary.json").read_text())
    for key in ("class_values", "ignore_value", "regions"):
        del summary[key]
    (tmp_path / "index" / "summary.json").write_text(json.dumps(summary))
    again = Index.read(tmp_path / "index")
    assert again.hash == index.hash
    np.testing.assert_array_equal(mask_of(again), mask_of(index))


def test_a_store_does_not_reuse_masks_of_other_numbers(tmp_path: Path) -> None:
    source = decathlon(tmp_path / "source", values(0, 1, 4), {"0": "background", "1": "a", "4": "b"})
    index = build_index(source, "mri")
    store = Store(tmp_path / "store")
    one = store.add(index, index.records[0], [])
    (source / "dataset.json").write_text((source / "dataset.json").read_text().replace('"1": "a"', '"1": "ignore"'))
    other_index = build_index(source, "mri")
    other = store.add(other_index, other_index.records[0], [])
    assert one != other
    assert set(np.unique(store.read_mask(one))) == {0, 1, 2}
    assert set(np.unique(store.read_mask(other))) == {0, 1, 255}
    assert store.read_foreground(other).classes.tolist() == [1]


def test_a_value_that_appears_after_indexing_is_an_error_that_lists_the_classes() -> None:
    with pytest.raises(ValueError, match=r"^3, 9$"):
        to_class_numbers(np.array([0, 1, 3, 9], np.uint8), (1, 2))


def test_masks_without_any_class_cannot_be_learnt_even_beside_labels_of_images(tmp_path: Path) -> None:
    source = decathlon(tmp_path, values(0), None)
    (source / "labels.csv").write_text("image,label\nc0,sick\nc1,well\n")
    index = build_index(source, "mri")
    assert (index.classes, index.labels) == ((), ("sick", "well"))
    assert "only background" in str(find_task("segmentation").find_training_error(index))
