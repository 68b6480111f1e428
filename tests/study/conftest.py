"""Sixty tiny pictures, each of a subject of its own, in two classes, and encoders of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medim.config import FinetuneConfig, PretrainConfig, check_config
from medim.data.index.index import Index, build_index
from medim.evaluation.probing.label_budget import Budget
from medim.study.design import Arm, read_arms
from medim.study.prepare import StudyOptions
from medim.study.run import study
from medim.training.pretrain.run import pretrain

SHAPE = (8, 8)
SUBJECTS = 60
ENCODER = {"name": "convnet", "channels": [4, 8], "kernel_size": 3, "summary_channels": 8}
COMMON = {
    "modality": "xray",
    "preprocessing": [{"op": "normalise", "method": "zscore"}],
    "encoder": ENCODER,
    "batch_size": 4,
    "lr": 0.01,
    "checkpoint_every_steps": 2,
}
BUDGETS = (Budget(labelled=4), Budget(labelled=12))


def make_pictures(folder: Path, subjects: int = SUBJECTS) -> Path:
    """A picture a subject, bright above or below the middle by its class; `labels.csv` beside."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    labels = ["image,label"]
    for n in range(subjects):
        picture = rng.normal(100, 20, SHAPE)
        picture[:4] += 60 * (n % 2)
        name = f"picture{n:02d}.png"
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / name)
        labels.append(f"{name},{'up' if n % 2 else 'down'}")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def index(pictures: Path) -> Index:
    return build_index(pictures, "xray", labels=pictures / "labels.csv")


@pytest.fixture(scope="session")
def schedule() -> FinetuneConfig:
    own = {"task": "classification", "head": {"name": "classification"}, "max_steps": 4, "eval_steps": [2]}
    config = check_config("finetune", {**COMMON, **own, "views": {"shape": list(SHAPE)}}, source="the test")
    assert isinstance(config, FinetuneConfig)
    return config


@pytest.fixture(scope="session")
def encoders(index: Index, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pretraining runs."""
    objectives = [{"name": "local_dim", "estimator": "infonce", "critic": {"name": "encode_and_dot", "width": 8}}]
    own = {"objectives": objectives, "max_steps": 2, "views": {"shape": list(SHAPE)}}
    config = check_config("pretrain", {**COMMON, **own}, source="the test")
    assert isinstance(config, PretrainConfig)
    runs = [tmp_path_factory.mktemp("encoders") / str(seed) for seed in range(2)]
    for seed, run in enumerate(runs):
        pretrain(config, index, run, seed=seed, store=runs[0].parent / "store")
    return runs


@pytest.fixture
def arms(encoders: list[Path]) -> tuple[Arm, ...]:
    return read_arms([f"dim={encoders[0]},{encoders[1]}"])


@pytest.fixture
def run_study(
    schedule: FinetuneConfig, index: Index, arms: tuple[Arm, ...], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """The study of these tests, with other options where they are given."""

    def run(out: Path | None = None, **options: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"task": "classification", "config": schedule, "index": index, "arms": arms}
        given |= {"budgets": BUDGETS, "out": out or tmp_path / "study"}
        own: dict[str, Any] = {"seeds": 2, "lr_multipliers": (), "accelerator": "cpu", "store": tmp_path / "store"}
        for name, value in options.items():
            (given if name in given else own)[name] = value
        return study(**given, options=StudyOptions(**own))

    return run


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Twenty-five volumes, each of a subject of its own, with a bright cube that is to be segmented."""
    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    pairs = []
    for n in range(25):
        cube = np.zeros((8, 8, 8), np.uint8)
        cube[tuple(slice(at, at + 3) for at in rng.integers(0, 5, 3))] = 1
        for part, array in (("imagesTr", rng.normal(100, 10, cube.shape) + 80 * cube), ("labelsTr", cube)):
            (folder / part).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(array.astype(np.float32 if part == "imagesTr" else np.uint8), np.eye(4))  # type: ignore[no-untyped-call, attr-defined]
            nibabel.save(image, folder / part / f"v{n:02d}.nii.gz")  # type: ignore[attr-defined]
        pairs.append({"image": f"./imagesTr/v{n:02d}.nii.gz", "label": f"./labelsTr/v{n:02d}.nii.gz"})
    labels = {"0": "background", "1": "cube"}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "MRI"}, "training": pairs}))
    return build_index(folder, "mri")
