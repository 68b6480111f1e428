"""Claim: a cell of a study has little overhead beyond training steps and evaluation, because its process is reused.

The same fine-tuning run of one step, with 40 validation images, is timed as a separate process (`medim finetune`) and
as a cell in a process that has already run a cell. The overhead of a cell is its time minus the times of steps and
evaluation, which are measured separately.

    python benchmarks/study_overhead.py --out study_overhead.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from medim.data.index.index import build_index
from medim.evaluation.probing.label_budget import Budget
from medim.files import write_json
from medim.study.cell import StudyContext, run_cell
from medim.study.design import Arm, Cell, Design
from medim.study.time_estimate import measure_costs
from medim.tracking.tracking import track_study
from medim.training.finetune.config import resolve_finetune_config
from medim.training.finetune.run import open_labelled_cohort

IMAGES = {"train": 2000, "val": 40, "test": 1}
BUDGET = Budget(labelled=100)


def main() -> None:
    """Measure both; print and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("study_overhead.json"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"MEDIM_CACHE": f"{folder}/cache", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        results = compare_cell_overhead(folder, arguments.rounds)
    print(f"medim finetune {results['process']:.2f} s, warm cell {results['cell']:.2f} s: {results['ratio']:.0f} times")
    print(f"overhead of the warm cell beyond step and evaluation: {results['beside']:.2f} s")
    write_json(arguments.out, {"schema_version": 1, "threads": torch.get_num_threads(), **results})


def compare_cell_overhead(folder: Path, rounds: int) -> dict[str, float]:
    """Measure the median seconds of a process and of a warm cell, and the overhead of a warm cell."""
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 255, (n, 28, 28), np.uint8) for part, n in IMAGES.items()}
    arrays |= {f"{part}_labels": np.arange(n)[:, None] % 2 for part, n in IMAGES.items()}
    np.savez(folder / "noise.npz", **arrays)  # type: ignore[arg-type]
    options = ["--task", "classification", "--modality", "xray", "--data", f"{folder}/noise.npz", "--config", "xray-28"]
    command = [
        sys.executable,
        "-m",
        "medim.cli",
        "finetune",
        *options,
        "--set",
        "max_steps=1",
        "--labelled",
        "100",
        "--quiet",
    ]

    def run_process(number: int) -> None:
        subprocess.run([*command, "--out", f"{folder}/run-{number}"], check=True, capture_output=True)

    index = build_index(folder / "noise.npz", "xray")
    config = resolve_finetune_config("classification", "xray", None, "xray-28", ["max_steps=1"], index)
    cohort = open_labelled_cohort(config, index, split_seed=0, store=folder / "store")
    arm = Arm("scratch")
    subsets = {(BUDGET, 0): BUDGET.draw_subset(cohort.records("train"), 0)}
    context = StudyContext(
        out=folder / "study",
        design=Design(task="classification", arms=(arm,), budgets=(BUDGET,), seeds=1),
        config=config,
        cohort=cohort,
        subsets=subsets,
    )
    with track_study(folder / "study", "study", {}) as tracker:
        context = StudyContext(**{**vars(context), "parent_run": tracker.run_id})
        cell_seconds = measure_median_seconds(lambda number: run_cell(context, Cell(arm, number, BUDGET), 1.0), rounds)
    costs = measure_costs(context, 1)
    run_process(-1)  # fills the store
    process_seconds = measure_median_seconds(run_process, rounds)
    overhead = cell_seconds - costs.step["finetune"] - IMAGES["val"] * costs.image
    return {
        "process": process_seconds,
        "cell": cell_seconds,
        "ratio": process_seconds / cell_seconds,
        "beside": overhead,
    }


def measure_median_seconds(call: Callable[[int], None], rounds: int) -> float:
    """Measure the median seconds of the rounds after one warm-up round."""
    durations = []
    for number in range(1 + rounds):
        start = time.perf_counter()
        call(number)
        durations.append(time.perf_counter() - start)
    return median(durations[1:])


if __name__ == "__main__":
    main()
