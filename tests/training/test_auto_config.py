"""Sizes that follow the images: the rules in numbers, and every shipped preset on every kind of image."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from medim.cli import app
from medim.config import (
    CONFIG_CLASSES,
    Command,
    FinetuneConfig,
    PretrainConfig,
    apply_overrides,
    auto_keys,
    check_config,
    list_presets,
    read_config,
)
from medim.data.index.index import Index
from medim.training.auto_config import VIEW_VOXELS, WHOLE_VOXELS, describe_input, median_size, resolve_auto
from medim.training.finetune.config import dry_run_finetuning
from medim.training.pretrain.config import dry_run_pretraining, resolve_pretrain_config
from medim.types import UsageError

THICK = ((512, 512, 24), (0.45, 0.45, 5.0))
HEAD = ((256, 256, 176), (1.0, 1.0, 1.0))
SMALL = ((35, 50, 36), (1.0, 1.0, 1.0))
STRIPPED = ((160, 192, 160), (1.0, 1.0, 1.0))
FEW_SLICES = ((320, 320, 10), (0.7, 0.7, 6.0))
MIXED = ((384, 300, 100), (0.725, 0.9, 1.7))
PORTRAIT = ((2500, 2048), (0.15, 0.15))
LANDSCAPE = ((2048, 2500), (0.143, 0.143))
SQUARE = ((1024, 1024), (1.0, 1.0))
TINY = ((28, 28), (1.0, 1.0))
NARROW = ((300, 90), (0.2, 0.2))
IMAGES = {
    "mri": [THICK, HEAD, SMALL, STRIPPED, FEW_SLICES, MIXED],
    "xray": [PORTRAIT, LANDSCAPE, SQUARE, TINY, NARROW],
}
SHIPPED: list[tuple[Command, str]] = [(command, name) for command in CONFIG_CLASSES for name in list_presets(command)]
OPEN = [(command, name) for command, name in SHIPPED if auto_keys(read_config(command, name))]
EVERY = [
    pytest.param(command, name, size, id=f"{name}-{'x'.join(map(str, size[0]))}")
    for command, name in OPEN
    for size in IMAGES[read_config(command, name)["modality"]]
]


def filled(name: str, size: Any, *assignments: str) -> dict[str, Any]:
    """A preset's views, levels, steps and stride for a median image."""
    command: Command = "pretrain" if name in list_presets("pretrain") else "finetune"
    content = resolve_auto(apply_overrides(read_config(command, name), assignments), *size)
    steps = {step["op"]: step for step in content["preprocessing"]}
    return {
        "views": content["views"]["shape"],
        "levels": len(content["encoder"]["channels"]),
        "channels": content["encoder"]["channels"],
        "spacing": steps.get("resample", {}).get("spacing"),
        "resized": steps.get("resize", {}).get("shape"),
        "inference": content.get("inference"),
    }


def index_of(cohort_index: Index, sizes: list[Any]) -> Index:
    """An index of images of these sizes."""
    record = cohort_index.records[0]
    records = [dataclasses.replace(record, shape=shape, spacing=spacing) for shape, spacing in sizes]
    return dataclasses.replace(cohort_index, records=tuple(records))


@pytest.mark.parametrize(("command", "name", "size"), EVERY)
def test_every_shipped_preset_becomes_a_run_that_can_be_built(
    command: Command, name: str, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = resolve_auto(read_config(command, name), *size)
    config = check_config(command, content, source=name)
    assert isinstance(config, PretrainConfig | FinetuneConfig)
    if isinstance(config, FinetuneConfig) and config.task == "segmentation":  # its loss looks at values
        dry_run_finetuning(config.model_copy(update={"batch_size": 1}))
        return
    monkeypatch.setattr("medim.training.pretrain.config.dry_run_losses", lambda *_: None)  # they look at values, too
    monkeypatch.setattr("medim.training.finetune.config.run_inference", lambda *_: None)
    with torch.device("meta"):  # shapes are followed, nothing is computed
        dry_run_pretraining(config) if isinstance(config, PretrainConfig) else dry_run_finetuning(config)


@pytest.mark.parametrize(("command", "name", "size"), EVERY)
def test_views_are_whole_strides_within_their_budget(command: Command, name: str, size: Any) -> None:
    found = filled(name, size)
    stride = 2 ** (found["levels"] - (0 if name.startswith("xray") else 1))
    assert all(side % stride == 0 for side in found["views"])
    assert math.prod(found["views"]) <= (
        WHOLE_VOXELS if name.endswith(("classification", "regression")) else VIEW_VOXELS
    )
    assert 3 <= found["levels"] <= 6
    assert found["levels"] == 3 or min(found["views"]) // stride >= 6


@pytest.mark.parametrize(("command", "name"), [pair for pair in SHIPPED if pair not in OPEN])
def test_a_preset_for_a_set_of_one_size_keeps_its_numbers(command: Command, name: str) -> None:
    content = read_config(command, name)
    assert resolve_auto(content, *IMAGES[content["modality"]][0]) == content


# --- the rules in numbers


@pytest.mark.parametrize(
    ("size", "spacing", "views", "levels"),
    [
        (((256, 256, 256), (1.0, 1.0, 1.0)), [1.6, 1.6, 1.6], [64, 64, 64], 4),
        (HEAD, [1.4, 1.4, 1.4], [64, 64, 64], 4),
        (STRIPPED, [1.1, 1.1, 1.1], [64, 64, 64], 4),
        (SMALL, [1.0, 1.0, 1.0], [36, 52, 36], 3),
        (THICK, [0.52, 0.52, 5.7], [104, 104, 24], 3),
        (((256, 256, 40), (0.8984, 0.8984, 4.0)), [0.898, 0.898, 4.0], [80, 80, 40], 3),
    ],
)
def test_an_mri_preset_follows_the_median_image(size: Any, spacing: list[float], views: list[int], levels: int) -> None:
    found = filled("mri", size)
    assert found["spacing"] == pytest.approx(spacing)
    assert found["views"] == views
    assert found["channels"] == [16, 32, 64, 128][:levels]


@pytest.mark.parametrize(
    ("size", "shape", "channels"),
    [
        (SQUARE, [224, 224], [32, 64, 128, 256, 256]),
        (PORTRAIT, [224, 192], [32, 64, 128, 256, 256]),
        (((512, 512), (0.1, 0.2)), [112, 224], [32, 64, 128, 256]),
        (((128, 128), (1.0, 1.0)), [128, 128], [32, 64, 128, 256]),
        (TINY, [32, 32], [32, 64, 128]),
    ],
)
def test_an_xray_preset_keeps_the_aspect_of_the_median_image(size: Any, shape: list[int], channels: list[int]) -> None:
    found = filled("xray", size)
    assert found["resized"] == found["views"] == shape
    assert found["channels"] == channels


def test_what_the_user_gives_is_kept_and_the_rest_fits_it() -> None:
    given = filled("mri", HEAD, "views.shape=[96,96,96]")
    assert given["views"] == [96, 96, 96]
    assert given["levels"] == 5  # 96 / 16 leaves 6 cells
    assert given["spacing"] == [1.0, 1.0, 1.0]  # 16 such views hold the whole image
    given = filled("mri", STRIPPED, "encoder.channels=[4,4,4,4,4]")
    assert given["channels"] == [4, 4, 4, 4, 4]
    assert all(side % 16 == 0 for side in given["views"])
    assert filled("mri", HEAD, "preprocessing.2.spacing=[3,3,3]")["spacing"] == [3, 3, 3]
    assert filled("xray", SQUARE, "views.shape=[96,64]")["resized"] == [96, 64]
    assert filled("xray", SQUARE, "preprocessing.0.shape=[96,64]")["views"] == [96, 64]
    assert filled("mri", HEAD, "views.shape=[50,50,50]")["levels"] == 3  # no deeper stride divides it


def test_the_classifier_sees_the_whole_image_and_the_segmenter_windows_of_its_views() -> None:
    classifier = filled("mri-classification", ((100, 120, 90), (1.5, 1.5, 1.5)))
    assert classifier["views"] == [112, 128, 96]
    assert classifier["inference"] == {"mode": "whole", "multiple_of": 16}
    segmenter = filled("mri-segmentation", HEAD)
    assert segmenter["inference"]["roi"] == segmenter["views"] == [64, 64, 64]


def test_one_large_image_among_many_does_not_move_the_median(cohort_index: Index) -> None:
    index = index_of(cohort_index, [SMALL, SMALL, ((512, 512, 300), (0.5, 0.5, 0.7))])
    assert median_size(index) == SMALL


def test_an_auto_without_a_rule_is_refused_by_name() -> None:
    for key in ("max_steps", "encoder.norm", "views.augmentations.0.axis", "objectives.0.critic.width"):
        with pytest.raises(UsageError, match="auto"):
            resolve_pretrain_config("mri", [f"{key}=auto"])


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("views=3", "views"),
        ("views.shape=[8,x]", r"views\.shape"),
        ("encoder=unet", "encoder"),
        ("encoder.norn=in", "Did you mean 'norm'"),
        ("encoder={name: unet, channels: [6, 10, 14], norm: gn}", "encoder 'unet': the options are inconsistent"),
        ("preprocessing=7", "preprocessing"),
        ("preprocessing.2={op: resmaple}", "Did you mean 'resample'"),
        ("modality=[mri]", "modality"),
    ],
)
def test_a_mistake_beside_an_auto_is_what_the_message_speaks_of(assignment: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve_pretrain_config("mri", [assignment])


# --- runs


def test_resolving_logs_and_describes_what_follows_from_the_images(
    cohort_index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medim")
    index = index_of(cohort_index, [HEAD, HEAD])
    config = resolve_pretrain_config("mri", index=index)
    assert "input 64x64x64 at 1.4x1.4x1.4 mm, 4 levels, from the median image 256x256x176 at 1x1x1 mm" in caplog.text
    assert describe_input(config, index)["median image"] == "256x256x176 at 1x1x1 mm"
    caplog.clear()
    resolve_pretrain_config("mri-crop", index=index)
    assert not caplog.text


def test_the_same_images_give_the_same_hash_and_others_another(cohort_index: Index) -> None:
    hashes = [
        resolve_pretrain_config("mri", index=index_of(cohort_index, sizes)).hash
        for sizes in ([HEAD, SMALL, HEAD], [SMALL, HEAD, HEAD], [SMALL])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_misspelt_key_is_told_before_an_image_is_read(tmp_path: Any) -> None:
    options = ["--modality", "mri", "--data", str(tmp_path / "nothing-here"), "--set", "views.shpae=[8,8,8]"]
    ran = CliRunner().invoke(app, ["pretrain", *options])
    assert ran.exit_code == 2
    assert "Did you mean 'shape'" in ran.output
