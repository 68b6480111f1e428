from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors.torch
import torch

from medim.config import FinetuneConfig, PretrainConfig, check_config
from medim.data.index.index import Index
from medim.evaluation.probing.label_budget import Budget
from medim.files import read_json
from medim.study.design import read_arms
from medim.study.results import open_results
from medim.training.pretrain.run import pretrain

COMMON = {
    "modality": "mri",
    "preprocessing": [{"op": "ras"}, {"op": "normalise", "method": "zscore"}],
    "views": {"shape": [8, 8, 8]},
    "encoder": {"name": "unet", "channels": [2, 4], "summary_channels": 4, "norm": "bn"},
    "decoder": {"name": "unet"},
    "batch_size": 2,
    "lr": 0.01,
    "max_steps": 3,
}


def test_a_frozen_segmenter_keeps_encoder_and_decoder_bit_by_bit_and_learns_a_head(
    run_study: Callable[..., dict[str, Any]], volumes: Index, tmp_path: Path
) -> None:
    before = check_config(
        "pretrain", {**COMMON, "objectives": [{"name": "reconstruction", "mask_patch_size": 4}]}, source="the test"
    )
    config = check_config(
        "finetune",
        {**COMMON, "task": "segmentation", "head": {"name": "segmentation"}, "head_init": "probe", "eval_steps": [1]},
        source="the test",
    )
    assert isinstance(before, PretrainConfig)
    assert isinstance(config, FinetuneConfig)
    encoder = tmp_path / "encoder"
    pretrain(before, volumes, encoder, store=tmp_path / "store")
    given: dict[str, Any] = {"task": "segmentation", "config": config, "index": volumes, "seeds": 1}
    arms = read_arms([f"tuned={encoder}"], [f"frozen={encoder}"])
    summary = run_study(arms=arms, budgets=(Budget(labelled=2), Budget(labelled=4)), **given)
    trained = {
        name: safetensors.torch.load_file(
            tmp_path / "study" / "cells" / name / "4" / "0-0" / "model" / "model.safetensors"
        )
        for name in ("tuned", "frozen")
    }
    for part in ("encoder", "decoder"):
        came = safetensors.torch.load_file(encoder / "encoder" / f"{part}.safetensors")
        assert all(torch.equal(came[key], trained["frozen"][f"{part}.{key}"]) for key in came)
        assert not all(torch.equal(came[key], trained["tuned"][f"{part}.{key}"]) for key in came)
    rows = pq.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    assert {r["metric"] for r in rows} == {"dice", "dice_cube", "hd95_cube", "surface_dice_cube"}
    assert {(r["arm"], r["protocol"]) for r in rows} == {
        ("scratch", "finetune"),
        ("tuned", "finetune"),
        ("frozen", "frozen"),
    }
    results = open_results(tmp_path / "study")
    assert (results.metrics[0], results.classes, len(results.cases)) == ("dice", ("cube",), 5)
    assert results.steps("tuned", "2") == [1]
    told = {(row["arm"], row["budget"]): row for row in summary["comparisons"]["rows"]}
    assert set(told) == {(name, budget) for name in ("tuned", "frozen") for budget in ("2", "4")}
    assert all(row["labels_saved"] and row["time_to_scratch"] for row in told.values())
    worst = read_json(tmp_path / "study" / "worst.json")["tiles"]
    assert len(worst) == 4
    assert all(tile["source"] and "contours of label (above) and prediction (below)" in tile["alt"] for tile in worst)
