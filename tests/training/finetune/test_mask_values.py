"""Fine-tuning on masks with gaps in their values, an `ignore` label, a named class that never occurs, and regions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medim.config import FinetuneConfig
from medim.data.index.index import build_index
from medim.evaluation.cases import read_cases
from medim.evaluation.evaluate import open_network
from medim.model_spec import read_spec
from medim.predict.predict import predict
from medim.training.finetune.run import finetune
from medim.types import UserError

SHAPE = (16, 16, 16)
LABELS = {"background": 0, "shell": 1, "absent": 2, "core": 4, "ignore": 9}


def make_source(folder: Path, labels: dict[str, Any]) -> Path:
    """Eight volumes; the voxels of shell and core are brighter, and those of `ignore` as bright as the core."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(8):
        mask = np.zeros(SHAPE, np.uint8)
        mask[3:11, 3:11, 4:12] = 1
        mask[5:9, 5:9, 6:10] = 4
        mask[13:] = 9
        image = rng.normal(100, 5, SHAPE) + 60 * (mask == 1) + 150 * (mask > 1)
        for part, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / part / f"case{number}.nii.gz")
        pairs.append({"image": f"imagesTr/case{number}.nii.gz", "label": f"labelsTr/case{number}.nii.gz"})
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    return folder


@pytest.mark.slow
def test_values_are_classes_and_come_back_and_what_nobody_labelled_counts_nowhere(
    finetune_config: FinetuneConfig, tmp_path: Path
) -> None:
    index = build_index(make_source(tmp_path / "source", LABELS), "mri")
    update = {
        "max_steps": 25,
        "head": {"name": "segmentation", "class_weights": "balanced"},
        "batch_size": 4,
        "lr": 0.02,
    }
    config = finetune_config.model_copy(update=update)
    summary = finetune(config, index, tmp_path / "run", store=tmp_path / "store")
    assert {name: sum(count.values()) for name, count in summary["class_images"].items()} == {
        "shell": 8, "absent": 0, "core": 8
    }  # fmt: skip
    assert summary["val"] is not None
    metrics = summary["val"]["metrics"]
    assert summary["val"]["metric_rule"] == 2
    assert metrics["dice_absent"]["value"] is metrics["hd95_absent"]["value"] is None
    values = [metrics[f"dice_{name}"]["value"] for name in ("shell", "core")]
    assert None not in values
    assert metrics["dice"]["value"] == pytest.approx(np.mean(values))
    rows = read_cases(tmp_path / "run" / "cases.parquet")
    assert {row["class"] for row in rows if row["dice"] is None} == {"absent"}
    spec = read_spec(tmp_path / "run" / "model" / "model.json")
    assert (spec.classes, spec.class_values) == (("shell", "absent", "core"), (1, 2, 4))

    network = open_network(tmp_path / "run")[0]
    row = predict(network, tmp_path / "source" / "imagesTr" / "case0.nii.gz", tmp_path / "out")[0]
    answer = np.asarray(nibabel.load(tmp_path / "out" / str(row["file"])).dataobj)
    assert set(np.unique(answer)) <= {0, 1, 2, 4}
    assert (answer[5:9, 5:9, 6:10] == 4).mean() > 0.5  # the core has its own value again, not its number 3


def test_regions_are_refused_by_name_before_training(finetune_config: FinetuneConfig, tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 4, 9], "core": [4, 9], "bright": 9}
    index = build_index(make_source(tmp_path / "source", labels), "mri")
    with pytest.raises(UserError, match=r"regions 'whole', 'core' .* Name each value in \"labels\""):
        finetune(finetune_config, index, tmp_path / "run", store=tmp_path / "store")
    assert not (tmp_path / "run" / "summary.json").exists()
