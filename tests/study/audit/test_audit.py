from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from medim.data.index.index import build_index
from medim.data.loading.cohort import Cohort, open_cohort
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from medim.study.audit.audit import audit, write_audit
from medim.study.audit.groups import read_groups
from medim.tasks.task import CaseRow
from medim.types import Step
from tests.specs import make_spec

NUMBER = 50
CENTRE: list[Step] = [{"op": "centre", "shape": [8, 8, 8]}, {"op": "normalise"}]
CLASSES = ("large", "small")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of noise; those of one class are larger, those of one site brighter on one side."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    labels, groups = ["image,label"], ["image,site,sex"]
    for n in range(NUMBER):
        large, site = n % 2, n % 4 < 2
        array = rng.random((9 + 2 * large, 10, 9)).astype(np.float32)
        array[:, :5] += site
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"v{n:02d}.nii.gz")  # type: ignore[no-untyped-call, attr-defined]
        labels.append(f"v{n:02d},{'large' if large else 'small'}")
        groups.append(f"v{n:02d},{'north' if site else 'south'},F")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "groups.csv").write_text("\n".join(groups) + "\n")
    return folder


def cohort(source: Path, store: Path, steps: list[Step]) -> Cohort:
    index = build_index(source, "mri", labels=source / "labels.csv")
    splits = {r.image: "val" if n % 5 < 2 else "train" for n, r in enumerate(index.records)}
    opened = open_cohort(index, index.records, steps, split_seed=0, store=store)
    return replace(opened, index=index, splits=splits)  # type: ignore[arg-type]


def rows(images: Cohort) -> list[CaseRow]:
    return [
        {
            "image": r.image,
            "subject": r.subject,
            "class": name,
            "probability": p,
            "label": r.label,
            "prediction": "large",
        }
        for r in images.records("val")
        for name, p in zip(CLASSES, (0.7, 0.3), strict=True)
    ]


@pytest.mark.slow
def test_the_size_of_crops_tells_until_all_have_one_field_of_view(source: Path, tmp_path: Path) -> None:
    crops = audit(
        cohort(source, tmp_path, [{"op": "normalise"}]), kind="classifier", classes=CLASSES, window=[12, 10, 9]
    )
    common = audit(cohort(source, tmp_path, CENTRE), kind="classifier", classes=CLASSES, window=[8, 8, 8])
    before, after = ({one.name: one.prediction.auroc["value"] for one in found.shortcuts} for found in (crops, common))
    assert before["raw size"] == before["input size"] == before["padding"] == 1.0
    assert after["raw size"] == 1.0
    assert after["input size"] == after["padding"] == 0.5


def test_a_group_is_told_from_pixels_and_encoder_and_metrics_come_group_by_group(source: Path, tmp_path: Path) -> None:
    images = cohort(source, tmp_path / "store", CENTRE)
    spec = {"kind": "encoder", "spatial_dims": 3, "in_channels": 1, "input_shape": [8, 8, 8], "modality": "mri"}
    spec |= {"encoder": {"name": "unet", "channels": [4, 8], "summary_channels": 8}, "preprocessing": CENTRE}
    torch.manual_seed(0)
    save_model(tmp_path / "encoder", "encoder", build_encoder(make_spec(spec)), make_spec(spec))
    found = audit(
        images,
        kind="classifier",
        classes=CLASSES,
        encoders={"dim": tmp_path},
        cases={"dim": rows(images)},
        groups=read_groups(source / "groups.csv", images.index.records),
    )
    probes = {(probe.column, probe.features): probe for probe in found.probes}
    assert set(probes) == {("site", "dim"), ("site", "pixels")}
    assert all(probe.prediction.above_chance and probe.values == ("north", "south") for probe in probes.values())
    assert any(note.startswith("sex: not probed, because only 1 of 1") for note in found.notes)
    assert {(group.column, group.value, group.images) for group in found.groups} == {
        ("site", "north", 11),
        ("site", "south", 9),
        ("sex", "F", 20),
    }
    assert found.models["dim"]["auroc"]["value"] == 0.5
    write_audit(tmp_path, found)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["schema_version"] == 2
    assert written["images"]["val"] == {"images": 20, "subjects": 20}
    assert written["probes"][0]["prediction"]["chance"]["balanced_accuracy"] == 0.5


def test_many_images_are_learnt_from_in_part_and_the_notes_say_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.study.audit.audit.MAX_TRAINING_IMAGES", 20)
    found = audit(cohort(source, tmp_path, CENTRE), kind="classifier", classes=CLASSES)
    assert found.notes == ("trained on 20 of 30 training images (seed 0)",)
    assert found.images["train"]["images"] == found.duplicates.images - 20 == 30
    assert found.shortcuts[0].prediction.auroc["n"] == 20


def test_segmentation_has_no_shortcuts_and_says_so(source: Path, tmp_path: Path) -> None:
    found = audit(cohort(source, tmp_path, CENTRE), kind="segmenter", classes=["front"])
    assert found.shortcuts == ()
    assert found.notes == ("shortcuts: computed only for classification with one class per image",)
