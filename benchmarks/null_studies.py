"""Claim: at most 2 of 20 null studies raise a false alarm.

Each repetition has its own images, labels and weights. Two arms are fine-tuned with 3 seeds, 3 label subsets and 2
budgets, both from random weights; one of them is named `encoder`. An alarm is any verdict other than "no evidence of a
benefit" after Holm correction. Finished studies are kept, so the benchmark can be interrupted and restarted.

    OMP_NUM_THREADS=1 python benchmarks/null_studies.py --out null-studies
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from medim.config import FinetuneConfig, check_config
from medim.data.index.index import Index, build_index
from medim.evaluation.cases import read_cases
from medim.files import read_json, write_json
from medim.metrics import build_statistics
from medim.metrics.bootstrap import compute_scores, draw_resamples
from medim.metrics.metric import Statistic
from medim.study.statistics.intervals import compare_to_scratch
from medim.tasks.classification import class_arrays
from medim.training.finetune.run import finetune

ARMS, BUDGETS, SEEDS, SUBSETS = ("encoder", "scratch"), (16, 64), (0, 1, 2), (0, 1, 2)
TRAIN, VAL, SIDE = 120, 60, 28
SCHEDULE = {
    "task": "classification",
    "modality": "xray",
    "preprocessing": [{"op": "normalise", "method": "zscore"}],
    "views": {"shape": [SIDE, SIDE]},
    "encoder": {"name": "convnet", "channels": [4, 8], "kernel_size": 3, "summary_channels": 8},
    "head": {"name": "classification"},
    "max_steps": 40,
    "batch_size": 16,
    "lr": 0.01,
    "checkpoint_every_steps": 40,
}


def main() -> None:
    """Run all missing studies; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    logging.getLogger("medim").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(arguments.out / 'mlflow.db').resolve()}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for number in range(arguments.repetitions):
        result = arguments.out / f"{number}.json"
        if not result.is_file():
            write_json(result, run_null_study(number, arguments.out / f"cells-{number}"))
            shutil.rmtree(arguments.out / f"cells-{number}")
        results.append(read_json(result))
        print(number, *(f"{c['value']:+.3f} (p {c['p']:.3f})" for c in results[-1]["comparisons"]), flush=True)
    alarms, seconds = sum(item["alarm"] for item in results), sum(item["seconds"] for item in results)
    print(f"{alarms} of {len(results)} null studies raised a false alarm; {seconds / 60:.0f} minutes")
    write_json(arguments.out / "null-studies.json", {"alarms": alarms, "repetitions": len(results), "seconds": seconds})


def run_null_study(number: int, folder: Path) -> dict[str, Any]:
    """Run one null study; return its comparisons, and whether any of them raised an alarm."""
    start = time.perf_counter()
    index = build_index(write_noise_images(folder / "pictures.npz", number), "xray", remember=False)
    config = check_config("finetune", SCHEDULE, source="benchmarks/null_studies.py")
    assert isinstance(config, FinetuneConfig)
    val = [record for record in index.records if record.split == "val"]
    resamples = draw_resamples([record.subject for record in val], [record.label for record in val])
    pairs = {}
    for budget in BUDGETS:
        cells = {
            arm: [
                [run_null_cell(config, index, folder, arm, budget, len(SEEDS) * number + s, t) for t in SUBSETS]
                for s in SEEDS
            ]
            for arm in ARMS
        }
        pairs["encoder", str(budget)] = (
            compute_scores(cells["encoder"], resamples),
            compute_scores(cells["scratch"], resamples),
        )
    rows = compare_to_scratch(pairs)
    comparisons = [
        {"value": c.difference.value, "p": c.p, "p_corrected": c.p_corrected, "verdict": c.verdict} for c in rows
    ]
    alarm = any(c.verdict != "no evidence of a benefit" for c in rows)
    return {"comparisons": comparisons, "alarm": alarm, "seconds": time.perf_counter() - start}


def run_null_cell(
    config: FinetuneConfig, index: Index, folder: Path, arm: str, budget: int, s: int, t: int
) -> Statistic:
    """Compute the AUROC of one run; the arms differ only in the seed of their random weights."""
    out = folder / f"{arm}-{budget}-{s}-{t}"
    if not (out / "summary.json").is_file():
        seed = 2 * s + ARMS.index(arm)  # repetitions do not share weights, so that alarms are independent
        finetune(config, index, out, labelled=budget, seed=seed, subset_seed=t, store=folder / "store", resume=True)
    return build_statistics("classification", *class_arrays(read_cases(out / "cases.parquet"), index.labels))["auroc"]


def write_noise_images(path: Path, seed: int) -> Path:
    """Write noise images with a faint bright spot in one of two corners, which depends on the class."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for part, count in (("train", TRAIN), ("val", VAL)):
        labels = rng.permutation(np.arange(count) % 2)
        images = rng.normal(120, 30, (count, SIDE, SIDE))
        for image, label, (y, x) in zip(images, labels, rng.integers(2, 8, (count, 2)), strict=True):
            image[y : y + 6, x + 12 * label : x + 12 * label + 6] += 40
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = np.clip(images, 0, 255).astype(np.uint8), labels[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


if __name__ == "__main__":
    main()
