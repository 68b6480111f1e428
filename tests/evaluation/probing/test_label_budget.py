from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim.data.index.index import ImageRecord, Index
from medim.data.loading.cohort import Cohort, VolumeCache
from medim.evaluation.probing.label_budget import Budget, draw_probe_subsets, number_subjects
from medim.evaluation.probing.probe_cohort import open_probe_cohort
from medim.tasks import TASKS
from medim.types import UsageError, UserError
from tests.specs import make_spec

SPEC: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "input_shape": [8, 8, 8], "encoder": {"name": "unet"}}
PARTS = ["train"] * 6 + ["val"] * 2  # eight images of four subjects
LABELS = ["big", "small", "big", "small", "big", "small", "big", "small"]


def changed(index: Index, **columns: list[Any]) -> Index:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return replace(index, records=tuple(replace(r, **row) for r, row in zip(index.records, rows, strict=True)))


@pytest.fixture
def cohort(index: Index, tmp_path: Path) -> Cohort:
    labelled = changed(index, label=[*LABELS[:5], None, *LABELS[6:]], split=PARTS)
    return open_probe_cohort(labelled, TASKS["classification"], make_spec(SPEC), split_seed=0, store=tmp_path / "store")


def test_unlabelled_images_of_the_training_split_are_there_but_not_among_the_labelled(cohort: Cohort) -> None:
    labelled, val = cohort.labelled_records("train"), cohort.labelled_records("val")
    assert [len(part) for part in (cohort.records("train"), labelled, val)] == [6, 5, 2]
    assert cohort.classes == ("big", "small")
    assert cohort.class_indices(labelled + val).tolist() == [0, 1, 0, 1, 0, 0, 1]


def test_an_image_is_read_from_the_store_once_where_memory_allows(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, val = VolumeCache(cohort), cohort.records("val")
    first = [volume.array for volume in cache.read_volumes(val)]
    assert [array.shape for array in first] == [(1, 12, 10, 8)] * 2
    read = []
    monkeypatch.setattr(type(cohort.store), "load_volume", lambda _, key: read.append(key))
    assert all(np.array_equal(a, v.array) for a, v in zip(first, cache.read_volumes(val), strict=True))
    assert read == []
    monkeypatch.undo()
    monkeypatch.setattr("medim.data.loading.cohort.CACHE_BYTES", 0)
    fresh = VolumeCache(cohort)
    assert [v.array.sum() for v in fresh.read_volumes(val)] == [a.sum() for a in first]
    assert fresh._volumes == {}


def test_subjects_are_numbered_as_they_come(cohort: Cohort) -> None:
    assert number_subjects(cohort.records("train")).tolist() == [0, 0, 1, 1, 2, 2]


def test_subsets_are_nested_and_a_budget_of_all_labels_has_one(cohort: Cohort) -> None:
    some, everything = Budget(labelled=4), Budget(fraction=1.0)
    subsets = draw_probe_subsets(cohort, TASKS["classification"], [some, everything, some], [3, 0, 3])
    assert list(subsets) == [(some, 3), (some, 0), (everything, 3)]
    assert subsets[everything, 3] == cohort.labelled_records("train")
    assert set(subsets[some, 3]) < set(cohort.labelled_records("train"))


def test_a_subset_without_a_class_is_refused_by_name(cohort: Cohort) -> None:
    labels = ["big", None, None, "small", "big", None, "big", "small"]  # training: big, small, big of three subjects
    lonely = replace(cohort, index=changed(cohort.index, label=labels))
    with pytest.raises(UserError, match=r"budget 1, seed 0: expected a label of every class \(big, small\)"):
        draw_probe_subsets(lonely, TASKS["classification"], [Budget(labelled=1)], [0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labelled": 0}, "--labelled: expected at least 1 image, got 0"),
        ({"fraction": 0.0}, "--label-fraction: expected above 0 and up to 1"),
        ({"fraction": 5.0}, "--label-fraction: expected above 0 and up to 1"),
        ({"labelled": 3, "fraction": 0.5}, "expected one of them, got both"),
    ],
)
def test_a_budget_out_of_range_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(**values)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None] * 8, "no images with a class label in the training split"),
        ([*LABELS[:6], None, None], "no images with a class label in the validation split"),
        (["big"] * 8, "2 or more classes, got only 'big'"),
        ([*LABELS[:6], "huge", "big"], "got huge in validation only"),
    ],
)
def test_labels_that_no_probe_can_use_are_told_before_anything_is_preprocessed(
    labels: list[str | None], message: str, index: Index, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_probe_cohort(
            changed(index, label=labels, split=PARTS),
            TASKS["classification"],
            make_spec(SPEC),
            split_seed=0,
            store=tmp_path / "store",
        )
    assert not (tmp_path / "store").exists()


def test_images_of_another_kind_than_the_encoder_takes_are_refused(index: Index, tmp_path: Path) -> None:
    labelled = changed(index, label=LABELS, split=PARTS)
    with pytest.raises(UserError, match=r"expected 2D images of 1 channel\(s\).*got 3D of 1"):
        open_probe_cohort(
            labelled,
            TASKS["classification"],
            make_spec({**SPEC, "spatial_dims": 2, "input_shape": [8, 8]}),
            split_seed=0,
            store=tmp_path / "store",
        )


def test_an_image_that_cannot_be_read_is_left_out_and_counted(masks: Path, index: Index, tmp_path: Path) -> None:
    record: ImageRecord = index.records[1]
    (masks / record.path).write_bytes(b"no image")
    labelled = changed(index, label=LABELS, split=PARTS)
    cohort = open_probe_cohort(
        labelled, TASKS["classification"], make_spec(SPEC), split_seed=0, store=tmp_path / "store"
    )
    assert len(cohort.rejections) == 1
    assert record.image not in {r.image for r in cohort.records("train")}


def test_a_budget_is_named_after_what_it_gives() -> None:
    assert [Budget(fraction=0.01).name, Budget(fraction=0.125).name, Budget(labelled=50).name] == ["1%", "12.5%", "50"]
