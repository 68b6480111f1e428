"""Sixteen small MRI-like volumes of eight subjects with masks, and the smallest configurations that train on them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medim.config import FinetuneConfig, PretrainConfig, check_config
from medim.data.index.index import Index, build_index

SHAPE = (16, 24, 16)
PREPROCESSING = [{"op": "ras"}, {"op": "normalise", "method": "zscore"}]
ENCODER = {"name": "unet", "channels": [4, 8, 8], "summary_channels": 8}
CRITIC = {"name": "encode_and_dot", "width": 8, "local_norm": "none", "summary_norm": "none", "scale_scores": True}


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    pairs, subjects = [], ["image,subject"]
    for n in range(16):
        centre = np.array([8, 12, 8]) + rng.integers(-2, 3, 3)
        ball = np.linalg.norm(grid - centre[:, None, None, None], axis=0) < 4
        image = (rng.normal(100, 10, SHAPE) + 80 * ball).astype(np.float32)
        name = f"case_{n:02d}.nii.gz"
        for part, array in (("imagesTr", image), ("labelsTr", ball.astype(np.uint8))):
            (folder / part).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / part / name)
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        subjects.append(f"{name},subject-{n // 2}")
    (folder / "subjects.csv").write_text("\n".join(subjects) + "\n")
    labels = {"0": "background", "1": "ball"}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "MRI"}, "training": pairs}))
    return folder


@pytest.fixture(scope="session")
def cohort_index(volumes: Path) -> Index:
    return build_index(volumes, "mri")


@pytest.fixture(scope="session")
def pretrain_config() -> PretrainConfig:
    config = check_config(
        "pretrain",
        {
            "modality": "mri",
            "preprocessing": PREPROCESSING,
            "views": {"shape": [16, 16, 16], "augmentations": [{"op": "noise", "probability": 0.5}]},
            "encoder": ENCODER,
            "objectives": [
                {
                    "name": "local_dim",
                    "estimator": "infonce",
                    "critic": CRITIC,
                    "batch_norm_summary": True,
                    "occlusion": 5,
                },
                {"name": "coordinates", "weight": 0.1, "hidden": 8, "points": 16},
                {"name": "prior_matching", "weight": 0.1, "hidden": [8]},
            ],
            "max_steps": 6,
            "batch_size": 4,
            "lr": 0.001,
            "checkpoint_every_steps": 2,
        },
        source="the test",
    )
    assert isinstance(config, PretrainConfig)
    return config


@pytest.fixture
def finetune_config() -> FinetuneConfig:
    config = check_config(
        "finetune",
        {
            "task": "segmentation",
            "modality": "mri",
            "preprocessing": PREPROCESSING,
            "views": {"shape": [16, 24, 16], "augmentations": [{"op": "flip"}]},
            "encoder": ENCODER,
            "decoder": {"name": "unet"},
            "head": {"name": "segmentation"},
            "inference": {"mode": "whole", "multiple_of": 4},
            "max_steps": 6,
            "batch_size": 2,
            "lr": 0.01,
            "checkpoint_every_steps": 3,
        },
        source="the test",
    )
    assert isinstance(config, FinetuneConfig)
    return config
