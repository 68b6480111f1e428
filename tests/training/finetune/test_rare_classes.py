"""Class weights, balanced batches and lost classes, from labels of which most are of one class."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medim.config import FinetuneConfig, check_config
from medim.data.index.index import Index, build_index
from medim.files import file_sha256, read_json
from medim.models.serialization import load_model
from medim.reports.report import write_report_page
from medim.training.finetune.lost_classes import TRAINING_IMAGES, find_lost_classes, warn_of_lost_classes
from medim.training.finetune.run import build_finetune_loader, build_model_spec, finetune, open_labelled_cohort
from medim.types import UsageError

WEIGHTS = Path("model") / "model.safetensors"
CLASSES = ("common", "rare")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """40 noisy pictures, of which each fifth is bright and rare."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, rows = np.random.default_rng(0), ["image,label"]
    for number in range(40):
        is_rare = number % 5 == 0
        np.save(folder / f"p{number:02d}.npy", (rng.normal(0, 0.3, (16, 16)) + 2 * is_rare).astype(np.float32))
        rows.append(f"p{number:02d},{CLASSES[is_rare]}")
    table = folder.parent / f"{folder.name}.csv"
    table.write_text("\n".join(rows) + "\n")
    return build_index(folder, "xray", labels=table)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def make_config(**changes: Any) -> FinetuneConfig:
    content: dict[str, Any] = {
        "task": "classification",
        "modality": "xray",
        "preprocessing": [],
        "views": {"shape": [16, 16], "augmentations": [{"op": "noise"}]},
        "encoder": {"name": "convnet", "channels": [4, 8], "summary": "mean_max", "hidden": 0, "summary_channels": 8},
        "head": {"name": "classification"},
        "max_steps": 6,
        "batch_size": 4,
        "lr": 1e-2,
        "checkpoint_every_steps": 3,
    }
    config = check_config("finetune", {**content, **changes}, source="test")
    assert isinstance(config, FinetuneConfig)
    return config


def list_used_images(run: Path) -> list[str]:
    with (run / "split.csv").open() as file:
        return [row["image"] for row in csv.DictReader(file) if row["used_for_training"] == "yes"]


def test_balanced_class_weights_are_fitted_to_the_labelled_training_images(
    index: Index, tmp_path: Path, store: Path
) -> None:
    config = make_config(head={"name": "classification", "class_weights": "balanced"}, max_steps=1)
    summary = finetune(config, index, tmp_path / "run", labelled=9, store=store, fit_ood_detector=False)
    labels = {record.image: record.label for record in index.records}
    used = [labels[image] for image in list_used_images(tmp_path / "run")]
    counts = np.array([used.count(name) for name in CLASSES])
    expected = (1 / counts) / (1 / counts).mean()
    all_counts = np.array([32, 8])
    assert len(used) == 9
    assert not np.allclose(expected, (1 / all_counts) / (1 / all_counts).mean())
    assert summary["class_weights"] == pytest.approx(dict(zip(CLASSES, expected, strict=True)))
    head = load_model(tmp_path / "run")[1].head
    assert head is not None
    assert head["class_weights"] == pytest.approx(list(expected))
    assert read_json(tmp_path / "run" / "summary.json")["class_weights"] == summary["class_weights"]


def test_balanced_class_weights_of_a_segmentation_count_voxels_with_the_background(
    finetune_config: FinetuneConfig, cohort_index: Index, volumes: Path, tmp_path: Path
) -> None:
    config = finetune_config.model_copy(update={"head": {"name": "segmentation", "class_weights": "balanced"}})
    cohort = open_labelled_cohort(config, cohort_index, split_seed=0, store=tmp_path / "store")
    records = cohort.records("train")[:2]
    head = build_model_spec(config, cohort, 0, 0, records).head
    counts = np.zeros(2)
    for record in records:
        mask = np.asarray(nibabel.load(volumes / "labelsTr" / f"{Path(record.image).name}.nii.gz").dataobj)
        counts += np.bincount(mask.reshape(-1).astype(int), minlength=2)
    expected = (1 / counts) / (1 / counts).mean()
    assert head == {"name": "segmentation", "class_weights": pytest.approx(list(expected))}
    assert expected[1] > 10 * expected[0]


def test_balanced_batches_have_equally_many_images_of_each_class(index: Index, store: Path) -> None:
    """Of the unbalanced batches, some lack the rare class."""
    shares = {}
    for is_balanced in (True, False):
        config = make_config(balanced_batches=is_balanced)
        cohort = open_labelled_cohort(config, index, split_seed=0, store=store)
        records = cohort.records("train")
        loader = build_finetune_loader(config, cohort, records, CLASSES, steps=30, seed=0)
        shares[is_balanced] = [int(target.sum()) for _, target in loader]
    assert shares[True] == [2] * 30
    assert min(shares[False]) == 0


def test_a_resumed_run_with_balanced_batches_ends_in_the_same_bytes(index: Index, tmp_path: Path, store: Path) -> None:
    head = {"name": "classification", "class_weights": "balanced", "focal_gamma": 2.0}
    config = make_config(balanced_batches=True, head=head)
    for name in ("whole", "cut"):
        finetune(config, index, tmp_path / name, store=store, fit_ood_detector=False)
    (tmp_path / "cut" / "checkpoints" / "step-6.ckpt").unlink()
    (tmp_path / "cut" / WEIGHTS).unlink()
    summary = finetune(config, index, tmp_path / "cut", store=store, resume=True, fit_ood_detector=False)
    assert summary["resumed_from_steps"] == [3]
    assert file_sha256(tmp_path / "whole" / WEIGHTS) == file_sha256(tmp_path / "cut" / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head": {"name": "classification", "class_weights": [1.0, 2.0, 3.0]}},
            r"head.class_weights: expected 2 numbers, one for each of common, rare, got 3\. Give one",
        ),
        ({"head": {"name": "classification", "class_weights": []}}, "class_weights: expected"),
        ({"head": {"name": "classification", "class_weights": [1.0, 1e9]}}, "class_weights: expected"),
        ({"head": {"name": "classification", "class_weights": [1e-50, 1e-50]}}, "class_weights: expected"),
        ({"head": {"name": "classification", "dice": "image"}}, "classification: no option 'dice'"),
        ({"head": {"name": "classification", "focal_gamma": 11}}, "focal_gamma: expected a number of at most 10"),
        (
            {"task": "regression", "head": {"name": "regression"}, "balanced_batches": True},
            "balanced_batches: expected a classification with one class per image, got regression",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_images_are_read(
    changes: dict[str, Any], message: str, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.data.loading.cohort.fill_store", lambda *_, **__: pytest.fail("an image was read"))
    if changes.get("task") == "regression":
        monkeypatch.setattr("medim.training.finetune.run.select_head", lambda config, index: config)
    with pytest.raises(UsageError, match=message):
        finetune(make_config(**changes), index, tmp_path / "run", store=tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_class_weights_of_a_segmentation_need_one_for_the_background(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path
) -> None:
    config = finetune_config.model_copy(update={"head": {"name": "segmentation", "class_weights": [1.0]}})
    with pytest.raises(UsageError, match="expected 2 numbers, one for each of background, ball, got 1"):
        finetune(config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    balanced = finetune_config.model_copy(update={"balanced_batches": True})
    with pytest.raises(UsageError, match=r"balanced_batches: expected a classification .*, got segmentation"):
        finetune(balanced, cohort_index, tmp_path / "run", store=tmp_path / "store")


def list_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.endswith("lost_classes")]


def test_a_class_that_is_never_predicted_is_stated_with_advice(
    index: Index, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The head starts at 0, and a rate below the smallest number of float32 leaves the answer at the first class."""
    caplog.set_level(logging.WARNING, "medim")
    config = make_config(lr=1e-60, weight_decay=0.0, max_steps=1)
    summary = finetune(config, index, tmp_path / "run", store=store, fit_ood_detector=False)
    assert summary["lost_classes"] == {"rare": 0.0}
    assert read_json(tmp_path / "run" / "summary.json")["lost_classes"] == {"rare": 0.0}
    (warning,) = list_warnings(caplog)
    assert warning.startswith("class rare: the model finds none of its labels.")
    assert "increase max_steps (now 1); for rare classes, see also head.class_weights, balanced_batches" in warning
    html = write_report_page(tmp_path / "run").read_text()
    assert "The model finds hardly anything of: rare." in html
    assert "rare (none of its labels)" in html


def test_the_advice_names_only_options_that_are_not_set_yet(
    index: Index, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "medim")
    head = {"name": "classification", "class_weights": "balanced"}
    config = make_config(lr=1e-60, weight_decay=0.0, max_steps=1, head=head, balanced_batches=True)
    finetune(config, index, tmp_path / "run", store=store, fit_ood_detector=False)
    (warning,) = list_warnings(caplog)
    assert warning.endswith("increase max_steps (now 1)")


def test_a_trained_model_has_lost_no_class(
    index: Index, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "medim")
    config = make_config(head_init="probe", max_steps=20)
    summary = finetune(config, index, tmp_path / "run", store=store, fit_ood_detector=False)
    assert summary["val"] is not None
    assert summary["val"]["metrics"]["balanced_accuracy"]["value"] > 0.9
    assert (summary["lost_classes"], summary["class_weights"], list_warnings(caplog)) == ({}, None, [])
    assert "Classes that the model does not find" in write_report_page(tmp_path / "run").read_text()


def make_split_index(index: Index, rare_part: str) -> Index:
    """The index with a validation split of ten common pictures, and the rare ones in one part only."""
    commons = [record.image for record in index.records if record.label == "common"]
    parts = {record.image: rare_part for record in index.records} | dict.fromkeys(commons, "train")
    parts |= dict.fromkeys(commons[:10], "val")
    return replace(index, records=tuple(replace(record, split=parts[record.image]) for record in index.records))


def test_a_class_without_validation_images_is_measured_on_training_images(
    index: Index, tmp_path: Path, store: Path
) -> None:
    config = make_config(lr=1e-60, weight_decay=0.0, max_steps=1)
    split_index = make_split_index(index, "train")
    summary = finetune(config, split_index, tmp_path / "run", store=store, fit_ood_detector=False)
    assert summary["val"] is not None
    assert summary["val"]["n"] == 10
    assert summary["lost_classes"] == {"rare": 0.0}


def test_a_class_without_labelled_training_images_gets_other_advice(
    index: Index, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "medim")
    head = {"name": "classification", "class_weights": "balanced"}
    config = make_config(lr=1e-60, weight_decay=0.0, max_steps=1, head=head)
    split_index = make_split_index(index, "val")
    summary = finetune(config, split_index, tmp_path / "run", store=store, fit_ood_detector=False)
    assert summary["lost_classes"] == {"rare": 0.0}
    assert summary["class_weights"] == {"common": 1.0, "rare": 1.0}
    (warning,) = list_warnings(caplog)
    assert "No labelled training image has this class" in warning


class Constant(torch.nn.Module):
    """Network with the same class in every voxel."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 2, *image.shape[2:])
        logits[:, int(self.value)] = 1.0
        return logits


def test_a_segmenter_without_validation_images_is_measured_on_some_training_images(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.training.finetune.lost_classes.TRAINING_IMAGES", 3)
    cohort = open_labelled_cohort(finetune_config, cohort_index, split_seed=0, store=tmp_path / "store")
    train = cohort.records("train")
    spec = build_model_spec(finetune_config, cohort, 0, 0, train)
    opened: list[str] = []
    read = type(cohort_index).open
    monkeypatch.setattr(
        type(cohort_index), "open", lambda self, record: (opened.append(record.image), read(self, record))[1]
    )
    assert find_lost_classes(Constant(0), cohort, train, [], spec) == {"ball": 0.0}
    assert opened == [record.image for record in train[:3]]
    assert find_lost_classes(Constant(1), cohort, train, [], spec) == {}
    assert TRAINING_IMAGES >= 3
    warn_of_lost_classes({}, cohort, train, spec, finetune_config)
