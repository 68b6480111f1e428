"""A study's folder by hand, of arms whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medim.evaluation.cases import write_parquet
from medim.files import write_json, write_text
from medim.study.comparisons import build_comparisons
from medim.study.results_table import SCHEMA

BUDGETS = {"5": (5, 0.60), "20": (20, 0.70), "80": (80, 0.80)}  # labels, and what from scratch reaches
SUBJECTS = 12
CONFIG = """\
modality: mri
encoder: {name: unet}
decoder: {name: unet}
head: {name: segmentation}
views: {shape: [8, 8, 8]}
preprocessing: [{op: ras}, {op: normalise, method: zscore}]
max_steps: 40
batch_size: 2
lr: 0.001
optimiser: adamw
schedule: cosine
lr_milestones: []
warmup_steps: 4
weight_decay: 0.01
"""


def write_study(
    folder: Path,
    effect: float,
    *,
    name: str = "cube",
    budgets: tuple[str, ...] = ("5", "20", "80"),
    anchor: float | None = None,
) -> Path:
    """A segmentation study of one encoder with two pretraining runs, which does `effect` better than from scratch.

    With `anchor`, a frozen arm is in it that does so much better.
    """
    rng, hard = np.random.default_rng(0), np.random.default_rng(1).normal(0, 0.05, SUBJECTS)
    rows: list[dict[str, Any]] = []
    gains = {"scratch": 0.0, "dim": effect} | ({} if anchor is None else {"anchor": anchor})
    for init, gain in gains.items():
        for budget in budgets:
            labelled, level = BUDGETS[budget]
            for seed, subset, step in np.ndindex(2, 2, 2):
                keys = {
                    "arm": init,
                    "protocol": "frozen" if init == "anchor" else "finetune",
                    "pretrain_seed": seed,
                    "subset_seed": subset,
                }
                keys |= {"budget": budget, "n_labelled": labelled, "step": 20 if step == 0 else None}
                values = np.clip(level + gain - 0.1 * (step == 0) + hard + rng.normal(0, 0.01, SUBJECTS), 0, 1)
                for case, dice in enumerate(values):
                    own = {**keys, "subject": f"s-{case:012x}", "case": f"case{case:02d}"}
                    metrics = {"dice": dice, f"dice_{name}": dice, f"hd95_{name}": 2.0, f"surface_dice_{name}": dice}
                    rows += [{**own, "metric": metric, "value": float(v)} for metric, v in metrics.items()]
    table = pa.table({f.name: pa.array([row[f.name] for row in rows], f.type) for f in SCHEMA}, SCHEMA)
    write_parquet(folder / "results.parquet", table)
    write_text(folder / "config.yaml", CONFIG)
    lines = [f"image{n},s-{n:012x},{'val' if n < SUBJECTS else 'train'},,," for n in range(92)]
    write_text(folder / "splits" / "0.csv", "\n".join(["image,subject,split,label,budget,used", *lines]) + "\n")
    summary = summary_of(name, budgets)
    summary["arms"] += [{"name": "anchor", "protocol": "frozen", "encoders": ["c" * 64]}] if "anchor" in gains else []
    summary["comparisons"] = build_comparisons(folder, summary)
    write_json(folder / "summary.json", summary)
    return folder


def summary_of(name: str, budgets: tuple[str, ...]) -> dict[str, Any]:
    """`summary.json` without its comparisons."""
    seen = {kind: {"images": 0, "subjects": 0} for kind in ("pretrain", "finetune")}
    rate = {"lr": 0.003, "multiple": 3.0, "from": "selection", "scores": {"1": 0.61, "3": 0.64}}
    size = {"images": 80, "subjects": 80}
    return {
        "schema_version": 2,
        "command": "study",
        "task": "segmentation",
        "complete": True,
        "metric": "dice",
        "metric_rule": 2,
        "budgets": {budget: BUDGETS[budget][0] for budget in budgets},
        "seeds": 2,
        "split_seed": 0,
        "eval_steps": [20],
        "steps": 40,
        "arms": [
            {"name": "scratch", "protocol": "finetune", "encoders": []},
            {"name": "dim", "protocol": "finetune", "encoders": ["a" * 64, "b" * 64]},
        ],
        "counts": {
            "images": 93,
            "rejected": 2,
            "unlabelled": 1,
            "splits": {"train": size, "val": {"images": 12, "subjects": 12}, "test": {"images": 0, "subjects": 0}},
            "classes": [name],
            "labels": {
                f"{b}/{t}": {"images": BUDGETS[b][0], "subjects": BUDGETS[b][0], "classes": {}}
                for b in budgets
                for t in (0, 1)
            },
        },
        "train_val_duplicates": {"images": 0, "subjects": 0},
        "contamination": {"dim": [seen, seen]},
        "strict": False,
        "no_lr_selection": {},
        "rejected_cases": 0,
        "command_line": "medim study --encoder dim=runs/a,runs/b",
        "learning_rates": {arm: dict.fromkeys(budgets, rate) for arm in ("scratch", "dim")},
        "cells": {"all": 24, "done": 24, "left": [], "failed": []},
        "cell_hours": 0.5,
        "n_resumed_cells": 1,
        "peak_memory_bytes": 10**9,
        "device": "cpu",
        "config_hash": "0123456789ab",
        "index_hash": "f" * 64,
        "versions": {"medim": "0.1.0", "torch": "2.13.0"},
    }


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose encoder is worth a tenth of Dice at every budget."""
    return write_study(tmp_path_factory.mktemp("planted") / "study", 0.1)


@pytest.fixture
def study_of(tmp_path: Path) -> Callable[..., Path]:
    return lambda *given, **options: write_study(tmp_path / "study", *given, **options)


def audit_of(**auroc: float) -> dict[str, Any]:
    """`audit.json` of a classification, in which these tell the label so well."""

    def metric(value: float) -> dict[str, Any]:
        return {"value": value, "ci_low": value - 0.05, "ci_high": value + 0.05, "n": 12}

    def told(value: float) -> dict[str, Any]:
        both = {"auroc": metric(value), "balanced_accuracy": metric(value)}
        return {**both, "chance": {"auroc": 0.5}, "above_chance": value > 0.55, "classifier": "gradient boosting"}

    names = ("raw size", "input size", "padding", "raw intensity", "input intensity")
    values = {name: auroc.get(name.replace(" ", "_"), 0.5) for name in names}
    group = {"model": "dim, 80 labels", "column": "site", "images": 8, "subjects": 8}
    few = {"value": "south", "images": 4, "subjects": 4, "metrics": None}
    size = {"images": 12, "subjects": 12}
    return {
        "schema_version": 2,
        "images": dict.fromkeys(("train", "val", "test"), size),
        "duplicates": {
            "exact": [],
            "near": [{"train_image": "image20", "other_image": "image3", "hamming_distance": 2}],
            "max_hamming_distance": 3,
            "images": 92,
            "n_unhashed": 0,
        },
        "shortcuts": [
            {"name": name, "features": ["voxels"], "varies": value != 0.5, "prediction": told(value)}
            for name, value in values.items()
        ],
        "models": {"dim, 80 labels": {"auroc": metric(0.9), "balanced_accuracy": metric(0.8), "dice": metric(0.9)}},
        "probes": [
            {"column": "site", "features": name, "values": ["north", "south"], "excluded": [], "prediction": told(0.7)}
            for name in ("dim", "pixels")
        ],
        "groups": [{**group, "value": "north", "metrics": {"dice": metric(0.9)}}, {**group, **few}],
        "notes": ["sex: not probed"],
    }
