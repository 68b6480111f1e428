from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from medim.config import (
    FinetuneConfig,
    PretrainConfig,
    ViewsConfig,
    apply_overrides,
    check_config,
    load_config,
    read_config,
)
from medim.data.contamination import load_training_history
from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import open_cohort
from medim.data.loading.splits import assign_splits
from medim.evaluation.cases import read_cases
from medim.evaluation.evaluate import evaluate
from medim.files import file_sha256
from medim.models.model import build_model
from medim.models.serialization import load_encoder, load_model
from medim.reports.report import write_report_page
from medim.training.auto_config import resolve_run_config
from medim.training.finetune.config import dry_run_finetuning, resolve_finetune_config
from medim.training.finetune.module import FinetuneModule
from medim.training.finetune.options import FinetuneOptions
from medim.training.finetune.run import build_finetune_loader, finetune
from medim.training.pretrain.run import pretrain
from medim.types import UsageError, UserError
from tests.specs import make_spec

WEIGHTS = Path("model") / "model.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def encoder(pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, store: Path) -> Path:
    pretrain(pretrain_config, cohort_index, tmp_path / "encoder", store=store)
    return tmp_path / "encoder"


def rows_of(run: Path) -> list[dict[str, str]]:
    """The rows of `assign_splits.csv`."""
    return list(csv.DictReader((run / "split.csv").open()))


def test_segmentation_learns_a_bright_ball(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    config = finetune_config.model_copy(update={"max_steps": 150})
    summary = finetune(config, cohort_index, tmp_path / "run", store=store)
    assert summary["val"]["metrics"]["dice"]["value"] > 0.8
    assert summary["init"] == "scratch"


def test_a_budget_counts_images_and_the_validation_subjects_are_never_trained_on(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    summary = finetune(finetune_config, cohort_index, tmp_path / "run", labelled=4, store=store)
    rows = rows_of(tmp_path / "run")
    splits = assign_splits(cohort_index)
    trained_on = {row["subject"] for row in rows if row["used_for_training"] == "yes"}
    held_out = {r.subject for r in cohort_index.records if splits[r.image] == "val"}
    assert summary["n_labelled"] == 4
    assert len(trained_on) == 2
    assert not held_out & trained_on
    assert {row["image"]: row["split"] for row in rows} == splits
    assert {row["label_rank"] for row in rows if row["used_for_training"] == "yes"} == {"1", "2"}
    assert all((row["label_rank"] == "") == (row["split"] != "train") for row in rows)


def test_the_encoder_starts_from_the_pretrained_weights_and_its_twin_does_not(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    frozen = finetune_config.model_copy(update={"pretrained_lr_scale": 1e-12, "weight_decay": 0.0})
    started = finetune(frozen, cohort_index, tmp_path / "started", encoder=encoder, store=store)
    twin = finetune(frozen, cohort_index, tmp_path / "twin", encoder=encoder, from_scratch=True, store=store)
    pretrained, begun, fresh = (
        load_encoder(run).state_dict()["levels.0.conv1.conv.weight"]
        for run in (encoder, tmp_path / "started", tmp_path / "twin")
    )
    assert torch.allclose(pretrained, begun, atol=1e-6)
    assert not torch.allclose(pretrained, fresh, atol=1e-3)
    assert (started["init"], twin["init"]) == ("pretrained", "scratch")
    provenance = load_model(tmp_path / "started")[1].provenance
    assert provenance.parent == file_sha256(encoder / "encoder" / "encoder.safetensors")


def test_what_came_pretrained_learns_at_its_own_rate_and_the_twin_at_the_full_one(
    finetune_config: FinetuneConfig,
) -> None:
    model = build_model(
        make_spec(
            {
                **finetune_config.model_dump(),
                "in_channels": 1,
                "out_channels": 2,
                "spatial_dims": 3,
                "input_shape": finetune_config.views.shape,
            }
        )
    )
    config = finetune_config.model_copy(update={"pretrained_lr_scale": 0.25, "warmup_steps": 0})
    parts = {"encoder": model.encoder, "decoder": model.decoder, "head": model.head}
    for pretrained in ([], ["encoder"], ["encoder", "decoder"]):
        module = FinetuneModule(model, config, [parts[name] for name in pretrained])
        (optimiser,), _ = module.configure_optimizers()
        rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
        for name, part in parts.items():
            expected = config.lr * (0.25 if name in pretrained else 1.0)
            assert {rates[id(p)] for p in part.parameters()} == {expected}, name
        assert len(rates) == len(list(model.parameters()))


def test_segmentation_starts_from_the_decoder_that_was_pretrained(
    pretrain_config: PretrainConfig, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    dense = {"objectives": [{"name": "dense_dim", "width": 8, "points": 20}], "decoder": {"name": "unet"}}
    pretrain(pretrain_config.model_copy(update=dense), cohort_index, tmp_path / "dense", store=store)
    pretrained = safetensors.torch.load_file(tmp_path / "dense" / "encoder" / "decoder.safetensors")
    frozen = finetune_config.model_copy(update={"pretrained_lr_scale": 1e-12, "weight_decay": 0.0, "max_steps": 1})
    for name, scratch in (("started", False), ("twin", True)):
        finetune(frozen, cohort_index, tmp_path / name, encoder=tmp_path / "dense", from_scratch=scratch, store=store)
        begun = safetensors.torch.load_file(tmp_path / name / WEIGHTS)
        held = {key: begun[f"decoder.{key}"] for key in pretrained}
        same = [torch.allclose(held[key], pretrained[key], atol=1e-6) for key in pretrained if "conv" in key]
        assert all(same) != scratch


def test_a_head_started_as_a_probe_knows_something_before_the_first_step(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    still = finetune_config.model_copy(update={"max_steps": 1, "lr": 1e-12, "weight_decay": 0.0})
    dice = {
        init: finetune(
            still.model_copy(update={"head_init": init}), cohort_index, tmp_path / init, encoder=encoder, store=store
        )["val"]["metrics"]["dice"]["value"]
        for init in ("random", "probe")
    }
    assert dice["probe"] > max(0.3, dice["random"])


def test_the_way_is_measured_at_the_steps_asked_for_and_changes_nothing(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    finetune(finetune_config, cohort_index, tmp_path / "plain", store=store)
    measured = finetune_config.model_copy(update={"eval_steps": (2, 6)})
    summary = finetune(measured, cohort_index, tmp_path / "measured", store=store)
    assert file_sha256(tmp_path / "plain" / WEIGHTS) == file_sha256(tmp_path / "measured" / WEIGHTS)
    with (tmp_path / "measured" / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "val/dice"]
    assert [int(row["step"]) for row in rows] == [2, 6]
    assert float(rows[-1]["val"]) == pytest.approx(summary["val"]["metrics"]["dice"]["value"])


def test_every_validation_case_is_written(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    summary = finetune(finetune_config, cohort_index, tmp_path / "run", store=store)
    rows = read_cases(tmp_path / "run" / "cases.parquet")
    assert len({row["image"] for row in rows}) == summary["val"]["n"]
    assert np.mean([row["dice"] for row in rows]) == pytest.approx(summary["val"]["metrics"]["dice"]["value"], abs=0.05)


def test_the_stored_split_given_back_as_labels_makes_the_same_run(
    finetune_config: FinetuneConfig, cohort_index: Index, volumes: Path, tmp_path: Path, store: Path
) -> None:
    one = finetune_config.model_copy(update={"max_steps": 1})
    options: dict[str, Any] = {"labelled": 4, "store": store}
    finetune(one, cohort_index, tmp_path / "a", split_seed=3, **options)
    again = build_index(volumes, "mri", labels=tmp_path / "a" / "split.csv")
    finetune(one, again, tmp_path / "b", split_seed=0, **options)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert (
        {r.image: r.split for r in again.records} == assign_splits(cohort_index, seed=3) != assign_splits(cohort_index)
    )
    assert file_sha256(tmp_path / "a" / WEIGHTS) == file_sha256(tmp_path / "b" / WEIGHTS)


def test_an_encoder_pretrained_on_the_same_index_has_not_seen_its_validation_split(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    one = finetune_config.model_copy(update={"max_steps": 1})
    summary = finetune(
        one, cohort_index, tmp_path / "run", encoder=encoder, labelled=4, fail_on_contamination=True, store=store
    )
    none = {"images": 0, "subjects": 0}
    assert summary["contamination"] == {"pretrain": none, "finetune": none}
    assert summary["train_val_duplicates"] == none
    seen = load_training_history(tmp_path / "run")
    assert seen
    assert [(o.kind, len(o.images), len(o.subjects)) for o in seen.training_sets] == [
        ("pretrain", 12, 6),
        ("finetune", 4, 2),
    ]


def test_validation_images_that_the_encoder_has_seen_are_counted_and_refused_when_strict(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    one = finetune_config.model_copy(update={"max_steps": 1})
    options: dict[str, Any] = {"encoder": encoder, "split_seed": 1, "store": store}
    summary = finetune(one, cohort_index, tmp_path / "run", **options)
    pretrained = {image for image, part in assign_splits(cohort_index).items() if part == "train"}
    shared = [row for row in rows_of(tmp_path / "run") if row["split"] == "val" and row["image"] in pretrained]
    expected = {"images": len(shared), "subjects": len({row["subject"] for row in shared})}
    assert summary["contamination"] == {"pretrain": expected, "finetune": {"images": 0, "subjects": 0}}
    assert shared
    with pytest.raises(
        UserError, match=f"seen in pretraining {len(shared)} images.* --fail-on-contamination allows none"
    ):
        finetune(one, cohort_index, tmp_path / "strict", fail_on_contamination=True, **options)
    assert not (tmp_path / "strict" / "config.yaml").exists()
    assert (
        finetune(one, cohort_index, tmp_path / "twin", from_scratch=True, fail_on_contamination=True, **options)["init"]
        == "scratch"
    )


def test_what_an_encoder_without_a_record_has_seen_is_not_known(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    one = finetune_config.model_copy(update={"max_steps": 1})
    (encoder / "encoder" / "fingerprints.json").unlink()
    summary = finetune(one, cohort_index, tmp_path / "run", encoder=encoder, labelled=4, store=store)
    seen = load_training_history(tmp_path / "run")
    assert summary["contamination"] is None
    assert seen
    assert (seen.unknown_kinds, [origin.kind for origin in seen.training_sets]) == (("pretrain",), ["finetune"])
    with pytest.raises(UserError, match=r"unknown: the weights have no fingerprints\.json"):
        finetune(one, cohort_index, tmp_path / "strict", encoder=encoder, fail_on_contamination=True, store=store)


def test_subjects_that_share_an_image_are_kept_on_one_side(
    finetune_config: FinetuneConfig, volumes: Path, cohort_index: Index, tmp_path: Path
) -> None:
    splits = assign_splits(cohort_index)
    one, other = (next(i for i, part in splits.items() if part == side) for side in ("train", "val"))
    source = shutil.copytree(volumes, tmp_path / "source")
    shutil.copyfile(source / f"{other}.nii.gz", source / f"{one}.nii.gz")
    index = build_index(source, "mri")
    cohort = open_cohort(index, index.records, finetune_config.preprocessing, split_seed=0, store=tmp_path / "store")
    moved = {r.image for r in cohort_index.records if r.subject == _subject(cohort_index, one)}
    assert cohort.splits == {image: "val" if image in moved else part for image, part in splits.items()}
    assert cohort.overlap == {"images": 0, "subjects": 0}
    table = tmp_path / "split.csv"
    table.write_text("image,split\n" + "\n".join(f"{image},{part}" for image, part in splits.items()))
    fixed = build_index(source, "mri", labels=table)
    options: dict[str, Any] = {"split_seed": 0, "store": tmp_path / "store"}
    assert open_cohort(fixed, fixed.records, finetune_config.preprocessing, **options).overlap == {
        "images": 1,
        "subjects": 1,
    }
    with pytest.raises(UserError, match=r"1 held-out images \(of 1 subjects\) have the same pixels"):
        open_cohort(fixed, fixed.records, finetune_config.preprocessing, fail_on_contamination=True, **options)


def _subject(index: Index, image: str) -> str:
    return next(record.subject for record in index.records if record.image == image)


def test_the_label_subset_has_a_seed_of_its_own(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    one = finetune_config.model_copy(update={"max_steps": 1})
    seen = {}
    for name, seeds in {"a": (0, 3), "b": (1, 3), "c": (0, 4)}.items():
        seed, subset_seed = seeds
        options = {"labelled": 4, "seed": seed, "subset_seed": subset_seed}
        finetune(one, cohort_index, tmp_path / name, store=store, **options)  # type: ignore[arg-type]
        seen[name] = (tmp_path / name / "split.csv").read_text()
    assert seen["a"] == seen["b"] != seen["c"]
    assert file_sha256(tmp_path / "a" / WEIGHTS) != file_sha256(tmp_path / "b" / WEIGHTS)


def test_both_arms_are_the_same_network_on_the_same_images_by_the_same_schedule(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    for name, from_scratch in (("a", False), ("b", True)):
        finetune(
            finetune_config,
            cohort_index,
            tmp_path / name,
            encoder=encoder,
            from_scratch=from_scratch,
            labelled=4,
            store=store,
        )
    a, b = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert {key: value.shape for key, value in a.items()} == {key: value.shape for key, value in b.items()}
    seen = [(tmp_path / name / "split.csv").read_text() for name in "ab"]
    assert seen[0] == seen[1]
    assert (tmp_path / "a" / "config.yaml").read_bytes() == (tmp_path / "b" / "config.yaml").read_bytes()


def test_the_same_fine_tuning_twice_gives_the_same_bytes(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    for name in "ab":
        finetune(finetune_config, cohort_index, tmp_path / name, labelled=4, store=store)
    assert file_sha256(tmp_path / "a" / WEIGHTS) == file_sha256(tmp_path / "b" / WEIGHTS)


@pytest.mark.parametrize("views", [{}, {"shape": [12, 12, 8], "foreground_share": 0.5}])
def test_a_resumed_fine_tuning_ends_in_the_same_bytes(
    views: dict[str, Any], finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    config = change_views(finetune_config, **views)
    finetune(config, cohort_index, tmp_path / "whole", store=store)
    finetune(config, cohort_index, tmp_path / "cut", store=store)
    (tmp_path / "cut" / "checkpoints" / "step-6.ckpt").unlink()
    (tmp_path / "cut" / WEIGHTS).unlink()
    summary = finetune(config, cohort_index, tmp_path / "cut", store=store, resume=True)
    assert summary["resumed_from_steps"] == [3]
    assert file_sha256(tmp_path / "whole" / WEIGHTS) == file_sha256(tmp_path / "cut" / WEIGHTS)


def change_views(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    """The configuration with other options of its views, validated."""
    content = config.model_dump()
    changed = check_config("finetune", {**content, "views": {**content["views"], **changes}}, source="the test")
    assert isinstance(changed, FinetuneConfig)
    return changed


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_crops_around_foreground_do_not_depend_on_the_first_step_or_the_loading_processes(
    workers: int, finetune_config: FinetuneConfig, cohort_index: Index, store: Path
) -> None:
    cohort = open_cohort(cohort_index, cohort_index.records, finetune_config.preprocessing, split_seed=0, store=store)
    small = {"shape": [8, 8, 8], "augmentations": []}
    config = change_views(finetune_config, **small, foreground_share=0.5)
    records = cohort.records("train")

    def batches(config: FinetuneConfig, start: int = 0) -> list[list[torch.Tensor]]:
        return list(build_finetune_loader(config, cohort, records, ["ball"], steps=12, seed=3, start=start))

    whole = batches(config)
    for start in (5,) if workers else (1, 11):
        tail = batches(config.model_copy(update={"workers": workers}), start)
        assert len(tail) == 12 - start
        for batch, expected in zip(tail, whole[start:], strict=True):
            assert all(torch.equal(*pair) for pair in zip(batch, expected, strict=True))
    uniform = batches(change_views(finetune_config, **small))
    is_equal = [
        torch.equal(a, b) for one, two in zip(whole, uniform, strict=True) for a, b in zip(one[1], two[1], strict=True)
    ]
    assert len(is_equal) == 24
    assert 4 < sum(is_equal) < 20


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_crops_around_foreground_are_refused_in_tasks_without_masks(
    task: str, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path
) -> None:
    said = f"views.foreground_share: expected 0 for task '{task}', which uses no masks, got 0.33"
    with pytest.raises(UsageError, match=said):
        resolve_finetune_config(task, "mri", None, None, ["views.foreground_share=0.33"])
    config = change_views(finetune_config, foreground_share=0.33)
    config = config.model_copy(update={"task": task, "head": {"name": task}, "decoder": None})
    with pytest.raises(UsageError, match=said):
        finetune(config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "preset", "share", "said"),
    [
        (
            "pretrain",
            "mri",
            "0.33",
            r"views\.foreground_share: expected 0 in pretraining, which uses no masks, got 0\.33",
        ),
        ("finetune", "mri-segmentation", "1.01", r"views\.foreground_share: expected a number of at most 1, got 1\.01"),
        (
            "finetune",
            "mri-segmentation",
            "-0.1",
            r"views\.foreground_share: expected a number of at least 0, got -0\.1",
        ),
        ("finetune", "mri-segmentation", "true", r"views\.foreground_share: expected a number, got true or false"),
        ("finetune", "mri-segmentation", ".nan", r"foreground_share: expected a finite number"),
    ],
)
def test_an_invalid_share_of_crops_around_foreground_is_refused(
    command: Any, preset: str, share: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        resolve_run_config(
            command, apply_overrides(read_config(command, preset), [f"views.foreground_share={share}"]), None, where="x"
        )


@pytest.mark.parametrize("changes", [{"labelled": 2}, {"seed": 1}, {"split_seed": 1}])
def test_a_run_is_not_resumed_on_other_images_or_seeds(
    changes: dict[str, int], finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    config = finetune_config.model_copy(update={"max_steps": 1})
    finetune(config, cohort_index, tmp_path / "run", store=store)
    with pytest.raises(UserError, match=f"needs the same inputs.*{next(iter(changes))}"):
        finetune(config, cohort_index, tmp_path / "run", store=store, resume=True, **changes)  # type: ignore[arg-type]


def test_classification_tells_bright_pictures_from_striped_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (48, 28, 28), dtype=np.uint8)
    labels = np.arange(48, dtype=np.uint8)[:, None] % 2
    images[1::2, :, ::4] += 150
    np.savez(
        tmp_path / "pictures.npz",
        train_images=images[:32],
        train_labels=labels[:32],
        val_images=images[32:],
        val_labels=labels[32:],
    )
    index = build_index(tmp_path / "pictures.npz", "xray")
    config = check_config(
        "finetune",
        {
            "task": "classification",
            "modality": "xray",
            "preprocessing": [{"op": "normalise", "method": "zscore"}],
            "views": {"shape": [28, 28]},
            "encoder": {"name": "convnet", "channels": [4, 8], "summary": "mean_max", "hidden": 0},
            "head": {"name": "classification", "maps": [1]},
            "max_steps": 60,
            "batch_size": 16,
            "lr": 0.01,
        },
        source="the test",
    )
    assert isinstance(config, FinetuneConfig)
    summary = finetune(config, index, tmp_path / "run", labelled=16, store=tmp_path / "store")
    assert summary["n_labelled"] == 16
    assert summary["val"]["metrics"]["auroc"]["value"] > 0.95


def test_segmentation_of_x_rays_works_with_the_strided_encoder_of_their_preset(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :32]
    table = ["image,mask,subject"]
    for number in range(16):
        y, x = rng.integers(8, 16), rng.integers(8, 24)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < 30
        image = rng.integers(0, 60, disc.shape) + 120 * disc
        for kind, pixels in (("image", image), ("mask", disc)):
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{kind}{number}.png")
        table.append(f"image{number}.png,mask{number}.png,s{number}")
    (tmp_path / "masks.csv").write_text("\n".join(table))
    index = build_index(tmp_path, "xray", labels=tmp_path / "masks.csv")
    assert len(index.records) == 16
    changes = ["encoder.channels=[8,16]", "checkpoint_every_steps=80", "batch_size=8", "workers=0"]
    content = apply_overrides(read_config("pretrain", "xray"), [*changes, "max_steps=1"])
    config = resolve_run_config("pretrain", content, index, where="xray")
    assert isinstance(config, PretrainConfig)
    pretrain(config, index, tmp_path / "encoder", store=tmp_path / "store")
    content = apply_overrides(read_config("finetune", "xray-segmentation"), [*changes, "max_steps=40", "lr=0.01"])
    config = resolve_run_config("finetune", content, index, where="xray-segmentation")
    assert isinstance(config, FinetuneConfig)
    options: dict[str, Any] = {"encoder": tmp_path / "encoder", "fit_ood_detector": False}
    summary = finetune(config, index, tmp_path / "run", store=tmp_path / "store", **options)
    assert summary["init"] == "pretrained"
    assert summary["val"] is not None
    assert summary["val"]["metrics"]["dice"]["value"] > 0.8


def test_a_task_without_labels_says_what_to_give(
    finetune_config: FinetuneConfig, volumes: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    source = nibabel.load(volumes / "imagesTr" / "case_00.nii.gz")
    nibabel.save(source, tmp_path / "images" / "alone.nii.gz")
    with pytest.raises(UserError, match=r"none of 1 images has a mask\. Use a Decathlon folder.*columns image,mask"):
        finetune(finetune_config, build_index(tmp_path / "images", "mri"), tmp_path / "run")


def test_labels_of_one_class_alone_are_refused_before_training(
    finetune_config: FinetuneConfig, volumes: Path, tmp_path: Path
) -> None:
    labels = "".join(f"case_{n:02d}.nii.gz,normal\n" for n in range(16))
    (tmp_path / "labels.csv").write_text("image,label\n" + labels)
    index = build_index(volumes, "mri", labels=tmp_path / "labels.csv")
    config = finetune_config.model_copy(update={"task": "classification", "head": {"name": "classification"}})
    with pytest.raises(UserError, match="2 or more classes, got 'normal' alone"):
        finetune(config, index, tmp_path / "run", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"encoder": {"name": "convnet", "channels": [4, 8], "padding": 0, "summary": "mean_max"}},
            r"^config .*: segmentation requires an encoder with maps of 8x12x8, 4x6x4 cells for these views, got",
        ),
        ({"head": {"name": "classification"}}, "do not work together"),
        ({"decoder": {"name": "une"}}, "Did you mean 'unet'"),
        ({"inference": {"mode": "slidin"}}, "Did you mean 'sliding'"),
        ({"views": ViewsConfig(shape=(16, 24, 15))}, r"views.shape \[16, 24, 15\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        finetune(finetune_config.model_copy(update=changes), cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labelled": 0}, UsageError, "--labelled: expected at least 1 image, got 0"),
        ({"label_fraction": 5.0}, UsageError, "--label-fraction: expected above 0 and up to 1, got 5.0"),
        ({"labelled": 4, "label_fraction": 0.5}, UsageError, "expected one of them, got both"),
        ({"accelerator": "tpu"}, UserError, "--device tpu: not available on this machine"),
        ({"accelerator": "abacus"}, UserError, "--device abacus: not available on this machine"),
        pytest.param(
            *({"accelerator": "gpu"}, UserError, "--device gpu: not available on this machine"),
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_invalid_options_are_rejected_before_images_are_read_or_files_are_written(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    finetune_config: FinetuneConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medim.data.loading.cohort.fill_store", lambda *_, **__: pytest.fail("an image was read"))
    with pytest.raises(error, match=message):
        finetune(finetune_config, cohort_index, tmp_path / "run", store=tmp_path / "store", **options)
    assert not list(tmp_path.iterdir())


def test_an_encoder_whose_maps_do_not_divide_the_view_is_refused_by_its_path(finetune_config: FinetuneConfig) -> None:
    encoder = {"name": "convnet", "channels": [4, 8], "padding": 0, "summary": "mean_max"}
    config = finetune_config.model_copy(update={"encoder": encoder})
    message = (
        r"^--encoder runs/enc: segmentation requires an encoder with maps of 8x12x8, 4x6x4 cells for these views, got "
        r"7x11x7, 2x4x2\. Pretrain an encoder whose convolutions are padded \(unet, convnet or resnet\)"
    )
    with pytest.raises(UsageError, match=message):
        dry_run_finetuning(config, Path("runs/enc"))


def test_a_loss_that_is_no_number_ends_the_run_with_advice(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    with pytest.raises(UserError, match=r"expected a finite loss, got nan.*lower lr"):
        finetune(finetune_config.model_copy(update={"lr": 1e30}), cohort_index, tmp_path / "run", store=store)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_encoder_of_another_modality_is_refused(encoder: Path) -> None:
    with pytest.raises(UserError, match="pretrained on mri"):
        resolve_finetune_config("classification", "xray", encoder, None)


def test_with_neither_encoder_nor_modality_the_message_asks_for_one() -> None:
    with pytest.raises(UsageError, match="--modality: mri or xray is required"):
        resolve_finetune_config("classification", None, None, None)


def test_without_a_name_the_pretraining_presets_twin_is_taken_with_the_encoders_network(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    config = pretrain_config.model_copy(update={"name": "mri-crop", "max_steps": 2})
    pretrain(config, cohort_index, tmp_path / "encoder", store=store)
    resolved = resolve_finetune_config("segmentation", None, tmp_path / "encoder", None, ["max_steps=7"])
    assert resolved.name == "mri-crop-segmentation"
    assert resolved.encoder == pretrain_config.encoder
    assert resolved.preprocessing == pretrain_config.preprocessing
    assert resolved.max_steps == 7


def test_a_field_of_view_that_the_twin_adds_to_the_encoders_preprocessing_stays_and_the_encoder_starts_it(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    crop = load_config("pretrain", "mri-crop")
    own = {"name": "mri-crop", "preprocessing": crop.preprocessing, "max_steps": 1}
    pretrain(pretrain_config.model_copy(update=own), cohort_index, tmp_path / "encoder", store=store)
    resolved = resolve_finetune_config(
        "classification", None, tmp_path / "encoder", None, ["max_steps=1", "batch_size=2"]
    )
    assert resolved.name == "mri-crop-classification"
    assert [step["op"] for step in resolved.preprocessing if step not in crop.preprocessing] == ["centre"]
    labelled = replace(
        cohort_index, records=tuple(replace(r, label="ab"[n % 2]) for n, r in enumerate(cohort_index.records))
    )
    summary = finetune(resolved, labelled, tmp_path / "run", encoder=tmp_path / "encoder", store=store)
    assert summary["init"] == "pretrained"
    other = resolve_finetune_config(
        "classification", None, tmp_path / "encoder", "mri-classification", index=cohort_index
    )
    assert other.preprocessing == crop.preprocessing


def test_what_a_twin_leaves_open_comes_from_the_encoder_and_for_classification_from_the_images(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, store: Path
) -> None:
    config = pretrain_config.model_copy(update={"name": "mri", "max_steps": 2})
    pretrain(config, cohort_index, tmp_path / "encoder", store=store)
    segmenter, classifier = (
        resolve_finetune_config(task, None, tmp_path / "encoder", None, index=cohort_index)
        for task in ("segmentation", "classification")
    )
    assert segmenter.encoder == classifier.encoder == pretrain_config.encoder
    assert segmenter.views.shape == pretrain_config.views.shape == tuple(segmenter.inference["roi"])
    assert classifier.views.shape == (16, 24, 16)  # the whole image, at the encoder's spacing and stride
    assert classifier.inference == {"mode": "whole", "multiple_of": 4}


def test_options_by_name_replace_those_of_the_object_and_a_misspelt_one_is_refused(
    finetune_config: FinetuneConfig, tmp_path: Path
) -> None:
    options = FinetuneOptions(seed=2, encoder=tmp_path / "run", from_scratch=True)
    assert (options.label_seed, options.initial_weights) == (2, None)
    assert FinetuneOptions(subset_seed=5, encoder=tmp_path).label_seed == 5
    with pytest.raises(TypeError, match="sede"):
        finetune(finetune_config, Index(root=Path(), modality="mri", records=()), tmp_path / "out", options, sede=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_labels_that_selected_the_encoders_step_are_counted_in_all_later_results(
    encoder: Path, finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path, caplog: Any
) -> None:
    by_probe = tmp_path / "by-probe"
    shutil.copytree(encoder, by_probe)
    spec_file = by_probe / "encoder" / "encoder.json"
    content = json.loads(spec_file.read_text())
    spec_file.write_text(json.dumps(content | {"checkpoint_selection": {"step": 1, "n_labels": 60}}))
    for parent, count in ((by_probe, 60), (encoder, 0)):
        run, answers = tmp_path / f"run-{count}", tmp_path / f"evaluation-{count}"
        caplog.clear()
        summary = finetune(finetune_config, cohort_index, run, encoder=parent, store=store)
        assert summary["n_selection_labels"] == count
        assert ("labels of training subjects selected" in caplog.text) == bool(count)
        assert evaluate(run, cohort_index, answers)["n_selection_labels"] == count
        for folder in (run, answers):
            row = f"Labels that selected the encoder&#39;s step</dt><dd>{count}<"
            assert row in write_report_page(folder).read_text()
    again = finetune(finetune_config, cohort_index, tmp_path / "again", encoder=tmp_path / "run-60", store=store)
    assert again["n_selection_labels"] == 60
    twin = finetune(finetune_config, cohort_index, tmp_path / "twin", encoder=by_probe, from_scratch=True, store=store)
    assert twin["n_selection_labels"] == 0


def test_an_inference_that_cannot_run_shows_before_images_are_read(
    finetune_config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr("medim.training.finetune.config.run_inference", refuse)
    with pytest.raises(UsageError, match="planted"):
        dry_run_finetuning(finetune_config)


def test_a_model_that_cannot_be_written_ends_the_run_before_its_first_step(
    finetune_config: FinetuneConfig, cohort_index: Index, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Some tensors share memory")

    monkeypatch.setattr("medim.models.serialization.safetensors.torch.save", refuse)
    monkeypatch.setattr("medim.training.finetune.run.run_trainer", lambda *_, **__: pytest.fail("a step was made"))
    with pytest.raises(UserError, match="the weights of this model cannot be written"):
        finetune(finetune_config, cohort_index, tmp_path / "run", store=store)


def test_a_failure_of_the_tracking_after_the_last_step_loses_nothing(
    finetune_config: FinetuneConfig,
    cohort_index: Index,
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("medim.training.finetune.run.log_results", refuse)
    finetune(finetune_config, cohort_index, tmp_path / "run", store=store)
    assert "records of the results for MLflow: not written (KeyError: 'planted')" in caplog.text
    assert (tmp_path / "run" / "summary.json").is_file()
