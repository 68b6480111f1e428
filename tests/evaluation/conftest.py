from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medim.data.contamination import TrainingHistory
from medim.data.index.index import Index, build_index
from medim.models.model import build_model
from medim.models.serialization import save_model
from medim.types import Array
from tests.specs import make_spec

AFFINE = np.diag([-2.0, 1.0, 0.5, 1.0])  # left-handed: the reader turns the first axis
SUBJECTS = [f"P{i // 2}" for i in range(8)]  # eight images of four people


def _image(number: int) -> Array:
    """(12, 10, 8) labels: a box of class 1 beside one of class 2, of a size that differs from image to image."""
    truth = np.zeros((12, 10, 8), np.uint8)
    truth[2:5, 2 : 6 + number % 3, 2:6] = 1
    truth[6:10, 2 : 6 + number % 3, 2:6] = 2
    return truth


def make_masks(source: Path) -> Path:
    """Eight MRI volumes of four subjects with masks, whose voxels are 100 times the label; class labels beside."""
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
    listed, owners, labels = [], ["image,subject"], ["image,label"]
    for number, subject in enumerate(SUBJECTS):
        truth, name = _image(number), f"case{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(100 * truth.astype(np.int16), AFFINE), source / "imagesTr" / name)  # type: ignore[no-untyped-call, attr-defined]
        nibabel.save(nibabel.Nifti1Image(truth, AFFINE), source / "labelsTr" / name)  # type: ignore[no-untyped-call, attr-defined]
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        owners.append(f"case{number},{subject}")
        labels.append(f"case{number},{'big' if number % 3 else 'small'}")
    content = {"labels": {"0": "background", "1": "front", "2": "back"}, "training": listed, "test": []}
    (source / "dataset.json").write_text(json.dumps({"name": "boxes", "modality": {"0": "MRI"}, **content}))
    (source / "subjects.csv").write_text("\n".join(owners) + "\n")
    (source / "labels.csv").write_text("\n".join(labels) + "\n")
    return source


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    return make_masks(tmp_path / "source")


@pytest.fixture
def index(masks: Path) -> Index:
    return build_index(masks, "mri")


@pytest.fixture(scope="session")
def segmenter() -> dict[str, Any]:
    """Spec of a network for `masks`."""
    return {
        "kind": "segmenter",
        "modality": "mri",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "input_shape": [8, 8, 8],
        "encoder": {"name": "unet", "channels": [4, 8]},
        "decoder": {"name": "unet"},
        "head": {"name": "segmentation"},
        "preprocessing": [],
        "inference": {"mode": "whole", "multiple_of": 2},
        "classes": ["front", "back"],
        "provenance": {"parent": None, "index_hash": "", "seed": 0},
    }


@pytest.fixture(scope="session")
def classifier(segmenter: dict[str, Any]) -> dict[str, Any]:
    """Spec of a network for `masks` and their labels."""
    section = {"kind": "classifier", "out_channels": 2, "decoder": None, "head": {"name": "classification"}}
    return {**segmenter, **section, "classes": ["big", "small"], "inference": {"mode": "whole"}}


def make_run(folder: Path, spec: dict[str, Any], seen: TrainingHistory | None = None) -> Path:
    """A fine-tuning run with fresh weights."""
    torch.manual_seed(0)
    save_model(folder / "model", "model", build_model(make_spec(spec)), make_spec(spec))
    if seen is not None:
        seen.write(folder / "model")
    return folder
